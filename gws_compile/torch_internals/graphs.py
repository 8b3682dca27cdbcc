"""The graphs that Dynamo hands to a backend: what it and AOTAutograd write on nodes, and read there."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from .lookup import find


def placeholder_source(node: fx.Node) -> str | None:
    """Where Dynamo read a graph input from, such as ``L['self']._modules['fc']._parameters['weight']``, if known.

    Relies on ``node._dynamo_source`` (kept under DDP's graph splitting) and ``meta["grapharg"].source``.
    Checked on torch 2.11 to 2.15.
    """
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return None
    name = getattr(source, "name", None)
    return name() if callable(name) else name


def example_value(node: fx.Node) -> Any:
    """The fake value that Dynamo computed for a node; None if it has none.

    Relies on ``meta["example_value"]``. Checked on torch 2.11 to 2.15.
    """
    return node.meta.get("example_value")


def tensor_subclass(node: fx.Node) -> type | None:
    """The class of an input whose operations are its own: one with tensors inside, or with ``__torch_function__``.

    Relies on ``torch.utils._python_dispatch.is_traceable_wrapper_subclass``, and on ``fx.Node.type`` being the class of
    the real input, whose fake value is a plain one where it has no tensors inside. Checked on torch 2.11 to 2.15.

    Returns:
        The class; None for an ordinary tensor or Parameter.
    """
    value = example_value(node)
    if find("torch.utils._python_dispatch", "is_traceable_wrapper_subclass")(value):
        return type(value)
    kind = node.type
    if not isinstance(kind, type) or not issubclass(kind, torch.Tensor):
        return None
    plain = [
        getattr(one.__torch_function__, "__func__", one.__torch_function__)
        for one in (torch.Tensor, torch.nn.Parameter)
    ]
    own = kind.__torch_function__
    return None if getattr(own, "__func__", own) in plain else kind


def set_gradients(graph: fx.Graph, enabled: bool) -> fx.Node:
    """Add a node that switches gradients on or off for those behind it, as ``no_grad`` in the model does.

    Relies on ``torch._C._set_grad_enabled``. Checked on torch 2.11 to 2.15.
    """
    return graph.call_function(find("torch._C", "_set_grad_enabled"), (enabled,))


def add_placeholder(graph: fx.Graph, name: str, example_value: object, *, before: fx.Node | None = None) -> fx.Node:
    """Append an input that Dynamo knows nothing of, behind the last placeholder, or in front of one.

    Relies on AOTAutograd taking ``_dynamo_source = None`` for an input without a source.
    Checked on torch 2.11 to 2.15.
    """
    last = [n for n in graph.nodes if n.op == "placeholder"]
    where = graph.inserting_after(last[-1]) if last else graph.inserting_before(next(iter(graph.nodes)))
    if before is not None:
        where = graph.inserting_before(before)
    with where:
        node = graph.placeholder(name)
    node.meta["example_value"] = example_value
    node._dynamo_source = None
    return node


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph may be changed: new nodes, same submodules and attributes, Dynamo's metadata carried over.

    Relies on ``GraphModule.meta``, ``_param_name_to_source``, each placeholder's ``_dynamo_source`` and
    ``meta["grapharg"]``, and ``Graph._codegen``. Checked on torch 2.11 to 2.15.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    old_output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    graph.output(output).meta.update(old_output.meta)
    for old, new in mapping.items():
        # It has a weak reference to the input, for as long as the graph is kept; and swap_tensors refuses such tensors.
        given = new.meta.pop("grapharg", None)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        elif given is not None:
            new._dynamo_source = given.source
    graph._codegen = gm.graph._codegen
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copied._param_name_to_source = gm._param_name_to_source
    return copied


def checkpoint_body(node: fx.Node) -> fx.Node | None:
    """The ``get_attr`` of the body that an activation-checkpoint node calls; None for every other node.

    Relies on ``torch._higher_order_ops.wrap.tag_activation_checkpoint``. Checked on torch 2.11 to 2.15.
    """
    tag = find("torch._higher_order_ops.wrap", "tag_activation_checkpoint")
    if node.op == "call_function" and node.target is tag:
        body = node.args[0]
        assert isinstance(body, fx.Node)
        return body
    return None


def is_higher_order(node: fx.Node) -> bool:
    """Whether a node calls a higher-order operator (its graph lies in a submodule).

    Relies on ``torch._ops.HigherOrderOperator``. Checked on torch 2.11 to 2.15.
    """
    return isinstance(node.target, find("torch._ops", "HigherOrderOperator"))


def mark_recompute(node: fx.Node, group: int) -> None:
    """Have the partitioner compute the node again in backward instead of saving it.

    Relies on ``meta["recompute"]`` and ``meta["ac_graph_id"]`` as activation checkpointing sets them.
    Checked on torch 2.11 to 2.15.
    """
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    node.meta["ac_graph_id"] = group


def graph_break(gm: fx.GraphModule) -> tuple[str, list[traceback.FrameSummary]] | None:
    """Why Dynamo ended a graph early, and the user's stack there; None for one that ends where its function does.

    Relies on ``GraphModule.compile_subgraph_reason``, which `torch._dynamo.explain` reads too.
    Checked on torch 2.11 to 2.15.
    """
    cause = getattr(gm, "compile_subgraph_reason", None)
    if cause is None or not getattr(cause, "graph_break", False):
        return None
    return str(cause.reason), list(cause.user_stack)


def is_tangent(node: fx.Node) -> bool:
    """Whether a node of AOTAutograd's joint graph is a gradient that comes in.

    Relies on the names of its placeholders, ``tangents_1`` and so on. Checked on torch 2.11 to 2.15.
    """
    return node.op == "placeholder" and "tangents" in str(node.target)


def sequence_number(node: fx.Node) -> int | None:
    """Autograd's number of an operation, which a product of the backward shares with that of the forward.

    Relies on ``meta["seq_nr"]``. Checked on torch 2.11 to 2.15.
    """
    number: int | None = node.meta.get("seq_nr")
    return number


def fake_value(node: object) -> Any:
    """The fake value of a node that AOTAutograd traced; None for what is no node.

    Relies on ``meta["val"]``. Checked on torch 2.11 to 2.15.
    """
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def emit(graph: fx.Graph, like: fx.Node, target: Any, args: tuple[Any, ...], *, in_backward: bool) -> fx.Node:
    """Add an operation to AOTAutograd's graph, where nodes are being inserted.

    Args:
        graph: the graph.
        like: an operation that it belongs to, whose place in the code, and in a checkpoint, it has.
        target: the operation.
        args: its arguments.
        in_backward: it is left to the backward, also where the forward could compute it and keep the result.

    Relies on ``meta["val"]``, ``meta["partitioner_tag"]`` and the marks of checkpoints. Checked on torch 2.11 to 2.15.
    """
    node = graph.call_function(target, args)
    node.meta = {key: like.meta[key] for key in _CARRIED if key in like.meta}
    if node.meta.get("recompute") in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE):
        node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE  # it is the operation that is to be kept
    given = fx.map_arg(args, lambda one: one.meta["val"])
    with torch.no_grad():
        node.meta["val"] = target(*given)
    if in_backward:
        node.meta["partitioner_tag"] = "must_be_in_backward"
    return node


_CARRIED = (
    "stack_trace",
    "nn_module_stack",
    "fwd_nn_module_stack",
    "seq_nr",
    "partitioner_tag",
    "recompute",
    "ac_graph_id",
    "autograd_backward",
)
"""What an operation has of the one that it belongs to."""


def enter_autocast(graph: fx.Graph, device_type: str, *, enabled: bool) -> fx.Node:
    """Add a node that begins a region of autocast, or one without, as Dynamo writes it.

    Relies on ``torch.amp.autocast_mode._enter_autocast``. Checked on torch 2.11 to 2.15.
    """
    return graph.call_function(find("torch.amp.autocast_mode", "_enter_autocast"), (device_type, None, enabled, None))


def exit_autocast(graph: fx.Graph, region: fx.Node) -> fx.Node:
    """Add a node that ends a region of autocast.

    Relies on ``torch.amp.autocast_mode._exit_autocast``. Checked on torch 2.11 to 2.15.
    """
    return graph.call_function(find("torch.amp.autocast_mode", "_exit_autocast"), (region,))
