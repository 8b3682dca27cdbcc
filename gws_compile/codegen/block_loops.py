"""Loops over a weight's blocks, and inside each over its elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..numerics.blocks import clamped, matrix_shape
from ..numerics.primitives import Value
from ..torch_internals import inductor
from .loops import Index, Loader, Loops

# Up to this size, Inductor's limit, a program keeps a block in its registers, and so reads it once.
_MAX_BLOCK = 1024


class BlockLoops(Loops):
    """Loops over (block, element of the block), for a contiguous weight of whole blocks.

    Inductor fuses a reduction with a pointwise loop behind it when the latter's loops are the reduction's: all blocks,
    then a block's elements. It sorts the loops by their strides in the result, unless they are these two, in each of
    which several strides are mixed. So the result's address is computed from them, not taken from a view.
    """

    def __init__(self, w: Any, batch_dims: int, block: Sequence[int]) -> None:
        super().__init__(w, batch_dims, block)
        br, bc = self.block
        self._block_rows, self._block_cols = self.rows // br, self.cols // bc
        self.blocks = [self.matrices * self._block_rows * self._block_cols]
        self.ranges = [*self.blocks, br * bc]
        self._load = inductor.view(w, [self.matrices, self.rows, self.cols]).make_loader()

    @staticmethod
    def suit(w: Any, batch_dims: int, block: Sequence[int], whole: Sequence[int]) -> bool:
        """Whether a weight can be sampled in these loops, and should."""
        shape = w.get_size()
        _, rows, cols = matrix_shape(shape, batch_dims)
        block = clamped(block, rows, cols)
        return (
            w.get_device().type != "cpu"
            and all(isinstance(side, int) for side in map(_number, block))
            and math.prod(map(_number, block)) <= _MAX_BLOCK
            and rows % block[0] == 0
            and cols % block[1] == 0
            and (not whole or len(shape) == batch_dims + 2)
            and inductor.is_contiguous(w)
        )

    def load(self, index: Index) -> Value:
        return inductor.ops.to_dtype(self._load(self._at(index)), torch.float32)

    def block_of(self, index: Index) -> Index:
        return [index[0]]

    def element_index(self, whole: Sequence[int], offset: Sequence[int]) -> Loader:
        sizes: Sequence[Any] = whole or [self.matrices, self.rows, self.cols]
        start: Sequence[Any] = offset or [0] * len(sizes)

        def element(index: Index) -> Value:
            matrix, row, col = self._at(index)
            leading = inductor.unflatten(matrix, self.shape[: self.batch_dims]) if whole else [matrix]
            at = [i + o for i, o in zip([*leading, row, col], start, strict=True)]
            return inductor.linear_int32(at, sizes, inductor.product(sizes))

        return element

    def matrix_of(self, block: Index) -> Index:
        return [inductor.floordiv(block[0], self._block_rows * self._block_cols)]

    def reduced(self, kind: str, value: Loader, dtype: torch.dtype) -> Any:
        reduced = inductor.reduction(
            kind, self.w.get_device(), dtype, lambda i, r: value([*i, *r]), self.blocks, self.ranges[1:]
        )
        reduced.realize()
        return reduced

    def store(self, element: Loader, out_dtype: torch.dtype) -> Any:

        def converted(index: Index) -> Value:
            return inductor.ops.to_dtype(inductor.ops.to_dtype(element(index), self.w.get_dtype()), out_dtype)

        matrices = [self.matrices, self.rows, self.cols]
        stored = inductor.scatter(self.w.get_device(), out_dtype, converted, self.ranges, self._at, matrices)
        return inductor.view(stored, list(self.shape))

    def _at(self, index: Index) -> list[Any]:
        """Index of an element -> (matrix, row, column)."""
        block, element = index
        br, bc = self.block
        row = inductor.modular(block, self._block_cols, self._block_rows) * br + inductor.floordiv(element, bc)
        col = inductor.modular(block, 1, self._block_cols) * bc + inductor.modular(element, 1, bc)
        return [inductor.floordiv(block, self._block_rows * self._block_cols), row, col]


def _number(side: Any) -> Any:
    """A side as an int, where it is one that is known."""
    return int(side) if getattr(side, "is_Integer", isinstance(side, int)) else side
