"""The loops over a weight that Inductor generates code from, in two forms.

`BlockLoops` run over the blocks, and inside each over its elements: on a GPU the block maximum and what depends on it
are one kernel, which reads the weight once. `ElementLoops` run over the weight's own index, where whatever reads the
result is fused with them: one kernel for the block maxima, and one that reads the weight again. `loops_over` chooses.

A CPU has `ElementLoops` alone, for what the kernel of `cpp_kernel` does not take. Block by block took it twice the time
(4096 x 4096): the rows of a block lie as far apart as to share the same few lines of the cache.

An index is a list of sympy expressions, a loader a function of an index.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .inductor_primitives import InductorPrimitives
from .primitives import Primitives, Value
from .sampling import matrix_shape
from .torch_internals import inductor

Index = Sequence[Any]
Loader = Callable[[Index], Value]

# Up to this size, Inductor's limit, a program keeps a block in its registers, and so reads it once.
_MAX_BLOCK = 1024


class Loops(ABC):
    """The loops over one weight.

    Attributes:
        shape: of the weight.
        blocks: shape of what has a value for each block.
    """

    def __init__(self, w: Any, batch_dims: int, block: Sequence[int]) -> None:
        self.w = w
        self.shape: Sequence[Any] = w.get_size()
        self.matrices, self.rows, self.cols = matrix_shape(self.shape, batch_dims)
        self.block = block
        self.batch_dims = batch_dims
        self.on_gpu = w.get_device().type != "cpu"
        self.p: Primitives = InductorPrimitives()

    blocks: list[Any]
    ranges: list[Any]

    @abstractmethod
    def load(self, index: Index) -> Value:
        """An element as a float32 value, by the loops' index."""

    @abstractmethod
    def block_of(self, index: Index) -> Index:
        """The block of an element, as an index into ``blocks``."""

    @abstractmethod
    def element_index(self, whole: Sequence[int], offset: Sequence[int]) -> Loader:
        """The int32 row-major index of an element in the whole weight, mod 2**32, by the loops' index.

        Args:
            whole: shape of the weight of which this is one rank's part; empty where it is whole.
            offset: index of the part's first element; empty likewise.
        """

    @abstractmethod
    def reduce(self, kind: str, value: Loader, dtype: torch.dtype) -> Loader:
        """The ``"max"`` or ``"sum"`` over each block of a value of each element; the loader is one by block."""

    @abstractmethod
    def store(self, element: Loader, out_dtype: torch.dtype) -> Any:
        """The result: a float32 value of each element, in the weight's shape, converted to its dtype and then on."""

    def maximum(self) -> Loader:
        """float32: the largest magnitude of each block, NaN where it has one; see `sampling.block_maximum`."""
        p = self.p
        # The largest bits are those of the largest magnitude, or of a NaN. To compare floats, which is to look for
        # NaNs, takes twice the instructions.
        bits = self.reduce("max", lambda index: p.iand(p.float_bits(self.load(index)), 0x7FFFFFFF), torch.int32)
        return lambda block: p.bits_float(bits(block))

    def sampled_load(self) -> Loader:
        """`load`, for the loop that samples."""
        return self.load

    def of_blocks(self, value: Loader) -> Loader:
        """A float32 value of each block, given by a function of its index: on a CPU computed once, and loaded.

        A GPU computes it again for each element: that takes fewer instructions than to load more than one value.
        """
        return value if self.on_gpu else self.stored(value, torch.float32)

    def stored(self, value: Loader, dtype: torch.dtype) -> Loader:
        """The same, computed once on every device."""
        stored = inductor().Pointwise.create(
            device=self.w.get_device(), dtype=dtype, inner_fn=value, ranges=list(self.blocks)
        )
        stored.realize()
        load: Loader = stored.make_loader()
        return load


