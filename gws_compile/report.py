"""What was rewritten and what was not: `Report`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate
from torch import fx

if TYPE_CHECKING:
    from .histograms import Histogram


@dataclass(frozen=True)
class ReadRecord:
    """One read of a weight.

    Attributes:
        op: the operation, such as ``"linear"``.
        location: ``file:line in function`` of the user's code (or a library's) that calls it; empty where unknown.
        code: that line.
        stack: the callers, outermost first, as ``file:line in function``; ``location`` is the last.
    """

    op: str
    location: str
    code: str
    stack: tuple[str, ...]


@dataclass(frozen=True)
class WeightRecord:
    """One weight in the report.

    Attributes:
        name: qualified name, relative to the compiled module.
        shape: the weight's.
        dtype: the weight's, such as ``"float32"``.
        op: the operation that reads it (``"linear"``); several are joined by ``", "``; empty if none does.
        rewritten: whether its reads see the cast weight.
        reason: why it was left alone; empty when rewritten.
        fmt: the format it is cast to; empty when left alone.
        bits: the bit width b of its noise; None when left alone or cast without noise.
        noise: ``"rounded_normal"``, ``"uniform"``, or ``"none"`` for a cast without noise (frozen weights, and graphs
            traced with gradients disabled); empty when left alone.
        location: ``file:line`` of the first read in the user's code.
        reads: every read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    op: str
    rewritten: bool
    reason: str
    fmt: str
    bits: float | None
    noise: str
    location: str
    reads: tuple[ReadRecord, ...] = ()

    @property
    def hint(self) -> str:
        """What to do if a weight that was left alone should be rewritten; empty where there is nothing to say."""
        return next((hint for start, hint in _HINTS.items() if self.reason.startswith(start)), "")


_LINE = "\n"
_HINTS = {
    "matches the exclude pattern": "to rewrite it, give exclude= a list without this pattern",
    "no include pattern matches": "to rewrite it, add a pattern that matches its name to include=",
    "no matrix product or convolution reads it, only:": (
        "if one of these operations multiplies or convolves with it, gws_compile does not know the operation yet: "
        "report its name, as it stands here, with the versions of torch and gws_compile"
    ),
    "no traced graph has it: not used": (
        "see the graph breaks: mend them, or call torch.compile(module, backend=...) on the module that holds it"
    ),
}


@dataclass(frozen=True)
class GraphBreak:
    """A place that Dynamo could not trace.

    Attributes:
        reason: Dynamo's own words: the cause on the first line, then explanation and hints.
        location: ``file:line in function`` of the user's code; empty where the frame was left as a whole, of which
            Dynamo keeps the cause alone.
    """

    reason: str
    location: str

    @property
    def cause(self) -> str:
        """The first line of the reason."""
        return self.reason.strip().partition("\n")[0]


@dataclass(frozen=True)
class GraphRecord:
    """One traced graph.

    Attributes:
        number: from 0, in the order of tracing.
        compile_id: Dynamo's ``"frame/number"``; a number above 0 is a recompilation.
        location: ``file:line in function`` of its first operation's outermost caller, decorators' wrappers left out.
        gradients: traced with gradients enabled.
        graph_break: what ended it early; None where it ends with its function.
        recompiled: why its frame was compiled again: the guard that failed; empty for a first compilation.
        before: the graph as Dynamo gave it, as readable code.
        graph: as it was rewritten.
    """

    number: int
    compile_id: str
    location: str
    gradients: bool
    graph_break: GraphBreak | None
    recompiled: str
    before: str = field(repr=False)
    graph: fx.GraphModule = field(repr=False)

    @property
    def after(self) -> str:
        """The rewritten graph, as readable code."""
        return self.graph.print_readable(print_output=False)


@dataclass(frozen=True)
class BitsSummary:
    """What learned bit widths stand for.

    Attributes:
        average: bit width, over all elements.
        share: format -> share of the elements that are cast to it in noise-free calls.
        stored_bytes: of the cast weights, with a byte for each block's scale where the format is scaled.
        by_weight: the same for each weight; empty in a weight's own summary.
    """

    average: float
    share: dict[str, float]
    stored_bytes: int
    by_weight: dict[str, BitsSummary]


