"""The way of a value through a graph: through views, into the bodies of activation checkpoints, to what uses it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import fx

from gws_compile.torch_internals.graphs import checkpoint_body, copy_graph_module

from . import operations

Kind = Literal["read", "view", "sample", "body", "in_place", "embedding", "output", "metadata", "other"]
"""What a node does with a value: multiplies or convolves with it; rearranges, converts or joins it; samples it; hands
it to a checkpoint's body; writes it; looks rows up in it; returns it; looks at its shape, dtype or device; something
else."""


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
    """

    node: fx.Node
    kind: Kind
    places: tuple[Place, ...] = ()

    @cached_property
    def leads_to_read(self) -> bool:
        """Whether it is a read, or the value goes on to one."""
        return self.kind == "read" or any(step.leads_to_read for place in self.places for step in place.steps)

    @cached_property
    def leads_only_to_reads(self) -> bool:
        """Whether nothing else that needs the value comes of it; a body counts as a whole."""
        if self.kind in ("read", "metadata", "body"):
            return True
        return self.kind == "view" and all(step.leads_only_to_reads for place in self.places for step in place.steps)


def walk(module: fx.GraphModule, node: fx.Node) -> Place:
    """Follow the value of a node to everything that uses it."""
    return Place(module, node, tuple(_step(module, user, node) for user in node.users))


def _step(module: fx.GraphModule, user: fx.Node, value: fx.Node) -> Step:
    body = body_of(module, user)
    if body is not None:
        return Step(user, "body", tuple(walk(body, placeholder) for placeholder in placeholders_of(body, user, value)))
    kind = _kind(user, value)
    return Step(user, kind, (walk(module, user),) if kind in ("view", "sample") else ())


def _kind(user: fx.Node, value: fx.Node) -> Kind:
    if user.target is torch.ops.gws.sample_weight.default:
        return "sample"
    if operations.is_read(user, value):
        return "read"
    if operations.is_in_place(user, value):
        return "in_place"
    if operations.is_transparent(user, value):
        return "view"
    if operations.is_embedding(user, value):
        return "embedding"
    if user.op == "output":
        return "output"
    return "metadata" if operations.is_metadata(user, value) else "other"


def body_of(module: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """The body that an activation-checkpoint node calls; None for every other node."""
    body = checkpoint_body(node)
    if body is None:
        return None
    inner: fx.GraphModule = getattr(module, str(body.target))
    return inner


def placeholders_of(body: fx.GraphModule, node: fx.Node, operand: fx.Node) -> list[fx.Node]:
    """The placeholders in a checkpoint's body that stand for an operand of the checkpoint's node."""
    placeholders = body.graph.find_nodes(op="placeholder")
    return [p for p, given in zip(placeholders, node.args[1:], strict=False) if given is operand]


def nodes(module: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, fx.Node]]:
    """Every node with the graph that it stands in, as they are run: a body's behind the node that calls it."""
    for node in module.graph.nodes:
        yield module, node
        body = body_of(module, node)
        if body is not None:
            yield from nodes(body)


def samples(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a rewritten graph that sample a weight, those in bodies too."""
    target = torch.ops.gws.sample_weight.default
    return [node for one in graphs(module) for node in one.graph.find_nodes(op="call_function", target=target)]


def graphs(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """A graph and the bodies of its checkpoints, each once."""
    yield from dict.fromkeys([module, *(inner for inner, _ in nodes(module))])


def copy_with_bodies(module: fx.GraphModule) -> fx.GraphModule:
    """A copy that may be changed, and so may the bodies of its checkpoints."""
    copied = copy_graph_module(module)
    bodies = (checkpoint_body(node) for node in copied.graph.nodes)
    for target in dict.fromkeys(str(body.target) for body in bodies if body is not None):
        setattr(copied, target, copy_with_bodies(getattr(copied, target)))
    return copied
