"""What the loops over a weight, which Inductor generates code from, have in common.

`BlockLoops` run over the blocks, and inside each over its elements: on a GPU the block maximum and what depends on it
are one kernel, which reads the weight once. `ElementLoops` run over the weight's own index, where whatever reads the
result is fused with them: one kernel for the block maxima, and one that reads the weight again.

A CPU has `ElementLoops` alone, for what the C++ kernel does not take. Block by block took it twice the time
(4096 x 4096): the rows of a block lie as far apart as to share the same few lines of the cache.

An index is a list of sympy expressions, a loader a function of an index.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..numerics.blocks import clamped, matrix_shape
from ..numerics.float32 import EXPONENT, MAGNITUDE
from ..numerics.primitives import Primitives, Value
from ..torch_internals import inductor
from .inductor_primitives import InductorPrimitives

Index = Sequence[Any]
Loader = Callable[[Index], Value]


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
        self.block = clamped(block, self.rows, self.cols)
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
    def matrix_of(self, block: Index) -> Index:
        """The matrix of a block, as an index into the matrices."""

    @abstractmethod
    def element_index(self, whole: Sequence[int], offset: Sequence[int]) -> Loader:
        """The int32 row-major index of an element in the whole weight, mod 2**32, by the loops' index.

        Args:
            whole: shape of the weight of which this is one rank's part; empty where it is whole.
            offset: index of the part's first element; empty likewise.
        """

    @abstractmethod
    def reduced(self, kind: str, value: Loader, dtype: torch.dtype) -> Any:
        """The ``"max"`` or ``"sum"`` over each block of a value of each element: a stored tensor, shaped ``blocks``."""

    @abstractmethod
    def store(self, element: Loader, out_dtype: torch.dtype) -> Any:
        """The result: a float32 value of each element, in the weight's shape, converted to its dtype and then on."""

    def reduce(self, kind: str, value: Loader, dtype: torch.dtype) -> Loader:
        """The loader of what `reduced` stores."""
        load: Loader = self.reduced(kind, value, dtype).make_loader()
        return load

    def maximum(self) -> Loader:
        """float32: the largest magnitude of each block, NaN where it has one; as `numerics.blocks` computes it."""
        return self.from_bits(self.maximum_bits().make_loader())

    def maximum_bits(self, *, finite: bool = False) -> Any:
        """Its bits, int32, a stored tensor; over what is finite alone, where that is asked for.

        The largest bits are those of the largest magnitude, or of a NaN. To compare floats, which is to look for NaNs,
        takes twice the instructions.
        """
        p = self.p

        def bits(index: Index) -> Value:
            magnitude = p.iand(p.float_bits(self.load(index)), MAGNITUDE)
            return p.iselect(p.ilt(magnitude, EXPONENT), magnitude, 0) if finite else magnitude

        return self.reduced("max", bits, torch.int32)

    def from_bits(self, bits: Loader) -> Loader:
        """float32 values, of their bits."""
        return lambda index: self.p.bits_float(bits(index))

    def sampled_load(self) -> Loader:
        """`load`, for the loop that samples."""
        return self.load

    def of_blocks(self, value: Loader, *, cheap: bool) -> Loader:
        """A float32 value of each block, given by a function of its index: on a CPU computed once, and loaded.

        A GPU computes it again for each element if it is cheap: that takes fewer instructions than to load more than
        one value.
        """
        return value if self.on_gpu and cheap else self.stored(value, torch.float32)

    def stored(self, value: Loader, dtype: torch.dtype) -> Loader:
        """The same, computed once on every device."""
        load: Loader = self.stored_tensor(value, dtype).make_loader()
        return load

    def stored_by_matrix(self, value: Loader) -> Loader:
        """A float32 value of each matrix, computed once; the loader is one by `matrix_of`."""
        load: Loader = self._stored(value, torch.float32, [self.matrices]).make_loader()
        return load

    def stored_tensor(self, value: Loader, dtype: torch.dtype) -> Any:
        """What `stored` loads, as a tensor."""
        return self._stored(value, dtype, self.blocks)

    def _stored(self, value: Loader, dtype: torch.dtype, ranges: Sequence[Any]) -> Any:
        stored = inductor.pointwise(device=self.w.get_device(), dtype=dtype, value=value, ranges=list(ranges))
        stored.realize()
        return stored
