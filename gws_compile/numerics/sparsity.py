"""Which elements of a weight are kept: N of M along one side of its matrices, or whole rows or columns.

Nothing here depends on the order in which a device adds or compares. Magnitudes are compared by their bits, and the
scores of rows and columns are exact sums; so training, evaluation, an export and every rank have one mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .blocks import matrix_shape
from .float32 import MAGNITUDE
from .primitives import Primitives, TorchPrimitives, Value

_SCORE_BITS = 53
"""Bits of a float64's significand."""

_PART_ELEMENTS = 2**17
"""Elements whose squares are added together, about: they stay in a core's cache."""


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


def group_scores(w: torch.Tensor, batch_dims: int, *, rows: bool, size: int = 1) -> torch.Tensor:
    """The square of the L2 norm of each row or column, or of several, in a unit that all of a matrix have in common.

    Squares are exact in float64. They are cut to multiples of the unit, which is so large that no sum needs more than
    the 53 bits of a float64: then every addition is exact, in whatever order. With c elements a group the unit is about
    ``2**-51 c`` of the square of the matrix's maximum, at most four times as much.

    Args:
        w, batch_dims: as in `element_mask`.
        rows: of rows, else of columns.
        size: how many that lie side by side are a group.

    Returns:
        float64, (matrices, groups), whole numbers; Inf for a group with a NaN or an Inf.
    """
    matrices, height = matrix_shape(w.shape, batch_dims)[:2]
    across = w.shape[batch_dims + 1]
    y = w.detach().reshape(matrices, height, across, -1)
    dims = (2, 3) if rows else (1, 3)
    lines = max(_PART_ELEMENTS // max(matrices * across * y.shape[3], 1), 1)
    parts = torch.split(y, lines, 1)
    maxima = [part.abs().amax(dims).to(torch.float32) for part in parts]
    of_groups = torch.cat(maxima, 1) if rows else torch.stack(maxima).amax(0)
    # Of a group that is not finite the score is known: its maximum is not needed.
    exponent = torch.frexp(torch.where(of_groups.isfinite(), of_groups, 0).amax(1))[1]
    counted = size * y.shape[3] * (across if rows else height)
    half = (_SCORE_BITS - max(counted - 1, 0).bit_length()) // 2
    factor = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), half - exponent)[:, None, None, None]
    sums = []
    for part in parts:
        scaled = part.to(torch.float64) * factor
        sums.append(scaled.mul_(scaled).floor_().sum(dims))
    score = torch.cat(sums, 1) if rows else torch.stack(sums).sum(0)
    score = score.view(matrices, -1, size).sum(2)
    return torch.where(score.isfinite(), score, torch.inf)


def group_mask(
    w: torch.Tensor, batch_dims: int, pruned: int | torch.Tensor, *, rows: bool, size: int = 1
) -> torch.Tensor:
    """Whether each row or column is kept: all but the ``pruned`` groups of each matrix with the smallest norm.

    Args:
        w, batch_dims: as in `element_mask`.
        pruned: how many groups of each matrix are not kept; a tensor of one number, or a number.
        rows: whether groups are rows, else columns.
        size: of a group, see `group_scores`.

    Returns:
        bool, of `group_shape`. Of groups whose scores are the same the first is kept.
    """
    scores = group_scores(w, batch_dims, rows=rows, size=size)
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    kept = (rank < scores.shape[1] - pruned).repeat_interleave(size, 1)
    return kept.reshape(group_shape(w.shape, batch_dims, rows=rows))


def keep(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``x`` where the mask is set, else 0: shape, strides and dtype of ``x``."""
    return torch.empty_like(x).copy_(torch.where(mask.bool(), x, torch.zeros((), dtype=x.dtype, device=x.device)))
