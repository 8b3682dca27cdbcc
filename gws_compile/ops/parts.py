"""A weight part by part, in an order in which no part of it needs more than a few rows of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..numerics.blocks import clamped, matrix_shape
from ..numerics.spec import SampleSpec
from .eager import maximum_eager


@dataclass(frozen=True)
class WeightPart:
    """Some whole rows of some matrices of a weight; no block in it is cut.

    Attributes:
        first: the first matrix.
        start: the first row.
        w: (matrices, rows, columns).
        learned: the width parameters of its blocks, or the one of the weight; None for a fixed width.
        maxima: what `sample_eager` takes as ``maxima``.
        block: rows and columns of a block, within the weight.
        whole: (matrices, rows, columns) of the weight.
    """

    first: int
    start: int
    w: torch.Tensor
    learned: torch.Tensor | None
    maxima: torch.Tensor | None
    block: tuple[int, int]
    whole: tuple[int, int, int]


def weight_parts(
    w: torch.Tensor,
    spec: SampleSpec,
    batch_dims: int,
    block: tuple[int | None, int | None],
    parameter: torch.Tensor | None,
    elements: int,
) -> Iterator[WeightPart]:
    """Cut a weight into parts that are sampled alone as in the whole, bit for bit.

    Args:
        w: the weight.
        spec: what is done to it.
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        block: shape of its blocks.
        parameter: that of its learned widths, see `gws_compile.numerics.widths.parameter_shape`; None for a fixed
            width.
        elements: how many come together, about; a row of blocks at least.
    """
    count, rows, cols = whole = matrix_shape(w.shape, batch_dims)
    w = w.reshape(whole)
    if not w.numel():
        return
    sides = clamped(block, rows, cols)
    height_of_block = sides[0] if sides[0] < rows else 1
    # What parts of it cannot tell: the maxima of blocks as long as the weight, and of the matrix.
    maxima = None
    if spec.needs_matrix_maximum or sides[0] == rows:
        maxima = _maxima(w, spec, sides, max(elements // cols, 1))
    if parameter is not None and parameter.ndim:
        parameter = parameter.detach().view(count, -(-rows // sides[0]), -1)
    height = max(elements // cols // height_of_block, 1) * height_of_block
    depth = max(elements // (rows * cols), 1)
    for first in range(0, count, depth):
        for start in range(0, rows, height):
            learned = parameter
            if learned is not None and learned.ndim:
                learned = learned[first : first + depth]
                if sides[0] < rows:
                    learned = learned[:, start // height_of_block : -(-(start + height) // height_of_block)]
            given = None if maxima is None else maxima[first : first + depth]
            part = w[first : first + depth, start : start + height]
            yield WeightPart(first, start, part, learned, given, sides, whole)


def _maxima(w: torch.Tensor, spec: SampleSpec, block: tuple[int, int], height: int) -> torch.Tensor:
    """int32 bits of the maxima of the blocks, or of the matrices, of a whole weight, so many rows at a time."""
    finite = spec.needs_matrix_maximum
    sides = (0, 0) if finite else (0, block[1])
    found = [
        maximum_eager(w[:, start : start + height], 1, sides, finite=finite) for start in range(0, w.shape[1], height)
    ]
    return torch.stack(found).amax(0)
