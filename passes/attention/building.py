"""New nodes of Dynamo's graph, written as the calls that they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gws_compile.ops import round_operand  # noqa: F401  (registers the operator)
from gws_compile.ops.sample_arguments import RoundArguments
from gws_compile.settings.attention import AttentionOperands
from gws_compile.settings.operands import Operand
from gws_compile.torch_internals.graphs import enter_autocast, exit_autocast

Value = Any
"""A value of the graph: what is called on it becomes a node."""


class Builder:
    """Writes operations in front of a node; they have its place in the code.

    Args:
        node: the node.
        settings: how operands are rounded.
        clock: the clock's node, where a schedule has attention in high precision at times.
        switch: its bit of the clock; 0 for no schedule.
        dtype: what autocast converts the node's operands to; None where it is off.
    """

    def __init__(
        self, node: fx.Node, settings: AttentionOperands, clock: fx.Node | None, switch: int, dtype: torch.dtype | None
    ) -> None:
        self.settings = settings
        self.dtype = dtype
        self._node = node
        self._graph = node.graph
        self._tracer = fx.proxy.GraphAppendingTracer(node.graph)
        self._clock = clock
        self._switch = switch
        self._before = set(node.graph.nodes)

    def value(self, node: fx.Node | None) -> Value:
        """A node's value; under autocast in its dtype."""
        if node is None:
            return None
        proxy = fx.Proxy(node, self._tracer)
        return proxy if self.dtype is None else proxy.to(self.dtype)

    def given(self, value: object) -> Value:
        """An argument as it is: a node's value, or whatever else."""
        return fx.Proxy(value, self._tracer) if isinstance(value, fx.Node) else value

    def round(self, operand: Operand | None, value: Value, batch_dims: int, *, over_rows: bool) -> Value:
        """An operand, rounded.

        Args:
            operand: how; None to leave it.
            value: its matrices.
            batch_dims: how many leading dims count them.
            over_rows: their rows are summed over, not their columns.
        """
        if operand is None:
            return value
        arguments = RoundArguments(
            x=value.node,
            key=None,
            clock=self._clock if self._switch else None,
            batch_dims=batch_dims,
            fmt=operand.element.spec,
            block=operand.side_block(rows=over_rows),
            scale=operand.rule,
            rounding="nearest",
            place=0,
            switch=self._switch,
        )
        node = self._graph.call_function(torch.ops.gws.round_operand.default, arguments.call())
        return fx.Proxy(node, self._tracer)

    def without_autocast(self, device_type: str) -> fx.Node:
        """Begin a region without autocast."""
        return enter_autocast(self._graph, device_type, enabled=False)

    def end(self, region: fx.Node) -> None:
        """End it."""
        exit_autocast(self._graph, region)

    def finish(self) -> None:
        """Give the new nodes the place of the node that they stand for."""
        meta = {k: v for k, v in self._node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        for node in self._graph.nodes:
            if node not in self._before:
                node.meta.update(meta)
