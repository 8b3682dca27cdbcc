"""What ``gws run`` says at the end: which calls took the backend, and the report of the weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from ..compiler.backend import Backend
from ..report.report import Report
from .named_backend import named_backends
from .torch_compile_patch import CompileCall, CompileCalls

_SHOWN = 8


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
    """

    def __init__(self, calls: CompileCalls, *, script: str, auto: bool, file: str | None) -> None:
        self.calls = calls
        self._script = script
        self._auto = auto
        self._file = None if file is None else Path(file)
        self._process = os.getpid()
        self._graphs = 0

    def finish(self) -> None:
        """Print or write the report, in the process that was started, on rank 0."""
        if os.getpid() == self._process and self._rank() in (None, 0):
            self._tell(self._file)

    def begin_process(self) -> None:
        """Tell, in a process that has been forked, only of what comes from here on."""
        self.calls.seen.clear()
        self._graphs = self._count_graphs()

    def finish_process(self) -> None:
        """The same in a process of multiprocessing, if it has compiled anything (of ranks, the first).

        Its file lies beside that of the process that was started.
        """
        if (self.calls.seen or self._count_graphs() > self._graphs) and self._rank() in (None, 0):
            file = self._file
            self._tell(file and file.with_name(f"{file.stem}.{os.getpid()}{file.suffix}"))

    def _backends(self) -> tuple[Backend, ...]:
        return (*named_backends(), *self.calls.own)

    def _count_graphs(self) -> int:
        return sum(len(backend.graphs) for backend in self._backends())

    def _rank(self) -> int | None:
        if self.calls.rank is not None:
            return self.calls.rank
        rank = os.environ.get("RANK", "")  # a launcher's
        return int(rank) if rank.isdecimal() else None

    def _tell(self, file: Path | None) -> None:
        reports = [backend.report() for backend in self._backends()]
        report = Report([record for one in reports for record in one], next((r.bits for r in reports if r.bits), None))
        header = f"gws run: {self.header()}"
        if not report.rewritten:
            header += f"\n\n{_framed(self.nothing(report))}"
        if file is None:
            sys.stderr.write(f"\n{header}\n\n" + (f"{report}\n" if len(report) else ""))
            return
        if file.suffix == ".json":
            content = {"header": self.header(), "calls": self.calls.to_dict(), "weights": json.loads(report.to_json())}
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        elif file.suffix in (".html", ".htm"):
            # A page shows one backend: of several, the one that has rewritten most.
            max(reports, key=lambda one: len(one.rewritten), default=report).to_html(file)
        else:
            file.write_text(f"{header}\n\n{report}\n", encoding="utf-8")
        sys.stderr.write(f"\n{header}\n\nThe report is in {file}\n")

    def header(self) -> str:
        """One sentence on the calls."""
        taken, left = self.calls.taken, self.calls.left
        added = {call: n for call, n in taken.items() if call.reason == "--auto"}
        own = {call: n for call, n in taken.items() if call not in added}
        parts = [f"{_count(own, 'torch.compile call')} took the gws backend{_places(own)}"]
        if self._auto:
            parts.append(f"{_count(added, 'module')} compiled by --auto{_places(added)}")
        if left:
            parts.append(f"{sum(left.values())} left alone{_places(left)}")
        return "; ".join(parts)

    def nothing(self, report: Report) -> str:
        """Why nothing was rewritten, and what to do."""
        if len(report):
            why = "Every weight that was seen was left alone; the table says why."
        elif self.calls.taken:
            why = "What was compiled has read no weight: it was not called, or its weights lie outside of it."
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


def _count(calls: Mapping[CompileCall, int], noun: str) -> str:
    number = sum(calls.values())
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _places(calls: Mapping[CompileCall, int]) -> str:
    if not calls:
        return ""
    each = [
        f"{call.target if call.taken else call.reason} at {call.where}"
        + (f" ({call.reason})" if call.taken and call.reason not in ("", "--auto") else "")
        + (f" x {n}" if n > 1 else "")
        for call, n in calls.items()
    ]
    return ": " + ", ".join(each[:_SHOWN]) + (", ..." if len(each) > _SHOWN else "")


def _framed(text: str) -> str:
    rule = "*" * max(map(len, text.splitlines()))
    return f"{rule}\n{text}\n{rule}"
