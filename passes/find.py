"""Find the weight reads: parameters that reach a matrix product or a convolution as an operand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from gws_compile import torch_internals
from gws_compile.config import Config
from gws_compile.names import is_parameter_source, qualified_name
from gws_compile.sharding import ShardRange

from . import operations
from .weights import Read, Weight, known_table, set_weights

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def find_weight_reads(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Config) -> fx.GraphModule:
    """List the graph's floating-point parameters of two or more dims, each with its uses.

    Provides `weights_of(gm)`; the graph is not changed. A parameter is followed through views, transposes, splits,
    casts and concatenations, and into the bodies of activation checkpoints, to whatever computes with it.

    Args:
        gm: Dynamo's graph, or a copy.
        example_inputs: its inputs; unused: they may be fake, so a parameter is known by its source.
        config: unused.
    """
    weights = _parameters(gm)
    for weight in weights:
        _follow(weight, gm, weight.node, direct=True)
        weight.embedded |= known_table(gm, weight)
    set_weights(gm, weights)
    return gm


def _parameters(gm: fx.GraphModule) -> list[Weight]:
    weights = []
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = torch_internals.example_value(node)
        source = torch_internals.placeholder_source(node)
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or not value.is_floating_point():
            continue
        if source is None or not (is_parameter_source(source) or _typed_parameter(node)):
            continue
        reason, shard = None, None
        try:
            held = torch_internals.shard_range(value)
            shard = None if held is None else ShardRange(tuple(value.shape), *held)
        except ValueError as error:
            reason = f"a DTensor with {error}: only Shard and Replicate are sampled"
        weights.append(
            Weight(
                node=node,
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


def _follow(weight: Weight, gm: fx.GraphModule, start: fx.Node, *, direct: bool) -> None:
    """Record every use of the value in ``start``; ``direct`` while it is the parameter itself, not a view of it."""
    for node in start.users:
        body = torch_internals.checkpoint_body(node)
        if body is not None:
            _follow_into(weight, gm, node, body, start, direct=direct)
        elif operations.is_read(node, start):
            op = operations.name_of(node)
            batch_dims = 0 if op in operations.CONVOLUTIONS else len(weight.shape) - 2
            weight.reads.append(Read(node, op, batch_dims, _location(node)))
        elif operations.is_in_place(node, start):
            weight.written = True
        elif operations.is_transparent(node, start):
            _follow(weight, gm, node, direct=False)
        elif operations.is_embedding(node, start):
            weight.embedded = True
        elif node.op == "output":
            weight.other_uses.append("the graph's output")
        elif not operations.is_metadata(node, start):
            weight.other_uses.append(operations.name_of(node))


def _follow_into(
    weight: Weight, gm: fx.GraphModule, node: fx.Node, body: fx.Node, start: fx.Node, *, direct: bool
) -> None:
    inner = getattr(gm, str(body.target))
    placeholders = inner.graph.find_nodes(op="placeholder")
    for operand, placeholder in zip(node.args[1:], placeholders, strict=False):
        if operand is start:
            _follow(weight, inner, placeholder, direct=direct)


def _location(node: fx.Node) -> str:
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""
