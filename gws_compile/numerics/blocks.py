"""How a weight is cut into blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Block = tuple[int | None, int | None]
"""Rows and columns of a block; None for all of a matrix."""


def check_block(block: object) -> Block:
    """A block shape as two positive ints, or None for a side as long as the matrix.

    Raises:
        ValueError: anything else.
    """
    sides = tuple(block) if isinstance(block, (tuple, list)) else ()
    if len(sides) != 2 or not all(map(_is_side, sides)):
        raise ValueError(
            "block must be two positive ints (rows, columns), such as (32, 32), or None for a whole side: (1, None) is "
            f"a row, (None, None) the matrix, got {block!r}"
        )
    return sides[0], sides[1]


def _is_side(side: object) -> bool:
    return side is None or (isinstance(side, int) and not isinstance(side, bool) and side > 0)


def block_argument(block: Sequence[int | None]) -> list[int]:
    """A block shape as the operators take it: 0 for None."""
    return [side or 0 for side in block]


def clamped(block: Sequence[int | None], rows: int, cols: int) -> tuple[int, int]:
    """The sides of a matrix's blocks: none is longer than the matrix; None and 0 are as long."""
    return _clamped(block[0], rows), _clamped(block[1], cols)


def _clamped(side: int | None, size: int) -> int:
    if not side:
        return size
    try:
        return min(side, size)
    except TypeError:  # a symbolic size, of which nothing is known
        return side


def block_counts(block: Sequence[int | None], rows: int, cols: int) -> tuple[int, int]:
    """How many blocks a matrix has, (block rows, block columns); none along a side of which it has nothing."""
    sides = clamped(block, rows, cols)
    down, across = (-(-size // side) if side else 0 for size, side in zip((rows, cols), sides, strict=True))
    return down, across


def matrix_shape(shape: Sequence[int], batch_dims: int) -> tuple[int, int, int]:
    """How a weight of this shape is blocked: (matrices, rows, columns).

    Args:
        shape: two or more dims.
        batch_dims: leading dims that count matrices: 1 for expert weights (E, a, b), 0 for a matrix and for a
            convolution weight (out, in, kh, kw), which is blocked as (out, in * kh * kw).
    """
    return math.prod(shape[:batch_dims]), shape[batch_dims], math.prod(shape[batch_dims + 1 :])


def block_maximum(w: torch.Tensor, block: Sequence[int | None], *, finite: bool = False) -> torch.Tensor:
    """Largest magnitude of each block.

    Args:
        w: float32, (matrices, rows, columns).
        block: block shape; sizes that are no multiple of it end in partial blocks.
        finite: leave out what is NaN or Inf.

    Returns:
        float32, (matrices, block rows, block columns); NaN where the block has one that is not left out.
    """
    if finite:
        w = torch.where(w.isfinite(), w, 0.0)
    (rows, cols), (br, bc) = w.shape[1:], clamped(block, *w.shape[1:])
    w = torch.nn.functional.pad(w.abs(), (0, -cols % bc, 0, -rows % br))
    return w.view(w.shape[0], w.shape[1] // br, br, w.shape[2] // bc, bc).amax(dim=(2, 4))


class Blocks:
    """The blocks of a weight."""

    def __init__(self, w: torch.Tensor, batch_dims: int, block: Sequence[int | None]) -> None:
        self.shape = matrix_shape(w.shape, batch_dims)
        _, rows, cols = self.shape
        block = clamped(block, rows, cols)
        self._block = block

    def matrices(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape as (matrices, rows, columns): a float one as float32, detached."""
        x = x.detach().reshape(self.shape)
        return x.to(torch.float32) if x.is_floating_point() else x

    def expand(self, x: object) -> torch.Tensor:
        """A value of each block, (matrices, block rows, block columns), at every element; a number as it is."""
        if not isinstance(x, torch.Tensor):
            return x  # type: ignore[return-value]
        count, down, across = x.shape
        (_, rows, cols), (br, bc) = self.shape, self._block
        # One copy, where an index for each element would take several times as long.
        every = x[:, :, None, :, None].expand(count, down, br, across, bc).reshape(count, down * br, across * bc)
        return every[:, :rows, :cols]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of (matrices, rows, columns) over each block."""
        (_, rows, cols), (br, bc) = self.shape, self._block
        x = torch.nn.functional.pad(x, (0, -cols % bc, 0, -rows % br))
        return x.view(x.shape[0], x.shape[1] // br, br, x.shape[2] // bc, bc).sum(dim=(2, 4))