class ElementLoops(Loops):
    """Loops over the weight's own index."""

    def __init__(self, w: Any, batch_dims: int, block: Sequence[int]) -> None:
        super().__init__(w, batch_dims, block)
        ind = inductor()
        self.ranges = list(self.shape)
        self.blocks = [self.matrices, ind.ceildiv(self.rows, block[0]), ind.ceildiv(self.cols, block[1])]
        self._load = w.make_loader()

    def load(self, index: Index) -> Value:
        return inductor().ops.to_dtype(self._load(index), torch.float32)

    def sampled_load(self) -> Loader:
        return self._apart(self.load).make_loader() if self._is_narrow else self.load

    def maximum(self) -> Loader:
        if self._is_narrow:
            return self.reduce("max", lambda index: inductor().ops.abs(self.load(index)), torch.float32)
        return super().maximum()

    def block_of(self, index: Index) -> Index:
        ind = inductor()
        matrix, row, col = self._matrix_index(index)
        br, bc = self.block
        return [matrix, ind.block_index(row, self.rows, br), ind.block_index(col, self.cols, bc)]

    def element_index(self, whole: Sequence[int], offset: Sequence[int]) -> Loader:
        ind = inductor()
        sizes: Sequence[Any] = whole or self.shape
        start: Sequence[Any] = offset or [0] * len(sizes)
        numel = ind.product(sizes)
        if self.on_gpu:
            return lambda index: ind.linear_int32([i + o for i, o in zip(index, start, strict=True)], sizes, numel)
        trailing = self.batch_dims + 1
        zeros = [0] * len(sizes)

        def column(at: Any) -> Index:
            columns = ind.unflatten(at, self.shape[trailing:])
            return zeros[:trailing] + [i + o for i, o in zip(columns, start[trailing:], strict=True)]

        of_column = self._table(self.cols, column, sizes)

        def element(index: Index) -> Value:
            row = [i + o for i, o in zip(index[:trailing], start[:trailing], strict=True)] + zeros[trailing:]
            return ind.ops.add(ind.linear_int32(row, sizes, numel), of_column(self._matrix_index(index)[2]))

        return element

    def reduce(self, kind: str, value: Loader, dtype: torch.dtype) -> Loader:
        ind = inductor()
        reduced = {"max": ind.amax, "sum": ind.sum}[kind](self._by_block(value, dtype), [2, 4])
        reduced.realize()
        load: Loader = reduced.make_loader()
        return load

    def store(self, element: Loader, out_dtype: torch.dtype) -> Any:
        ind = inductor()
        return ind.to_dtype(ind.to_dtype(self._apart(element), self.w.get_dtype()), out_dtype)

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
        value = inductor().Pointwise.create(
            device=self.w.get_device(), dtype=torch.float32, inner_fn=element, ranges=list(self.ranges)
        )
        if not self.on_gpu:
            value.realize()
        return value

    def _table(self, size: Any, index: Callable[[Any], Index], sizes: Sequence[Any]) -> Callable[[Any], Value]:
        """int32 row-major indices, computed once and loaded.

        In C++ a vector of consecutive numbers is put together from scalars, at the cost of a random word.
        """
        ind = inductor()
        table = ind.Pointwise.create(
            device=self.w.get_device(),
            dtype=torch.int32,
            inner_fn=lambda at: ind.linear_int32(index(at[0]), sizes, ind.product(sizes)),
            ranges=[size],
        )
        table.realize()
        name = table.get_name()  # its own loader computes what reads no memory again, instead of loading it
        return lambda at: ind.ops.load(name, at)

    def _matrix_index(self, index: Index) -> tuple[Any, Any, Any]:
        """Index of an element -> (matrix, row, column)."""
        ind, row = inductor(), self.batch_dims
        matrix = ind.flatten(index[:row], self.shape[:row])
        return matrix, index[row], ind.flatten(index[row + 1 :], self.shape[row + 1 :])

    def _by_block(self, value: Loader, dtype: torch.dtype) -> Any:
        """A value of each element as (matrices, block rows, rows, block cols, cols), 0 beyond partial blocks."""
        ind = inductor()
        ops, (br, bc) = ind.ops, self.block

        def element(index: Index) -> Value:
            m, bi, ri, bj, ci = index
            row, col = bi * br + ri, bj * bc + ci
            leading = ind.unflatten(m, self.shape[: self.batch_dims])
            trailing = ind.unflatten(col, self.shape[self.batch_dims + 1 :])
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
        return ind.Pointwise.create(
            device=self.w.get_device(),
            dtype=dtype,
            inner_fn=element,
            ranges=[self.matrices, block_rows, br, block_cols, bc],
        )


