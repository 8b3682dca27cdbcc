"""A report as one HTML page; the layout is in ``report.html``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ..passes import samples
from ..torch_internals.stack_trace import without_wrappers
from .graph_drawing import Drawing, lay_out
from .histograms import Histogram
from .records import GraphBreak, GraphRecord, ProductRecord, WeightRecord

_TEMPLATES = Path(__file__).parent
_PLOT = (420, 120)
"""Width and height of a histogram, in pixels."""


class Content(Protocol):
    """What a page tells: the parts of a `gws_compile.Report` that the layout shows, see there."""

    @property
    def records(self) -> Sequence[WeightRecord]:
        """The weights."""

    @property
    def rewritten(self) -> Sequence[WeightRecord]:
        """The weights whose reads see the cast weight."""

    @property
    def products(self) -> Sequence[ProductRecord]:
        """Where operands of products are rounded, every product."""

    @property
    def graphs(self) -> Sequence[GraphRecord]:
        """The traced graphs."""

    @property
    def recompilations(self) -> Sequence[GraphRecord]:
        """The graphs of frames that were compiled before."""

    @property
    def breaks(self) -> Sequence[GraphBreak]:
        """The graph breaks."""

    @property
    def settings(self) -> Mapping[str, str]:
        """Those of the backend."""

    def __len__(self) -> int: ...


def render(report: Content, histograms: Sequence[Histogram]) -> str:
    """The page.

    Args:
        report: what it tells.
        histograms: of some weights.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(short_path=_short_path, breakable=_breakable, shown=_shown)
    return environment.get_template("report.html").render(
        report=report,
        torch_version=torch.__version__,
        elements=sum(prod(record.shape) for record in report.records),
        rewritten_elements=sum(prod(record.shape) for record in report.rewritten),
        graphs=[_graph(graph) for graph in report.graphs],
        plots=[_plots(one) for one in histograms],
        plot=_PLOT,
    )


def _short_path(location: str) -> str:
    """``file:line in function`` with the last two parts of the file's path."""
    file, separator, rest = location.rpartition(":")
    return f"{'/'.join(Path(file).parts[-2:])}{separator}{rest}"


def _shown(stack: Sequence[str]) -> Sequence[str]:
    """The two innermost callers."""
    return without_wrappers(stack)[-2:]


def _breakable(name: str) -> Markup:
    """A name that may be broken behind its dots; a path, behind its slashes."""
    return Markup(re.sub(r"(/)" if "/" in name else r"([.])", r"\1<wbr>", str(escape(name))))


@dataclass(frozen=True)
class _Line:
    text: str
    changed: bool


@dataclass(frozen=True)
class _Graph:
    record: GraphRecord
    nodes: tuple[int, int]
    samples: int
    drawing: Drawing
    before: list[_Line]
    after: list[_Line]


def _graph(record: GraphRecord) -> _Graph:
    old, new = (text.strip("\n").splitlines() for text in (record.before, record.after))
    before, after = [_Line(line, True) for line in old], [_Line(line, True) for line in new]
    for i, j, count in SequenceMatcher(None, old, new).get_matching_blocks():
        before[i : i + count] = after[j : j + count] = [_Line(line, False) for line in old[i : i + count]]
    return _Graph(record, (len(old), len(new)), len(samples(record.graph)), lay_out(record.graph), before, after)


@dataclass(frozen=True)
class _Plot:
    title: str
    limit: float
    bars: list[tuple[str, str]]


@dataclass(frozen=True)
class _Plots:
    histogram: Histogram
    plots: list[_Plot]


def _plots(histogram: Histogram) -> _Plots:
    sampled = "ŵ, sampled" if histogram.noise is not None else "ŵ, cast"
    values = [(histogram.weight, "w"), (histogram.sample, "sample")]
    plots = [_plot(f"w and {sampled}", histogram.limit, values)]
    if histogram.noise is not None:
        plots.append(_plot("noise, before the cast", histogram.noise_limit, [(histogram.noise, "noise")]))
    return _Plots(histogram, plots)


def _plot(title: str, limit: float, values: list[tuple[tuple[int, ...], str]]) -> _Plot:
    """Bars on a square-root scale, by which rare values stay visible."""
    width, height = _PLOT
    highest = max(max(counts) for counts, _ in values) or 1
    bars = []
    for counts, kind in values:
        step = width / len(counts)
        tops = [height * (1 - (count / highest) ** 0.5) for count in counts]
        path = f"M0 {height}" + "".join(f"V{top:.1f}H{(i + 1) * step:.1f}" for i, top in enumerate(tops))
        bars.append((kind, f"{path}V{height}Z"))
    return _Plot(title, limit, bars)
