"""The products of experts as transformers computes them where torch's own grouped product does not serve."""

from __future__ import annotations

import operator

from torch import fx

FORWARD = "grouped_mm_fallback"
BACKWARD = "grouped_mm_fallback_backward"

INPUT, WEIGHT, GRADIENT = 0, 1, 3
"""Positions of the arguments of the backward: input (tokens, in), weight (experts, in, out), offsets, gradient."""


def split_backward(node: fx.Node) -> dict[str, fx.Node]:
    """A backward, which gives both gradients, twice: ``"dgrad"`` and ``"wgrad"``, each for one of them.

    What reads a result of the old node reads that of its own; a gradient that nothing reads is left out.
    """
    parts: dict[str, fx.Node] = {}
    target = node.target
    assert callable(target)
    for place, kind in enumerate(("dgrad", "wgrad")):
        users = [user for user in node.users if user.target is operator.getitem and user.args[1] == place]
        if not users:
            continue
        with node.graph.inserting_before(node):
            part = node.graph.call_function(target, node.args, dict(node.kwargs))
        part.meta = dict(node.meta)
        parts[kind] = part
        for user in users:
            user.replace_input_with(node, part)
    if not node.users:
        node.graph.erase_node(node)
    return parts
