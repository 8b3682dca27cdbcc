"""The bodies of activation checkpoints, which belong to the graph that calls them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from gws_compile.torch_internals.graphs import add_placeholder, checkpoint_body, copy_graph_module, example_value


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


def as_operand(body: fx.GraphModule, node: fx.Node, given: fx.Node | None) -> fx.Node | None:
    """The placeholder inside a body for an outer node, which becomes an operand of the checkpoint if it is none yet."""
    if given is None:
        return None
    known = placeholders_of(body, node, given)
    if known:
        return known[0]
    node.args = (*node.args, given)
    return add_placeholder(body.graph, given.name, example_value(given))


def nodes(module: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, fx.Node]]:
    """Every node with the graph that it stands in, as they are run: a body's behind the node that calls it."""
    for node in module.graph.nodes:
        yield module, node
        body = body_of(module, node)
        if body is not None:
            yield from nodes(body)


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
