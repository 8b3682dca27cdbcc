"""`Primitives` on the values of an Inductor loop body."""

from __future__ import annotations

import torch

from ..numerics.primitives import Value
from ..torch_internals import inductor


class InductorPrimitives:
    """`Primitives` on the values of an Inductor loop body."""

    def __init__(self) -> None:
        self._ops = inductor.ops

    def _int(self, x: Value) -> Value:
        return self._ops.constant(x, torch.int32) if isinstance(x, int) else x

    def _float(self, x: Value) -> Value:
        return self._ops.constant(x, torch.float32) if isinstance(x, float) else x

    def iadd(self, x: Value, y: Value) -> Value:
        return self._ops.add(self._int(x), self._int(y))

    def isub(self, x: Value, y: Value) -> Value:
        return self._ops.sub(self._int(x), self._int(y))

    def imul(self, x: Value, y: Value) -> Value:
        return self._ops.mul(self._int(x), self._int(y))

    def iand(self, x: Value, y: Value) -> Value:
        return self._ops.bitwise_and(self._int(x), self._int(y))

    def ior(self, x: Value, y: Value) -> Value:
        return self._ops.bitwise_or(self._int(x), self._int(y))

    def ixor(self, x: Value, y: Value) -> Value:
        return self._ops.bitwise_xor(self._int(x), self._int(y))

    def ishr(self, x: Value, count: int) -> Value:
        # Signed integers shift arithmetically; the mask removes the copies of the sign.
        return self.iand(self._ops.bitwise_right_shift(x, self._int(count)), 0xFFFFFFFF >> count)

    def imin(self, x: Value, y: Value) -> Value:
        return self._ops.minimum(self._int(x), self._int(y))

    def imax(self, x: Value, y: Value) -> Value:
        return self._ops.maximum(self._int(x), self._int(y))

    def ilt(self, x: Value, y: Value) -> Value:
        return self._ops.lt(self._int(x), self._int(y))

    def iselect(self, mask: Value, x: Value, y: Value) -> Value:
        return self._ops.where(mask, self._int(x), self._int(y))

    def fadd(self, x: Value, y: Value) -> Value:
        return self._ops.add(self._float(x), self._float(y))

    def fsub(self, x: Value, y: Value) -> Value:
        return self._ops.sub(self._float(x), self._float(y))

    def fmul(self, x: Value, y: Value) -> Value:
        return self._ops.mul(self._float(x), self._float(y))

    def fdiv(self, x: Value, y: Value) -> Value:
        return self._ops.truediv(self._float(x), self._float(y))

    def fselect(self, mask: Value, x: Value, y: Value) -> Value:
        return self._ops.where(mask, self._float(x), self._float(y))

    def to_float(self, x: Value) -> Value:
        return self._ops.to_dtype(x, torch.float32, src_dtype=torch.int32)

    def float_bits(self, x: Value) -> Value:
        return self._ops.to_dtype_bitcast(x, torch.int32, torch.float32)

    def bits_float(self, x: Value) -> Value:
        return self._ops.to_dtype_bitcast(x, torch.float32, torch.int32)