class Report:
    """The weights that a backend has seen, over all graphs compiled so far, and those of their models in no graph.

    ``print(report)`` shows a table. A weight that several graphs treat alike stands there once; one that is sampled in
    training and cast in evaluation stands there as sampled.

    Attributes:
        records: the weights.
        bits: what learned bit widths stand for now; None while widths are fixed, or before any is known.
        graphs: the traced graphs; a pickled report has none.
        breaks: the graph breaks, each once.
        settings: those of the backend, as text by name.
    """

    def __init__(
        self,
        records: Iterable[WeightRecord],
        bits: BitsSummary | None = None,
        *,
        graphs: Sequence[GraphRecord] = (),
        breaks: Iterable[GraphBreak] = (),
        settings: Mapping[str, str] | None = None,
        histograms: Callable[[int], Sequence[Histogram]] | None = None,
    ) -> None:
        merged: dict[tuple[object, ...], WeightRecord] = {}
        for record in records:
            key = (record.name, record.shape, record.rewritten, record.reason)
            known = merged.get(key)
            if known is None or (known.noise == "none" and record.noise not in ("", "none")):
                merged[key] = record
        self.records = tuple(merged.values())
        self.bits = bits
        self.graphs = tuple(graphs)
        ends = (graph.graph_break for graph in self.graphs)
        self.breaks = tuple(dict.fromkeys([*(end for end in ends if end is not None), *breaks]))
        self.settings = dict(settings or {})
        self._histograms = histograms

    def __reduce__(self) -> tuple[Callable[..., Report], tuple[Any, ...]]:
        return _without_graphs, (self.records, self.bits, self.breaks, self.settings)

    @property
    def rewritten(self) -> tuple[WeightRecord, ...]:
        """The weights whose reads see the cast weight."""
        return tuple(r for r in self.records if r.rewritten)

    @property
    def skipped(self) -> tuple[WeightRecord, ...]:
        """The weights left alone; ``reason`` says why."""
        return tuple(r for r in self.records if not r.rewritten)

    @property
    def recompilations(self) -> tuple[GraphRecord, ...]:
        """The graphs of frames that were compiled before; ``recompiled`` says which guard failed."""
        return tuple(graph for graph in self.graphs if graph.recompiled)

    def __iter__(self) -> Iterator[WeightRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def to_json(self) -> str:
        """The records as a JSON array of objects, keyed as `WeightRecord`; learned bit widths are in `bits`."""
        return json.dumps([asdict(r) for r in self.records], indent=2)

    def to_dict(self) -> dict[str, Any]:
        """The whole report, the graphs' code left out, in what JSON knows.

        Keys: ``settings``; ``weights``, keyed as `WeightRecord`; ``bits``, as `BitsSummary` or null; ``graphs``, with
        ``number``, ``compile_id``, ``location``, ``gradients`` and ``recompiled``; ``graph_breaks``, as `GraphBreak`.
        """
        keys = ("number", "compile_id", "location", "gradients", "recompiled")
        return {
            "settings": self.settings,
            "weights": [asdict(record) for record in self.records],
            "bits": None if self.bits is None else asdict(self.bits),
            "graphs": [{key: getattr(graph, key) for key in keys} for graph in self.graphs],
            "graph_breaks": [asdict(one) for one in self.breaks],
        }

    def to_html(self, path: str | Path, *, weights: int = 6) -> None:
        """Write the report as one HTML page that needs nothing else: no network, no further file.

        It has the weights and their reads, graph breaks and recompilations with their causes, each graph before and
        after, and of some rewritten weights, while their model is alive, histograms of values, sample and noise.

        Args:
            path: of the page.
            weights: for how many weights, evenly spread over the model, histograms are drawn.
        """
        from .page import render

        histograms = self._histograms(weights) if self._histograms is not None and weights > 0 else ()
        Path(path).write_text(render(self, histograms), encoding="utf-8")

    def __str__(self) -> str:
        if not self.records:
            return "gws_compile: no weights seen yet (nothing has been compiled)"
        rows = [
            (
                r.name,
                " x ".join(map(str, r.shape)),
                r.op,
                r.fmt,
                "" if r.bits is None else f"{r.bits:g}",
                r.noise if r.rewritten else f"left alone: {r.reason}",
            )
            for r in self.records
        ]
        table = tabulate(
            rows,
            headers=("weight", "shape", "read by", "format", "bits", "noise"),
            colalign=("left", "right", "left", "left", "right", "left"),
            maxcolwidths=[None, None, None, None, None, 60],
            disable_numparse=True,
        )
        parameters = sum(prod(r.shape) for r in self.rewritten)
        total = sum(prod(r.shape) for r in self.records)
        text = f"{table}\n{len(self.rewritten)} of {len(self)} weights rewritten, {parameters:,} of {total:,} elements"
        if self.bits is not None:
            text += f"\n\n{self._bits_table(self.bits)}"
        for what, lines in (
            ("graph break", [f"{b.location or 'a whole frame is left'}: {b.cause}" for b in self.breaks]),
            ("recompilation", [f"{g.location}: {g.recompiled.partition(_LINE)[0]}" for g in self.recompilations]),
        ):
            if lines:
                text += f"\n\n{len(lines)} {what}{'s' if len(lines) > 1 else ''}:\n" + "\n".join(
                    f"  {x}" for x in lines
                )
        return text

    def _bits_table(self, bits: BitsSummary) -> str:
        formats = list(bits.share)
        rows = [
            (name, f"{s.average:.2f}", *(f"{100 * s.share[f]:.1f} %" for f in formats), f"{s.stored_bytes / 1024:,.1f}")
            for name, s in [*bits.by_weight.items(), ("all", bits)]
        ]
        return tabulate(
            rows,
            headers=("learned bit widths", "average", *formats, "KiB"),
            colalign=("left", *["right"] * (len(formats) + 2)),
            disable_numparse=True,
        )

    __repr__ = __str__


def _without_graphs(
    records: Iterable[WeightRecord],
    bits: BitsSummary | None,
    breaks: Iterable[GraphBreak],
    settings: Mapping[str, str],
) -> Report:
    return Report(records, bits, breaks=breaks, settings=settings)
