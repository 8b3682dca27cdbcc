"""The way of a value through a graph: through views, into the bodies of activation checkpoints, to what uses it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from torch import fx

from . import operations
from .bodies import body_of, graphs, placeholders_of
from .gradient_modes import RECORDED, Mode, Modes
from .sample_nodes import is_sample

Kind = Literal["read", "view", "scaled", "sample", "body", "in_place", "embedding", "output", "metadata", "other"]
"""What a node does with a value: multiplies or convolves with it; rearranges, converts or joins it; multiplies it by
one number; samples it; hands it to a checkpoint's body; writes it; looks rows up in it; returns it; looks at its
shape, dtype or device; something else."""

End = Literal["recorded", "differentiated", "inside", "unrecorded", "other"]
"""Where a value ends up. In a read, of which the gradients

- reach the value (``recorded``);
- reach it as what `torch.func.grad` differentiates by (``differentiated``);
- flow inside of a `torch.func.grad` alone, which stands under ``no_grad`` and differentiates by something else
  (``inside``);
- reach it by no way: ``no_grad`` or ``detach`` lies on it (``unrecorded``);

or in something else that needs the value (``other``)."""

READS: frozenset[End] = frozenset(("recorded", "differentiated", "inside", "unrecorded"))
"""The ends that are reads."""

GRADIENTS: frozenset[End] = frozenset(("recorded", "differentiated"))
"""Those by which the value gets a gradient: the reads that are trained."""


@dataclass(frozen=True, eq=False)
class Place:
    """A node that holds a weight's value, or a view or a sample of it.

    Attributes:
        module: the graph, or checkpoint body, that it stands in.
        node: the node.
        steps: its uses, in no order.
    """

    module: fx.GraphModule
    node: fx.Node
    steps: tuple[Step, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """A use of the value at a place.

    Attributes:
        node: what uses it.
        kind: how.
        places: where the value goes on: a view or a sample itself, the placeholders in a body.
        mode: whether gradients are recorded there.
    """

    node: fx.Node
    kind: Kind
    places: tuple[Place, ...] = ()
    mode: Mode = RECORDED

    @cached_property
    def ends(self) -> frozenset[End]:
        """Where the value ends up by way of this use; nothing, where only its shape, dtype or device are looked at."""
        if self.kind == "read":
            return frozenset((self.end_of("recorded" if self.mode.outside else "inside"),))
        if self.kind == "metadata":
            return frozenset()
        if not self.places:
            return frozenset() if self.kind == "body" else frozenset(("other",))
        return frozenset(self.end_of(end) for place in self.places for step in place.steps for end in step.ends)

    def end_of(self, further: End) -> End:
        """What an end that the value has from here on is for the value in front of this use."""
        if further in ("recorded", "inside"):
            if self.kind != "body" and not (self.mode.enabled and operations.is_recorded(self.node)):
                return "unrecorded"
            if operations.is_differentiated_by(self.node):
                return "differentiated"
        return further

    @cached_property
    def leads_to_read(self) -> bool:
        """Whether it is a read, or the value goes on to one."""
        return not self.ends.isdisjoint(READS)


def walk(module: fx.GraphModule, node: fx.Node, modes: Modes = MappingProxyType({})) -> Place:
    """Follow the value of a node to everything that uses it.

    Args:
        module: the graph, or checkpoint body, that it stands in.
        node: the node.
        modes: those of the whole graph's nodes; without one gradients are recorded.
    """
    return Place(module, node, tuple(_step(module, user, node, modes) for user in node.users))


def _step(module: fx.GraphModule, user: fx.Node, value: fx.Node, modes: Modes) -> Step:
    mode = modes.get(user, Mode(enabled=True))
    body = body_of(module, user)
    if body is not None:
        inside = (walk(body, placeholder, modes) for placeholder in placeholders_of(body, user, value))
        return Step(user, "body", tuple(inside), mode)
    kind = _kind(user, value)
    onward = (walk(module, user, modes),) if kind in ("view", "scaled", "sample") else ()
    return Step(user, kind, onward, mode)


def _kind(user: fx.Node, value: fx.Node) -> Kind:
    if is_sample(user):
        return "sample"
    if operations.is_read(user, value):
        return "read"
    if operations.is_in_place(user, value):
        return "in_place"
    if operations.is_transparent(user, value):
        return "view"
    if operations.is_scaled(user, value):
        return "scaled"
    if operations.is_embedding(user, value):
        return "embedding"
    if user.op == "output":
        return "output"
    return "metadata" if operations.is_metadata(user, value) else "other"


def samples(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a rewritten graph that sample a weight, those in bodies too."""
    return [node for one in graphs(module) for node in one.graph.nodes if is_sample(node)]
