"""The few scalar operations that noise and cast are written in, and their eager torch form.

`Primitives` has three implementations: `TorchPrimitives` here (tensors, the eager kernel), `InductorPrimitives`
(Inductor's loop-level ``ops``) and `CppPrimitives` (C++ statements). The arithmetic above them is written once.

Integers are int32 with wrap-around, floats are float32. A Python number stands for a constant of the right type.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

Value = Any
"""A tensor, an Inductor value or C++ variables, by the implementation; or a Python number (a constant)."""


def wrap_int32(value: int) -> int:
    """The int32 with the same 32 bits as the unsigned ``value``."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


class Primitives(Protocol):
    """Elementwise operations on int32 (``i``) and float32 (``f``) values."""

    def iadd(self, x: Value, y: Value) -> Value: ...
    def isub(self, x: Value, y: Value) -> Value: ...
    def imul(self, x: Value, y: Value) -> Value: ...
    def iand(self, x: Value, y: Value) -> Value: ...
    def ior(self, x: Value, y: Value) -> Value: ...
    def ixor(self, x: Value, y: Value) -> Value: ...
    def ishr(self, x: Value, count: int) -> Value:
        """Logical right shift by a constant: zeros come in."""

    def imin(self, x: Value, y: Value) -> Value: ...
    def imax(self, x: Value, y: Value) -> Value: ...
    def ilt(self, x: Value, y: Value) -> Value:
        """``x < y`` as signed integers, a mask."""

    def iselect(self, mask: Value, x: Value, y: Value) -> Value: ...
    def fadd(self, x: Value, y: Value) -> Value: ...
    def fsub(self, x: Value, y: Value) -> Value: ...
    def fmul(self, x: Value, y: Value) -> Value: ...
    def fdiv(self, x: Value, y: Value) -> Value:
        """About ``x / y``, of numbers from [1, 2): within 2 units in the last place. See `numerics.division`."""

    def fselect(self, mask: Value, x: Value, y: Value) -> Value: ...
    def to_float(self, x: Value) -> Value:
        """Convert an integer of at most 24 bits, exactly."""

    def float_bits(self, x: Value) -> Value:
        """The bits of a float as an integer."""

    def bits_float(self, x: Value) -> Value:
        """The float with these bits."""


def _select(mask: torch.Tensor, x: Value, y: Value, dtype: torch.dtype) -> torch.Tensor:
    # Two Python numbers would make torch.where return the default dtype.
    x, y = (v if isinstance(v, torch.Tensor) else torch.full((), v, dtype=dtype, device=mask.device) for v in (x, y))
    return torch.where(mask, x, y)


class TorchPrimitives:
    """`Primitives` on eager tensors."""

    def iadd(self, x: Value, y: Value) -> Value:
        return x + y

    def isub(self, x: Value, y: Value) -> Value:
        return x - y

    def imul(self, x: Value, y: Value) -> Value:
        return x * y

    def iand(self, x: Value, y: Value) -> Value:
        return x & y

    def ior(self, x: Value, y: Value) -> Value:
        return x | y

    def ixor(self, x: Value, y: Value) -> Value:
        return x ^ y

    def ishr(self, x: Value, count: int) -> Value:
        # torch shifts a signed integer arithmetically; the mask removes the copies of the sign.
        return (x >> count) & (0xFFFFFFFF >> count)

    def imin(self, x: Value, y: Value) -> Value:
        return torch.clamp(x, max=y)

    def imax(self, x: Value, y: Value) -> Value:
        return torch.clamp(x, min=y)

    def ilt(self, x: Value, y: Value) -> Value:
        return x < y

    def iselect(self, mask: Value, x: Value, y: Value) -> Value:
        return _select(mask, x, y, torch.int32)

    def fadd(self, x: Value, y: Value) -> Value:
        return x + y

    def fsub(self, x: Value, y: Value) -> Value:
        return x - y

    def fmul(self, x: Value, y: Value) -> Value:
        return x * y

    def fdiv(self, x: Value, y: Value) -> Value:
        return x / y

    def fselect(self, mask: Value, x: Value, y: Value) -> Value:
        return _select(mask, x, y, torch.float32)

    def to_float(self, x: Value) -> Value:
        return x.to(torch.float32)

    def float_bits(self, x: Value) -> Value:
        return x.view(torch.int32)

    def bits_float(self, x: Value) -> Value:
        return x.view(torch.float32)
