"""Loops over a weight's own index."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..numerics.primitives import Value
from ..torch_internals import inductor
from .loops import Index, Loader, Loops


class ElementLoops(Loops):
    """Loops over the weight's own index."""

    def __init__(self, w: Any, batch_dims: int, block: Sequence[int]) -> None:
        super().__init__(w, batch_dims, block)
        self.ranges = list(self.shape)
        br, bc = self.block
        self.blocks = [self.matrices, inductor.ceildiv(self.rows, br), inductor.ceildiv(self.cols, bc)]
        self._load = w.make_loader()

    def load(self, index: Index) -> Value:
        return inductor.ops.to_dtype(self._load(index), torch.float32)

    def sampled_load(self) -> Loader:
        return self._apart(self.load).make_loader() if self._is_narrow else self.load

    def maximum(self) -> Loader:
        if self._is_narrow:
            return self.reduce("max", lambda index: inductor.ops.abs(self.load(index)), torch.float32)
        return super().maximum()

    def maximum_bits(self, *, finite: bool = False) -> Any:
        if not self._is_narrow:
            return super().maximum_bits(finite=finite)
        ops = inductor.ops

        def magnitude(index: Index) -> Value:
            value = ops.abs(self.load(index))
            if not finite:
                return value
            infinity, zero = (ops.constant(number, torch.float32) for number in (math.inf, 0.0))
            return ops.where(ops.lt(value, infinity), value, zero)

        largest = self.reduce("max", magnitude, torch.float32)
        return self.stored_tensor(lambda block: self.p.float_bits(largest(block)), torch.int32)

    def block_of(self, index: Index) -> Index:
        matrix, row, col = self._matrix_index(index)
        br, bc = self.block
        return [matrix, inductor.block_index(row, self.rows, br), inductor.block_index(col, self.cols, bc)]

    def matrix_of(self, block: Index) -> Index:
        return [block[0]]

    def element_index(self, whole: Sequence[int], offset: Sequence[int]) -> Loader:
        sizes: Sequence[Any] = whole or self.shape
        start: Sequence[Any] = offset or [0] * len(sizes)
        numel = inductor.product(sizes)
        if self.on_gpu:
            return lambda index: inductor.linear_int32([i + o for i, o in zip(index, start, strict=True)], sizes, numel)
        trailing = self.batch_dims + 1
        zeros = [0] * len(sizes)

        def column(at: Any) -> Index:
            columns = inductor.unflatten(at, self.shape[trailing:])
            return zeros[:trailing] + [i + o for i, o in zip(columns, start[trailing:], strict=True)]

        of_column = self._table(self.cols, column, sizes)

        def element(index: Index) -> Value:
            row = [i + o for i, o in zip(index[:trailing], start[:trailing], strict=True)] + zeros[trailing:]
            return inductor.ops.add(inductor.linear_int32(row, sizes, numel), of_column(self._matrix_index(index)[2]))

        return element

    def reduced(self, kind: str, value: Loader, dtype: torch.dtype) -> Any:
        reduce = {"max": inductor.amax, "sum": inductor.sum}[kind]
        if tuple(self.block) == (self.rows, self.cols):
            reduced = inductor.view(reduce(self._by_matrix(value, dtype), [1]), list(self.blocks))
        else:
            reduced = reduce(self._by_block(value, dtype), [2, 4])
        reduced.realize()
        return reduced

    def _by_matrix(self, value: Loader, dtype: torch.dtype) -> Any:
        """A value of each element as (matrices, elements of a matrix): one run through memory."""

        def element(index: Index) -> Value:
            matrix, at = index
            leading = inductor.unflatten(matrix, self.shape[: self.batch_dims])
            return value([*leading, *inductor.unflatten(at, self.shape[self.batch_dims :])])

        ranges = [self.matrices, self.rows * self.cols]
        return inductor.pointwise(device=self.w.get_device(), dtype=dtype, value=element, ranges=ranges)

    def store(self, element: Loader, out_dtype: torch.dtype) -> Any:
        return inductor.to_dtype(inductor.to_dtype(self._apart(element), self.w.get_dtype()), out_dtype)

    @property
    def _is_narrow(self) -> bool:
        """Whether the weight's 16-bit values make a C++ loop keep a float32 value in two vectors.

        There a float32 value and its bits are exchanged through memory, in a loop of its own. Over one vector the
        compiler sees through that.
        """
        return not self.on_gpu and self.w.get_dtype() != torch.float32

    def _apart(self, element: Loader) -> Any:
        """A float32 value of each element, on a CPU as a loop of its own.

        Other loops are fused with it, and the buffer between them goes; but one loop without a 16-bit value in it makes
        all of them loops of one vector, see `_is_narrow`.
        """
        value = inductor.pointwise(
            device=self.w.get_device(), dtype=torch.float32, value=element, ranges=list(self.ranges)
        )
        if not self.on_gpu:
            value.realize()
        return value

    def _table(self, size: Any, index: Callable[[Any], Index], sizes: Sequence[Any]) -> Callable[[Any], Value]:
        """int32 row-major indices, computed once and loaded.

        In C++ a vector of consecutive numbers is put together from scalars, at the cost of a random word.
        """
        table = inductor.pointwise(
            device=self.w.get_device(),
            dtype=torch.int32,
            value=lambda at: inductor.linear_int32(index(at[0]), sizes, inductor.product(sizes)),
            ranges=[size],
        )
        table.realize()
        name = table.get_name()  # its own loader computes what reads no memory again, instead of loading it
        return lambda at: inductor.ops.load(name, at)

    def _matrix_index(self, index: Index) -> tuple[Any, Any, Any]:
        """Index of an element -> (matrix, row, column)."""
        row = self.batch_dims
        matrix = inductor.flatten(index[:row], self.shape[:row])
        return matrix, index[row], inductor.flatten(index[row + 1 :], self.shape[row + 1 :])

    def _by_block(self, value: Loader, dtype: torch.dtype) -> Any:
        """A value of each element as (matrices, block rows, rows, block cols, cols), 0 beyond partial blocks."""
        ops, (br, bc) = inductor.ops, self.block

        def element(index: Index) -> Value:
            m, bi, ri, bj, ci = index
            row, col = bi * br + ri, bj * bc + ci
            leading = inductor.unflatten(m, self.shape[: self.batch_dims])
            trailing = inductor.unflatten(col, self.shape[self.batch_dims + 1 :])
            inside = [
                ops.lt(ops.index_expr(i, torch.int32), ops.index_expr(n, torch.int32))
                for i, n, side in ((row, self.rows, br), (col, self.cols, bc))
                if n % side != 0
            ]

            def inner() -> Value:
                return value([*leading, row, *trailing])

            if not inside:
                return inner()
            zero = 0 if dtype == torch.int32 else 0.0
            return ops.masked(inside[0] if len(inside) == 1 else ops.and_(*inside), inner, zero)

        _, block_rows, block_cols = self.blocks
        return inductor.pointwise(
            device=self.w.get_device(),
            dtype=dtype,
            value=element,
            ranges=[self.matrices, block_rows, br, block_cols, bc],
        )
