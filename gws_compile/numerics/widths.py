"""Learned bit widths: how a trained parameter becomes a width, a format and an amplitude, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from .blocks import block_counts
from .elements import ElementFormat, parse_element
from .float32 import float32_bits, nearest_float32
from .primitives import Primitives, TorchPrimitives, Value

# A width within this of what a format stands for is that format's: rounding to a format has to be stable.
_TOLERANCE = 2.0**-10


@dataclass(frozen=True)
class WidthRule:
    """How a learned parameter becomes a width and a format: what of `LearnedBits` enters the operator.

    Attributes:
        init, target, min, max: of `LearnedBits`.
        formats: of `LearnedBits`.
    """

    init: float
    target: float
    min: float
    max: float
    formats: tuple[ElementFormat, ...]

    @property
    def spec(self) -> str:
        """The rule as the operator's argument; `parse` reads it."""
        numbers = (self.init, self.target, self.min, self.max)
        return " ".join([*map(repr, numbers), *(fmt.spec for fmt in self.formats)])

    @staticmethod
    @lru_cache(maxsize=64)
    def parse(spec: str) -> WidthRule:
        """Read `spec`."""
        parts = spec.split(" ")
        init, target, low, high = map(float, parts[:4])
        return WidthRule(init, target, low, high, tuple(map(parse_element, parts[4:])))

    @property
    def slope(self) -> float:
        """The derivative of b by b_i, a float32 value."""
        return nearest_float32(self.init - self.target)

    @property
    def reaches(self) -> tuple[float, ...]:
        """The largest width that each format but the last stands for."""
        return tuple(fmt.mantissa_bits + 2 + _TOLERANCE for fmt in self.formats[:-1])

    def index(self, widths: torch.Tensor) -> torch.Tensor:
        """int64: which of `formats` each width stands for."""
        reaches = torch.tensor(self.reaches, dtype=torch.float32, device=widths.device)
        return torch.bucketize(widths.detach().float().contiguous(), reaches)

    def widths(self, parameter: torch.Tensor) -> torch.Tensor:
        """float32: the widths within ``min`` and ``max``, as the operator computes them; no gradient."""
        widths = width(TorchPrimitives(), parameter.detach(), self)
        assert isinstance(widths, torch.Tensor)
        return widths

    def parameter(self, widths: torch.Tensor) -> torch.Tensor:
        """The ``b_i`` of these widths."""
        return (widths - self.target) / self.slope

    def rounded(self, widths: torch.Tensor) -> torch.Tensor:
        """Each width rounded up to what its format stands for; one that is beyond every format stays as it is."""
        index = self.index(widths)
        reached = torch.tensor([fmt.noise_bits for fmt in self.formats], dtype=torch.float32, device=widths.device)[
            index
        ]
        return torch.where(widths > reached, widths, reached)


def unclamped_width(p: Primitives, parameter: Value, rule: WidthRule) -> Value:
    """``target + b_i * (init - target)``, float32.

    The product's last bit is dropped, so that no compiler contracts product and sum into one rounding: eager and
    compiled code have to agree on the width to the last bit.
    """
    product = p.bits_float(p.iand(p.float_bits(p.fmul(parameter, rule.slope)), -2))
    return p.fadd(product, nearest_float32(rule.target))


def width(p: Primitives, parameter: Value, rule: WidthRule) -> Value:
    """The width b within ``min`` and ``max``, float32."""
    # Positive floats are ordered as their bits, and negative ones lie below them.
    bits = p.imax(p.float_bits(unclamped_width(p, parameter, rule)), float32_bits(rule.min))
    return p.bits_float(p.imin(bits, float32_bits(rule.max)))


_FRACTION_BITS = 18


def amplitude(p: Primitives, b: Value, amax: Value) -> Value:
    """``amax * 2**(1 - b)`` for 2 <= b <= 24, with b rounded to 2**-18; relative error below 4e-6.

    The fraction's power is a product of constants, one for each of its bits: multiplications alone round alike on every
    device.
    """
    fixed = p.iand(p.float_bits(p.fadd(b, 32.0)), (1 << 23) - 1)  # b in units of 2**-18
    whole = p.ishr(fixed, _FRACTION_BITS)
    power = p.bits_float(p.imul(p.isub(128, whole), 1 << 23))
    for bit in range(_FRACTION_BITS):
        factor = nearest_float32(2.0 ** -(2.0 ** (bit - _FRACTION_BITS)))
        mask = p.ilt(0, p.iand(fixed, 1 << bit))
        power = p.fselect(mask, p.fmul(power, factor), power)
    return p.fmul(amax, power)


def width_gradient(p: Primitives, gradient: Value, parameter: Value, rule: WidthRule) -> Value:
    """dL/db_i from dL/db: zero where b lies beyond ``min`` or ``max`` and a descent step would take it further out."""
    b = p.float_bits(unclamped_width(p, parameter, rule))
    sign = p.float_bits(gradient)
    above = p.ilt(float32_bits(rule.max), b)
    below = p.ilt(b, float32_bits(rule.min))
    inside = p.fselect(above, p.fselect(p.ilt(sign, 0), 0.0, gradient), gradient)
    inside = p.fselect(below, p.fselect(p.ilt(sign, 0), gradient, 0.0), inside)
    return p.fmul(inside, rule.slope)


def parameter_shape(
    matrices: int, rows: int, cols: int, block: Sequence[int | None], granularity: str
) -> tuple[int, ...]:
    """Shape of ``b_i``: () for a weight; (block rows, block columns) for a matrix, with the matrices in front of it."""
    if granularity == "weight":
        return ()
    blocks = block_counts(block, rows, cols)
    return blocks if matrices == 1 else (matrices, *blocks)