class BlockLoops(Loops):
    """Loops over (block, element of the block), for a contiguous weight of whole blocks.

    Inductor fuses a reduction with a pointwise loop behind it when the latter's loops are the reduction's: all blocks,
    then a block's elements. It sorts the loops by their strides in the result, unless they are these two, in each of
    which several strides are mixed. So the result's address is computed from them, not taken from a view.
    """

    def __init__(self, w: Any, batch_dims: int, block: Sequence[int]) -> None:
        super().__init__(w, batch_dims, block)
        ind = inductor()
        self._block_rows, self._block_cols = self.rows // block[0], self.cols // block[1]
        self.blocks = [self.matrices * self._block_rows * self._block_cols]
        self.ranges = [*self.blocks, block[0] * block[1]]
        self._load = ind.view(w, [self.matrices, self.rows, self.cols]).make_loader()

    @staticmethod
    def suit(w: Any, batch_dims: int, block: Sequence[int], whole: Sequence[int]) -> bool:
        """Whether a weight can be sampled in these loops, and should."""
        shape = w.get_size()
        _, rows, cols = matrix_shape(shape, batch_dims)
        return (
            w.get_device().type != "cpu"
            and math.prod(block) <= _MAX_BLOCK
            and rows % block[0] == 0
            and cols % block[1] == 0
            and (not whole or len(shape) == batch_dims + 2)
            and inductor().is_contiguous(w)
        )

    def load(self, index: Index) -> Value:
        return inductor().ops.to_dtype(self._load(self._at(index)), torch.float32)

    def block_of(self, index: Index) -> Index:
        return [index[0]]

    def element_index(self, whole: Sequence[int], offset: Sequence[int]) -> Loader:
        ind = inductor()
        sizes: Sequence[Any] = whole or [self.matrices, self.rows, self.cols]
        start: Sequence[Any] = offset or [0] * len(sizes)

        def element(index: Index) -> Value:
            matrix, row, col = self._at(index)
            leading = ind.unflatten(matrix, self.shape[: self.batch_dims]) if whole else [matrix]
            at = [i + o for i, o in zip([*leading, row, col], start, strict=True)]
            return ind.linear_int32(at, sizes, ind.product(sizes))

        return element

    def reduce(self, kind: str, value: Loader, dtype: torch.dtype) -> Loader:
        reduced = inductor().reduction(
            kind, self.w.get_device(), dtype, lambda i, r: value([*i, *r]), self.blocks, self.ranges[1:]
        )
        reduced.realize()
        load: Loader = reduced.make_loader()
        return load

    def store(self, element: Loader, out_dtype: torch.dtype) -> Any:
        ind = inductor()

        def converted(index: Index) -> Value:
            return ind.ops.to_dtype(ind.ops.to_dtype(element(index), self.w.get_dtype()), out_dtype)

        matrices = [self.matrices, self.rows, self.cols]
        stored = ind.scatter(self.w.get_device(), out_dtype, converted, self.ranges, self._at, matrices)
        return ind.view(stored, list(self.shape))

    def _at(self, index: Index) -> list[Any]:
        """Index of an element -> (matrix, row, column)."""
        ind = inductor()
        block, element = index
        br, bc = self.block
        row = ind.modular(block, self._block_cols, self._block_rows) * br + ind.floordiv(element, bc)
        col = ind.modular(block, 1, self._block_cols) * bc + ind.modular(element, 1, bc)
        return [ind.floordiv(block, self._block_rows * self._block_cols), row, col]


def loops_over(w: Any, batch_dims: int, block: Sequence[int], whole: Sequence[int], *, in_blocks: bool) -> Loops:
    """The loops over a weight: block by block if that is wanted, and possible.

    Args:
        w: Inductor's tensor.
        batch_dims, block, whole: of `gws_compile.sampling.sample_weight`.
        in_blocks: whether nothing is to be fused with the result but what is written in the loops.
    """
    # Read by a reduction and by a pointwise loop: a weight that is a view of something is stored first.
    w.realize()
    if in_blocks and BlockLoops.suit(w, batch_dims, block, whole):
        return BlockLoops(w, batch_dims, block)
    return ElementLoops(w, batch_dims, block)
