"""Which elements of a weight are kept: N of M along one side of its matrices, or whole rows or columns.

Nothing here depends on the order in which a device adds or compares. Magnitudes are compared by their bits, and the
scores of rows and columns are sums of integers; so training, evaluation, an export and every rank have one mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .blocks import matrix_shape
from .float32 import MAGNITUDE
from .primitives import Primitives, TorchPrimitives, Value

_SCORE_BITS = 62
"""Bits that the score of a row or column may have."""

_PART_ELEMENTS = 2**22
"""Elements whose squares are added together: bounds the memory taken, 16 bytes each."""


def rank_in_group(p: Primitives, own: Value, position: Value, other: Callable[[int], Value], size: int) -> Value:
    """How many elements of its group come before an element: the larger ones, and those as large in front of it.

    Args:
        p: the operations to write it in.
        own: int32, the bits of the element's magnitude; a NaN's lie above all others.
        position: int32, of the element in its group.
        other: the bits of the magnitude at a position.
        size: of a group.

    Returns:
        int32, 0 to ``size - 1``, each of them once in a group.
    """
    rank: Value = 0
    for k in range(size):
        # Of one in front, as large is enough: for integers, own - 1 < other.
        bound = p.isub(own, p.iselect(p.ilt(k, position), 1, 0))
        rank = p.iadd(rank, p.iselect(p.ilt(bound, other(k)), 1, 0))
    return rank


def element_mask(w: torch.Tensor, batch_dims: int, kept: int, of: int, *, over_rows: bool) -> torch.Tensor:
    """Whether each element is among the ``kept`` largest of its group of ``of`` consecutive ones.

    Args:
        w: float32, bfloat16 or float16.
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        kept, of: how many are kept, of how many.
        over_rows: groups run over rows, which lie below one another; else over columns. ``of`` divides that side.

    Returns:
        bool, shape and strides of ``w``. Of elements that are as large the first is kept.
    """
    p = TorchPrimitives()
    matrices, rows, cols = matrix_shape(w.shape, batch_dims)
    magnitude = p.iand(p.float_bits(w.detach().to(torch.float32).reshape(matrices, rows, cols)), MAGNITUDE)
    along = magnitude.transpose(1, 2) if over_rows else magnitude
    groups = along.reshape(*along.shape[:2], along.shape[2] // of, of)
    position = torch.arange(of, dtype=torch.int32, device=w.device)
    rank = rank_in_group(p, groups, position, lambda k: groups[..., k : k + 1], of)
    found = (rank < kept).reshape(along.shape)
    found = found.transpose(1, 2) if over_rows else found
    return torch.empty_like(w, dtype=torch.bool).copy_(found.reshape(w.shape))


def group_shape(shape: Sequence[int], batch_dims: int, *, rows: bool) -> list[int]:
    """The shape of what has a value for each row, or for each column, and goes with the weight.

    Of a convolution's weight (out, in, kh, kw) a column is one input channel, with its whole window.
    """
    side = batch_dims if rows else batch_dims + 1
    return [n if dim < batch_dims or dim == side else 1 for dim, n in enumerate(shape)]


def group_scores(w: torch.Tensor, batch_dims: int, *, rows: bool) -> torch.Tensor:
    """The square of the L2 norm of each row or column, in a unit that all of a matrix have in common.

    Squares are exact in float64. They are cut to multiples of the unit, and the integers are added, in whatever order:
    with ``c`` elements a group the unit is ``2**-62 c`` of the square of a power of two above the matrix's maximum.

    Args:
        w, batch_dims: as in `element_mask`.
        rows: of each row, else of each column.

    Returns:
        int64, (matrices, rows or columns); the largest there is for a group with a NaN or an Inf.
    """
    matrices, height = matrix_shape(w.shape, batch_dims)[:2]
    across = w.shape[batch_dims + 1]
    y = w.detach().reshape(matrices, height, across, -1)
    maximum = torch.zeros(matrices, dtype=torch.float32, device=w.device)
    for part in y.split(_lines(y), 1):
        finite = torch.where(part.isfinite(), part, 0).abs().to(torch.float32)
        maximum = torch.maximum(maximum, finite.amax((1, 2, 3)))
    counted = y.shape[3] * (across if rows else height)
    bits = _SCORE_BITS - max(counted - 1, 0).bit_length()
    exponent = torch.frexp(maximum)[1]
    unit = torch.ldexp(torch.ones_like(maximum, dtype=torch.float64), -exponent)[:, None, None, None]
    sums, broken = [], []
    for part in y.split(_lines(y), 1):
        finite = part.isfinite()
        scaled = torch.where(finite, part, 0).to(torch.float64) * unit
        squares = (scaled * scaled * 2.0**bits).to(torch.int64)
        dims = (2, 3) if rows else (1, 3)
        sums.append(squares.sum(dims))
        broken.append((~finite).any(3).any(2 if rows else 1))
    if rows:
        score, wrong = torch.cat(sums, 1), torch.cat(broken, 1)
    else:
        score, wrong = torch.stack(sums).sum(0), torch.stack(broken).any(0)
    return torch.where(wrong, torch.iinfo(torch.int64).max, score)


def _lines(y: torch.Tensor) -> int:
    return max(_PART_ELEMENTS // max(y.shape[0] * y.shape[2] * y.shape[3], 1), 1)


def group_mask(w: torch.Tensor, batch_dims: int, pruned: int | torch.Tensor, *, rows: bool) -> torch.Tensor:
    """Whether each row or column is kept: all but the ``pruned`` ones of each matrix with the smallest norm.

    Args:
        w, batch_dims: as in `element_mask`.
        pruned: how many rows, or columns, of each matrix are not kept; a tensor of one number, or a number.
        rows: whether rows are pruned, else columns.

    Returns:
        bool, of `group_shape`. Of groups whose scores are the same the first is kept.
    """
    scores = group_scores(w, batch_dims, rows=rows)
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return (rank < scores.shape[1] - pruned).reshape(group_shape(w.shape, batch_dims, rows=rows))


def keep(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``x`` where the mask is set, else 0: shape, strides and dtype of ``x``."""
    return torch.empty_like(x).copy_(torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)))
