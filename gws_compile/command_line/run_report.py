"""What ``gws run`` says at the end: which calls took the backend, and the report of the weights."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..compiler.backend import Backend
from ..report.report import Report
from .named_backend import named_backends
from .torch_compile_patch import AUTO, AUTO_COPY, CompileCall, CompileCalls
from .training_watch import TrainingWatch
from .update_functions import without_updates

_SHOWN = 8
_WIDTH = 120

_NO_EVALUATION = (
    "No compiled call had gradients disabled: if the script has evaluated its model, that was not of the weights under "
    "the cast alone. Evaluate what is compiled, under torch.no_grad()."
)


@dataclass(frozen=True)
class Ending:
    """How a script ended that did not come to its end.

    Attributes:
        what: ends the sentence "the script ended with ...".
        chosen: whether script or user meant it to end, so that what it did up to then counts.
    """

    what: str
    chosen: bool

    @classmethod
    def by(cls, error: BaseException | None) -> Ending | None:
        """That of a script that has raised this; None for success."""
        if isinstance(error, SystemExit):
            code = error.code if error.code is None or isinstance(error.code, int) else 1
            return cls(f"exit code {code}", chosen=True) if code else None
        return None if error is None else cls(type(error).__name__, chosen=isinstance(error, KeyboardInterrupt))


class RunReport:
    """The report of one run, printed to stderr when the process ends.

    Args:
        calls: the calls of torch.compile.
        script: what was run.
        auto: whether modules were compiled that the script did not compile.
        file: where the report goes, a whole path, since the script may change the folder: as JSON, a page of HTML, or
            text, by its suffix. stderr then has its first lines alone.

    Attributes:
        calls: as given.
        ending: how the script ended, if not well.
    """

    def __init__(
        self, calls: CompileCalls, *, script: str, auto: bool, file: str | None, trains_plain: bool = False
    ) -> None:
        self.calls = calls
        self._trains_plain = trains_plain
        self.ending: Ending | None = None
        self._script = script
        self._auto = auto
        self._file = None if file is None else Path(file)
        self._graphs = 0
        self._watch = TrainingWatch(self._backends, lambda: auto or self._count_graphs() > 0)

    def finish(self) -> None:
        """Print or write the report, on rank 0."""
        if self.calls.is_first_rank():
            self._tell(self._file)

    def begin_process(self) -> None:
        """Tell, in a process that has been forked, only of what comes from here on."""
        self.calls.seen.clear()
        self._graphs = self._count_graphs()
        self._watch.begin_process()

    def finish_process(self) -> None:
        """The same in a process of multiprocessing, if it has compiled anything (of ranks, the first).

        Its file lies beside that of the process that was started.
        """
        if (self.calls.seen or self._count_graphs() > self._graphs) and self.calls.is_first_rank():
            file = self._file
            self._tell(file and file.with_name(f"{file.stem}.{os.getpid()}{file.suffix}"))

    def _backends(self) -> tuple[Backend, ...]:
        return tuple(dict.fromkeys((*named_backends(), *self.calls.own)))

    def _count_graphs(self) -> int:
        return sum(len(backend.graphs) for backend in self._backends())

    def _tell(self, file: Path | None) -> None:
        reports = [backend.report() for backend in self._backends()]
        records = [record for one in reports for record in without_updates(one)]
        products = [product for one in reports for product in one.products]
        report = Report(records, next((r.bits for r in reports if r.bits), None), products=products)
        plain = [] if self._trains_plain else self._watch.told()
        header = f"gws run: {self.header()}"
        if not report.rewritten:
            header += f"\n\n{_framed(self.nothing(report), *plain)}"
        elif plain:
            header += f"\n\n{_framed(*plain)}"
        if report.rewritten and all(graph.gradients for one in reports for graph in one.graphs):
            header += "\n\n" + "\n".join(textwrap.wrap(_NO_EVALUATION, _WIDTH))
        text = f"{header}\n\n{report}\n" if len(report) else f"{header}\n\n"
        if file is not None:
            self._write(file, report, reports, plain, text)
            text = f"{header}\n\nThe report is in {file}\n"
        if self.ending is not None and not (self.ending.chosen and report.rewritten):
            # The script has said what is wrong; what follows from it is not to bury that.
            text = f"gws run: {self._cut_short(report)}" + (f"; the report is in {file}\n" if file else "\n")
        sys.stderr.write(f"\n{text}")

    def _cut_short(self, report: Report) -> str:
        assert self.ending is not None
        if not self.calls.taken:
            return f"the script ended with {self.ending.what}, before anything took the gws backend"
        done = f"{len(report.rewritten)} of {len(report)} weights rewritten" if len(report) else "no weight seen"
        return f"the script ended with {self.ending.what}; up to then {done}"

    def _write(self, file: Path, report: Report, reports: Sequence[Report], plain: Sequence[str], text: str) -> None:
        if file.suffix == ".json":
            content = {
                "header": self.header(),
                "calls": self.calls.to_dict(),
                "weights": json.loads(report.to_json()),
                "products": report.to_dict()["products"],
                "graphs": [graph for one in reports for graph in one.to_dict()["graphs"]],
                "plain_steps": plain,
            }
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        elif file.suffix in (".html", ".htm"):
            # A page shows one backend: of several, the one that has rewritten most.
            max(reports, key=lambda one: len(one.rewritten), default=report).to_html(file)
        else:
            file.write_text(text, encoding="utf-8")

    def header(self) -> str:
        """One sentence on the calls."""
        taken, left = self.calls.taken, self.calls.left
        added = {call: n for call, n in taken.items() if call.reason == AUTO}
        copies = {call: n for call, n in taken.items() if call.reason == AUTO_COPY}
        own = {call: n for call, n in taken.items() if call.reason not in (AUTO, AUTO_COPY)}
        parts = [f"{_count(own, 'torch.compile call')} took the gws backend{_places(own)}"]
        if self._auto:
            parts.append(f"{_count(added, 'module')} compiled by --auto{_places(added)}")
        if copies:
            parts.append(f"{_count(copies, 'copy', 'copies')} evaluated with the cast{_places(copies)}")
        if left:
            parts.append(f"{sum(left.values())} left alone{_places(left)}")
        return "; ".join(parts)

    def nothing(self, report: Report) -> str:
        """Why nothing was rewritten, and what to do."""
        if self._trains_plain and not len(report):
            return (
                "NO WEIGHT WAS CAST: with --cast-afterwards weights are cast in compiled calls with gradients\n"
                "disabled, and there was none. Evaluate under torch.no_grad(); a model that the script does not\n"
                "compile needs --auto."
            )
        if len(report):
            why = "Every weight that was seen was left alone; the table says why."
        elif self.calls.taken:
            why = (
                "What was compiled gave no graph with a weight: it was not called, its weights lie outside of it, or\n"
                "torch left all of it to Python (TORCH_LOGS=graph_breaks says why)."
            )
        elif self.calls.left:
            why = "Every torch.compile call names a backend of its own: take that out of the script."
        elif self._auto:
            why = "No module with trainable weights was called with gradients enabled in this process."
        else:
            why = "The script never calls torch.compile."
        if not self._auto and not self.calls.taken:
            why += f"\nWith `gws run --auto {self._script} ...` its models are compiled as they are called."
        return (
            f"NO WEIGHT WAS REWRITTEN: this was ordinary training.\n{why}\n"
            "Processes of multiprocessing report for themselves if they compile anything. Other programs that the\n"
            "script starts are not followed: write `torchrun ... -m gws_compile run SCRIPT`, not the reverse."
        )


def _count(calls: Mapping[CompileCall, int], noun: str, several: str = "") -> str:
    number = sum(calls.values())
    return f"{number} {noun if number == 1 else several or f'{noun}s'}"


def _places(calls: Mapping[CompileCall, int]) -> str:
    if not calls:
        return ""
    each = [
        f"{call.target if call.taken else call.reason} at {call.where}"
        + (f" ({call.reason})" if call.taken and call.reason not in ("", AUTO, AUTO_COPY) else "")
        + (f" x {n}" if n > 1 else "")
        for call, n in calls.items()
    ]
    return ": " + ", ".join(each[:_SHOWN]) + (", ..." if len(each) > _SHOWN else "")


def _framed(*texts: str) -> str:
    paragraphs = [paragraph for text in texts for paragraph in text.splitlines()]
    lines = [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, _WIDTH, break_on_hyphens=False)]
    rule = "*" * max(map(len, lines))
    return "\n".join([rule, *lines, rule])
