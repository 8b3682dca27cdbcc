"""The clocks among a rewritten graph's inputs, for passes behind the one that has added them."""

from __future__ import annotations

import torch
from torch import fx

from gws_compile.numerics.spec import CLOCK_WORDS
from gws_compile.torch_internals.fake_tensors import fake_like
from gws_compile.torch_internals.graphs import add_placeholder

from .bodies import as_operand, body_of
from .rewrite_context import Rewrite


class Clocks:
    """Finds, or adds, the clock of a device, in a graph or in a checkpoint's body.

    Args:
        rewrite: the graph.
    """

    def __init__(self, rewrite: Rewrite) -> None:
        self._rewrite = rewrite
        self._callers: dict[fx.GraphModule, tuple[fx.GraphModule, fx.Node]] = {}
        self._note_callers(rewrite.module)

    def _note_callers(self, module: fx.GraphModule) -> None:
        for node in module.graph.nodes:
            body = body_of(module, node)
            if body is not None:
                self._callers[body] = (module, node)
                self._note_callers(body)

    def in_front_of(self, module: fx.GraphModule, node: fx.Node, example: torch.Tensor) -> fx.Node:
        """The clock of a tensor's device, in the graph or body that a node stands in."""
        if module in self._callers:
            outer, call = self._callers[module]
            inside = as_operand(module, call, self.in_front_of(outer, call, example))
            assert inside is not None
            return inside
        layout, graph = self._rewrite.layout, module.graph
        device = example.device
        placeholders = graph.find_nodes(op="placeholder")
        clocks = dict(zip(layout.positions, (p for p in placeholders if p.name.startswith("gws_clock")), strict=True))
        if device not in clocks:
            clock = fake_like(torch.zeros(CLOCK_WORDS, dtype=torch.int32, device=device), example)
            first_width = next((p for p in placeholders if p.name.startswith(("gws_bits", "gws_levels"))), None)
            clocks[device] = add_placeholder(graph, f"gws_clock_{len(clocks)}", clock, before=first_width)
            self._rewrite.add_clock(device)
        found: fx.Node = clocks[device]
        return found
