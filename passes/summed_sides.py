"""Which side of a weight's matrices a product sums over: their rows or their columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gws_compile.torch_internals.graphs import example_value

from . import operations
from .einsum import einsum_of_two
from .operands import operands

_FIRST = frozenset("self mat1 batch1 a mat_a input".split())


def sums_over_rows(weight: torch.Tensor, batch_dims: int, operand: torch.Tensor, dim: int) -> bool | None:
    """Whether a dim of an operand, which is a view of a weight or of its sample, lies along the rows of its matrices.

    It is told by strides: those of rows and of columns differ, whatever the view.

    Args:
        weight: the weight, or what lies as it does.
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        operand: the view.
        dim: of the operand.

    Returns:
        None where it cannot be told.
    """
    if operand.ndim < 2 or weight.ndim < batch_dims + 2:
        return None
    size, stride = operand.shape[dim], operand.stride(dim)
    rows, cols = weight.shape[batch_dims], weight.shape[-1]
    of_rows, of_cols = stride == weight.stride(batch_dims), stride == weight.stride(-1)
    if of_rows and of_cols:  # a side of one element
        of_rows, of_cols = size == rows, size == cols
    return of_rows if of_rows != of_cols else None


def read_sums_over_rows(weight: Any, batch_dims: int, node: fx.Node, operand: fx.Node) -> bool | None:
    """Whether a read of a weight in Dynamo's graph sums over its rows, where that can be told.

    Args:
        weight: the example value of the weight.
        batch_dims: of the read.
        node: the read.
        operand: what it takes of the weight.
    """
    name = operations.name_of(node)
    if name.startswith("conv_transpose") or name == "conv_tbc":
        return True
    value = example_value(operand)
    if not isinstance(value, torch.Tensor) or not isinstance(weight, torch.Tensor):
        return None
    if name == "einsum":
        dim = _einsum_dim(node, operand)
    elif name in operations.PRODUCTS or name.endswith("grouped_mm"):
        given = next((one for one in operands(node) if one.value is operand), None)
        dim = None if given is None else -1 if given.name in _FIRST else -2
    elif name in ("linear", "multi_head_attention_forward") or name.endswith("_cell"):
        dim = -1
    else:
        return False
    return None if dim is None or value.ndim < 2 else sums_over_rows(weight, batch_dims, value, dim)


def _einsum_dim(node: fx.Node, operand: fx.Node) -> int | None:
    """The dim of an operand of two that an einsum sums over, if it is one."""
    einsum = einsum_of_two(node)
    if einsum is None or len(einsum.summed) != 1:
        return None
    mine = einsum.letters[0 if einsum.values[0] is operand else 1]
    return mine.index(einsum.summed) - len(mine)
