"""Find the weight reads: parameters that reach a matrix product or a convolution as an operand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import fx

from gws_compile.numerics.shards import ShardRange
from gws_compile.torch_internals.distributed import shard_range
from gws_compile.torch_internals.graphs import example_value, is_higher_order, placeholder_source
from gws_compile.torch_internals.stack_trace import source_of
from gws_compile.weight_names import is_parameter_source, qualified_name

from . import operations
from .graph_walk import Place, walk
from .parameter_constants import parameters_alone, reader_of
from .rewrite_context import Rewrite
from .weights import Read, Use, Weight


def find_reads(rewrite: Rewrite, *, is_table: Callable[[Weight], bool]) -> None:
    """List the graph's floating-point parameters of two or more dims, each with its uses.

    Provides `Rewrite.weights`; the graph is not changed. A parameter is followed through views, transposes, splits,
    casts and concatenations, and into the bodies of activation checkpoints, to whatever computes with it.

    Args:
        rewrite: the graph.
        is_table: whether an earlier graph looks rows up in a weight.
    """
    rewrite.weights = _parameters(rewrite.module)
    constants = parameters_alone(rewrite.module)
    for weight in rewrite.weights:
        _note_uses(weight, weight.place, constants)
        weight.embedded |= is_table(weight)


def _parameters(gm: fx.GraphModule) -> list[Weight]:
    weights = []
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = example_value(node)
        source = placeholder_source(node)
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or not value.is_floating_point():
            continue
        if source is None or not (is_parameter_source(source) or _typed_parameter(node)):
            continue
        reason, shard = None, None
        try:
            held = shard_range(value)
            shard = None if held is None else ShardRange(tuple(value.shape), *held)
        except ValueError as error:
            reason = f"a DTensor with {error}: only Shard and Replicate are sampled"
        weights.append(
            Weight(
                place=walk(gm, node),
                position=position,
                name=qualified_name(source),
                shape=tuple(value.shape),
                dtype=value.dtype,
                device=value.device,
                trainable=value.requires_grad,
                shard=shard,
                reason=reason,
            )
        )
    return weights


def _typed_parameter(node: fx.Node) -> bool:
    return isinstance(node.type, type) and issubclass(node.type, torch.nn.Parameter)


def _note_uses(weight: Weight, place: Place, constants: set[fx.Node], batch_dims: int = 0) -> None:
    """Write down the uses of a weight; ``batch_dims`` of the value at ``place`` belong to vmap."""
    for step in place.steps:
        node = step.node
        if step.kind == "read" and not _computes(place.module, node, constants):
            op = operations.name_of(node)
            dims = batch_dims if op in operations.CONVOLUTIONS else len(weight.shape) - 2
            weight.reads.append(Read(node, op, dims, _location(node)))
        elif step.kind == "in_place" or operations.is_in_place(node, place.node):  # a product may write it too
            weight.written = True
        elif step.kind == "embedding":
            weight.embedded = True
        elif step.kind == "output":
            weight.other_uses.append(Use("the graph's output", "", "plain"))
        elif step.kind in ("read", "other"):
            weight.other_uses.append(_other_use(place.module, node, constants))
        dims = batch_dims + (operations.name_of(node) == "_add_batch_dim")
        for onward in step.places:
            _note_uses(weight, onward, constants, dims)


def _computes(module: fx.GraphModule, node: fx.Node, constants: set[fx.Node]) -> bool:
    """Whether a matrix product makes a weight of parameters alone, such as the product of two adapters."""
    is_product = operations.name_of(node) in operations.PRODUCTS and node in constants
    return is_product and bool(reader_of(module, node, constants, anywhere=False))


def _other_use(module: fx.GraphModule, node: fx.Node, constants: set[fx.Node]) -> Use:
    name = operations.name_of(node)
    kind: Literal["plain", "nested", "unknown"] = "unknown"
    if is_higher_order(node):
        kind = "nested"
    elif name.removesuffix("_") in operations.OTHERS or name in operations.READS:
        kind = "plain"
    reader = reader_of(module, node, constants, anywhere=name not in operations.READS)
    return Use(name, _location(node), kind, reader)


def _location(node: fx.Node) -> str:
    return source_of(node).location.rpartition(" in ")[0]
