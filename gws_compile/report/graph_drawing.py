"""A drawing of a rewritten graph around its weights: from each weight, by way of its sample, to its reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import fx

from ..ops.sample_arguments import SampleArguments
from ..passes import Weight, operations, weights_of
from ..passes.graph_walk import Place, walk
from ..passes.sample_nodes import arguments_of
from ..torch_internals.stack_trace import source_of

Kind = Literal["weight", "left", "sample", "view", "read", "other"]

LONGEST = 44
"""Characters of a label; longer ones lose their middle."""

_CHARACTER, _MARGIN, _HEIGHT, _ROW, _GAP = 7.3, 9, 24, 32, 34
_MOST = 12
"""Users of one value that are shown."""


@dataclass(frozen=True)
class Box:
    """A node.

    Attributes:
        x, y, width, height: in pixels.
        label: what stands in it.
        title: what a pointer on it shows.
        kind: a weight that is rewritten or left alone, its sample, a view on the way, a read, or another use.
    """

    x: float
    y: float
    width: float
    height: float
    label: str
    title: str
    kind: Kind


@dataclass(frozen=True)
class Drawing:
    """Boxes, and the lines between them as SVG paths.

    Attributes:
        width, height: in pixels.
        boxes: the nodes.
        lines: the edges.
    """

    width: float
    height: float
    boxes: tuple[Box, ...]
    lines: tuple[str, ...]


@dataclass
class _Tree:
    label: str
    title: str
    kind: Kind
    children: list[_Tree] = field(default_factory=list)


def lay_out(graph: fx.GraphModule) -> Drawing:
    """The drawing of a rewritten graph: a row for each use of a weight, the same columns for all."""
    trees = [_tree(graph, weight) for weight in weights_of(graph)]
    columns: list[float] = []
    for tree in trees:
        _measure(tree, 0, columns)
    starts = [1 + sum(columns[:i]) + _GAP * i for i in range(len(columns))]
    boxes: list[Box] = []
    lines: list[str] = []
    y = 1.0
    for tree in trees:
        y = _place(tree, 0, y, starts, boxes, lines)
    width = (starts[-1] + columns[-1] if columns else 0) + 1
    return Drawing(width, y, tuple(boxes), tuple(lines))


def shorten(text: str, longest: int = LONGEST) -> str:
    """A text without its middle, where it is longer than ``longest``."""
    if len(text) <= longest:
        return text
    end = longest // 2
    return f"{text[: longest - end - 1]}\N{HORIZONTAL ELLIPSIS}{text[-end:]}"


def _tree(graph: fx.GraphModule, weight: Weight) -> _Tree:
    shape = " x ".join(map(str, weight.shape))
    dtype = str(weight.dtype).removeprefix("torch.")
    title = f"{weight.name}, {shape}, {dtype}" + (f": left alone: {weight.reason}" if weight.reason else "")
    root = _Tree(weight.name, title, "left" if weight.reason else "weight")
    root.children = list(_uses(walk(graph, weight.node)))
    return root


def _uses(place: Place) -> Iterator[_Tree]:
    for step in place.steps[:_MOST]:
        children = [child for onward in step.places for child in _uses(onward)]
        if step.kind == "body":
            yield from children
        elif step.kind == "sample":
            yield replace(_sample(step.node), children=children)
        elif step.kind in ("read", "view", "scaled"):
            yield replace(_use(step.node, "read" if step.kind == "read" else "view"), children=children)
        elif step.kind != "metadata":
            yield _use(step.node, "other")
    if len(place.steps) > _MOST:
        yield _Tree(f"and {len(place.steps) - _MOST} more", "", "other")


def _use(node: fx.Node, kind: Kind) -> _Tree:
    if node.op == "output":
        return _Tree("output", "what the graph returns", kind)
    source = source_of(node)
    return _Tree(operations.name_of(node), "\n".join(filter(None, (node.name, source.code, source.location))), kind)


def _width(bits: float | None) -> str:
    return "b scheduled" if bits is None else f"b = {bits:g}"


def _sample(node: fx.Node) -> _Tree:
    given = arguments_of(node)
    if not isinstance(given, SampleArguments):
        scaled = f"scale {given.scale}" if given.scale else "no scale"
        title = f"gws.cast_to_levels: {len(given.table)} levels, block {given.block}, {scaled}"
        return _Tree(f"cast to {len(given.table)} levels", title, "sample")
    width = "learned bits" if given.learned is not None else _width(given.bits)
    label = f"sample {given.fmt}, {width}" if given.key is not None else f"cast {given.fmt}"
    scaled = f"scale {given.scale}" if given.scale else "no scale"
    title = f"gws.sample_weight: {given.fmt}, {given.noise} noise, {width}, block {given.block}, {scaled}"
    return _Tree(label, title, "sample")


def _measure(tree: _Tree, depth: int, columns: list[float]) -> None:
    if depth == len(columns):
        columns.append(0.0)
    columns[depth] = max(columns[depth], len(shorten(tree.label)) * _CHARACTER + 2 * _MARGIN)
    for child in tree.children:
        _measure(child, depth + 1, columns)


def _place(tree: _Tree, depth: int, y: float, starts: list[float], boxes: list[Box], lines: list[str]) -> float:
    """Put a tree with its first leaf at ``y``; where the next row begins."""
    label = shorten(tree.label)
    width = len(label) * _CHARACTER + 2 * _MARGIN
    boxes.append(Box(starts[depth], y, width, _HEIGHT, label, tree.title, tree.kind))
    x0, y0, below = starts[depth] + width, y + _HEIGHT / 2, y + _ROW
    for number, child in enumerate(tree.children):
        at = y if number == 0 else below
        x1, y1 = starts[depth + 1], at + _HEIGHT / 2
        bend = x1 - _GAP / 2
        lines.append(f"M{x0:g} {y0:g}H{bend:g}V{y1:g}H{x1:g}")
        below = _place(child, depth + 1, at, starts, boxes, lines)
    return below
