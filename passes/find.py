"""Find the weight reads: parameters that reach a matrix product or a convolution as an operand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import fx

from gws_compile import torch_internals
from gws_compile.config import Config
from gws_compile.names import is_parameter_source, qualified_name
from gws_compile.sharding import ShardRange
from gws_compile.source_lines import source_of

from . import operations
from .computed import operand_placeholders, parameters_alone, reader_of
from .weights import Read, Use, Weight, known_table, set_weights


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
    constants = parameters_alone(gm)
    for weight in weights:
        _Follower(weight, constants).follow(gm, weight.node)
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


class _Follower:
    """Records every use of a weight."""

    def __init__(self, weight: Weight, constants: set[fx.Node]) -> None:
        self._weight = weight
        self._constants = constants

    def follow(self, gm: fx.GraphModule, start: fx.Node, batch_dims: int = 0) -> None:
        """Look at the users of ``start``, the weight or a view of it; ``batch_dims`` of it belong to vmap."""
        weight = self._weight
        for node in start.users:
            body = torch_internals.checkpoint_body(node)
            if body is not None:
                inner = getattr(gm, str(body.target))
                for placeholder in operand_placeholders(inner, node, start):
                    self.follow(inner, placeholder, batch_dims)
            elif operations.is_read(node, start) and not self._computes(gm, node):
                op = operations.name_of(node)
                dims = batch_dims if op in operations.CONVOLUTIONS else len(weight.shape) - 2
                weight.reads.append(Read(node, op, dims, _location(node)))
            elif operations.is_in_place(node, start):
                weight.written = True
            elif operations.is_transparent(node, start):
                self.follow(gm, node, batch_dims + (operations.name_of(node) == "_add_batch_dim"))
            elif operations.is_embedding(node, start):
                weight.embedded = True
            elif node.op == "output":
                weight.other_uses.append(Use("the graph's output", "", "plain"))
            elif not operations.is_metadata(node, start):
                self._record_other(gm, node)

    def _computes(self, gm: fx.GraphModule, node: fx.Node) -> bool:
        """Whether a matrix product makes a weight of parameters alone, such as the product of two adapters."""
        is_product = operations.name_of(node) in operations.PRODUCTS and node in self._constants
        return is_product and bool(reader_of(gm, node, self._constants, anywhere=False))

    def _record_other(self, gm: fx.GraphModule, node: fx.Node) -> None:
        name = operations.name_of(node)
        kind: Literal["plain", "nested", "unknown"] = "unknown"
        if torch_internals.is_higher_order(node):
            kind = "nested"
        elif name.removesuffix("_") in operations.OTHERS or name in operations.READS:
            kind = "plain"
        reader = reader_of(gm, node, self._constants, anywhere=name not in operations.READS)
        self._weight.other_uses.append(Use(name, _location(node), kind, reader))


def _location(node: fx.Node) -> str:
    return source_of(node).location.rpartition(" in ")[0]
