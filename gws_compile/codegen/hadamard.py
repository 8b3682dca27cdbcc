"""Inductor's lowering of ``gws::hadamard``.

On a GPU each element is the sum over its group, in one loop: the group's other elements are in the cache. On a CPU that
would be sixteen loads for each element, or more; there the fast transform is a C++ kernel of our own, in registers, or,
where that does not suit, a loop for each of its stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..numerics.float32 import SIGN
from ..numerics.hadamard import signs, transform, transform_stage
from ..numerics.primitives import Value, wrap_int32
from ..ops.sample_arguments import HadamardArguments
from ..torch_internals import inductor
from .cpp import hadamard_kernel
from .inductor_primitives import InductorPrimitives

Index = Sequence[Any]


def lower_hadamard(*arguments: Any) -> Any:
    """The transformed operand, as Inductor's tensor."""
    given = HadamardArguments(*arguments)
    given = replace(given, x=inductor.stored(given.x))  # each element is read again and again
    x = given.x
    if x.get_device().type == "cpu":
        transformed = hadamard_kernel.transform(given)
        return _in_stages(given) if transformed is None else transformed
    groups = _Groups(given)
    load = x.make_loader()

    def element(index: Index) -> Value:
        return transform(
            groups.p,
            lambda i: inductor.ops.to_dtype(load(groups.at(index, i)), torch.float32),
            lambda bit: groups.flip(index, bit),
            given.size,
            x.get_dtype(),
        )

    return inductor.to_dtype(groups.stored(element), x.get_dtype())


def _in_stages(given: HadamardArguments) -> Any:
    groups, stage = _Groups(given), given.x
    bits = given.size.bit_length() - 1
    last = (given.size, given.x.get_dtype())
    for bit in range(bits):
        stage = groups.stage(stage, bit, last if bit == bits - 1 else None)
        stage.realize()
    return inductor.to_dtype(stage, given.x.get_dtype())


class _Groups:
    """Where the elements of an operand stand in their groups."""

    def __init__(self, given: HadamardArguments) -> None:
        self.p = InductorPrimitives()
        self._given = given
        self._shape = given.x.get_size()
        self._trailing = self._shape[given.batch_dims + 1 :]

    def _along(self, index: Index) -> Any:
        dims = self._given.batch_dims
        return index[dims] if self._given.rows else inductor.flatten(index[dims + 1 :], self._trailing)

    def at(self, index: Index, position: Any) -> Index:
        """The index of the element at a position in the group of another."""
        dims, size = self._given.batch_dims, self._given.size
        along = inductor.floordiv(self._along(index), size) * size + position
        if self._given.rows:
            return [*index[:dims], along, *index[dims + 1 :]]
        return [*index[: dims + 1], *inductor.unflatten(along, self._trailing)]

    def flip(self, index: Index, bit: int) -> Value:
        """int32, the sign bit where a bit of the element's position is set."""
        position = inductor.ops.index_expr(inductor.modular(self._along(index), 1, self._given.size), torch.int32)
        return self.p.iand(self.p.imul(position, wrap_int32(1 << (31 - bit))), SIGN)

    def stage(self, x: Any, bit: int, last: tuple[int, torch.dtype] | None) -> Any:
        """What one stage of the fast transform makes of the stage before."""
        load_x, size = x.make_loader(), self._given.size

        def element(index: Index) -> Value:
            along = self._along(index)
            low = inductor.modular(along, 1, 1 << bit) + inductor.modular(along, 2 << bit, size >> (bit + 1)) * (
                2 << bit
            )

            def load(upper: int) -> Value:
                value = inductor.ops.to_dtype(load_x(self.at(index, low + (upper << bit))), torch.float32)
                return value if bit else self._signed(value, low + upper)

            return transform_stage(self.p, load, self.flip(index, bit), last)

        return self.stored(element)

    def _signed(self, value: Value, position: Any) -> Value:
        """The value with the sign of S at a position."""
        word = sum(1 << i for i, sign in enumerate(signs(16)) if sign < 0)
        at = inductor.ops.index_expr(inductor.modular(position, 1, 16), torch.int32)
        bit = self.p.iand(inductor.ops.bitwise_right_shift(inductor.ops.constant(word, torch.int32), at), 1)
        return self.p.bits_float(self.p.ixor(self.p.float_bits(value), self.p.imul(bit, SIGN)))

    def stored(self, element: Any) -> Any:
        """The tensor of a float32 value of each element."""
        return inductor.pointwise(
            device=self._given.x.get_device(), dtype=torch.float32, value=element, ranges=list(self._shape)
        )
