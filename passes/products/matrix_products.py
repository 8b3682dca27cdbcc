"""Which operands a matrix product has in ATen, and which of their sides it sums over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from gws_compile.torch_internals.graphs import fake_value

from . import grouped_fallback


@dataclass(frozen=True)
class Operand:
    """An operand as an operation takes it.

    Attributes:
        position: among the operation's arguments.
        batch_dims: leading dims that count matrices.
        over_rows: the product sums over the rows of the matrices, not over their columns.
        ragged: what is summed over belongs to several products, one behind the other: the tokens of several experts.
    """

    position: int
    batch_dims: int
    over_rows: bool
    ragged: bool = False


_DENSE = {
    "mm": (0, 0),
    "addmm": (1, 0),
    "bmm": (0, 1),
    "baddbmm": (1, 1),
}
"""Operation -> position of the first of its two operands, and how many dims count matrices."""

GROUPED = "_grouped_mm"

LEFT_ALONE = frozenset("mv addmv dot vdot _trilinear linear matmul mkldnn_rnn_layer _thnn_fused_lstm_cell".split())
"""Products that are not taken apart."""

ATTENTION = frozenset(
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_cudnn_attention_backward "
    "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_fused_attention_overrideable_backward "
    "_scaled_dot_product_attention_math_for_mps _flash_attention_forward _flash_attention_backward "
    "_efficient_attention_forward _efficient_attention_backward flex_attention flex_attention_backward".split()
)
"""Attention as one operation."""


def name_of(node: fx.Node) -> str:
    """The bare name of an operation: ``mm`` for ``aten.mm.default``; empty for what calls none."""
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", node.target)
    name: str = getattr(packet, "__name__", None) or str(packet)
    return name


def operands_of(node: fx.Node) -> tuple[Operand, Operand] | None:
    """The two operands of a matrix product; None for every other operation."""
    name = name_of(node)
    if name in _DENSE:
        first, dims = _DENSE[name]
        return Operand(first, dims, False), Operand(first + 1, dims, True)
    if name == grouped_fallback.FORWARD:
        return Operand(grouped_fallback.INPUT, 0, False), Operand(grouped_fallback.WEIGHT, 1, True)
    if name == GROUPED:
        counts = [value.ndim - 2 for value in map(fake_value, node.args[:2]) if isinstance(value, torch.Tensor)]
        if len(counts) == 2:
            ragged = counts == [0, 0]
            return Operand(0, counts[0], False, ragged), Operand(1, counts[1], True, ragged)
    return None
