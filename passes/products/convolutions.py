"""Which operands a convolution has in ATen, and which of their sides its three products sum over."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from gws_compile.torch_internals.graphs import fake_value

FORWARD = "convolution"
BACKWARD = "convolution_backward"

GRADIENT, INPUT, WEIGHT, MASK = 0, 1, 2, 10
"""Positions of the arguments of the backward."""


class Convolution(NamedTuple):
    """What is said of a convolution beside its operands.

    Attributes:
        groups: that do not see one another.
        transposed: the weight is (in, out, ...): what the forward sums over are its rows.
        of_window_alone: each output sums over one channel of the input, and one of the window's places each.
    """

    groups: int
    transposed: bool
    of_window_alone: bool


def convolution_of(node: fx.Node, *, backward: bool) -> Convolution:
    """What is said of a convolution, or of its backward, by its arguments."""
    transposed, groups = node.args[7:10:2] if backward else node.args[6:9:2]
    weight = fake_value(node.args[WEIGHT if backward else 1])
    assert isinstance(weight, torch.Tensor)
    assert isinstance(groups, int)
    channels = weight.shape[0] // groups if transposed else weight.shape[1]
    return Convolution(groups, bool(transposed), groups > 1 and channels == 1)


def split_backward(node: fx.Node) -> dict[str, fx.Node]:
    """A backward apart, each gradient in an operation of its own: ``"dgrad"``, ``"wgrad"``, ``"bias"``.

    The gradients that are not asked for are left out. What read the old node's results reads theirs.
    """
    graph, mask, target = node.graph, node.args[MASK], node.target
    assert callable(target)
    assert isinstance(mask, (list, tuple))
    parts = {}
    for place, kind in enumerate(("dgrad", "wgrad", "bias")):
        if not mask[place]:
            continue
        alone = [place == other for other in range(3)]
        with graph.inserting_before(node):
            part = graph.call_function(target, (*node.args[:MASK], alone), dict(node.kwargs))
        part.meta = dict(node.meta)
        value = node.meta.get("val")
        if value is not None:
            part.meta["val"] = tuple(one if here else None for one, here in zip(value, alone, strict=True))
        parts[kind] = part
        for user in list(node.users):
            if user.args[1] == place:
                user.replace_input_with(node, part)
    if not node.users:
        graph.erase_node(node)
    return parts
