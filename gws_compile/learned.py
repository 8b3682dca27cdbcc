"""The setting `LearnedBits`, and the arithmetic that turns a learned parameter into a bit width and a format."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from .cast import broken_block, float32_bits, largest_value, scale_bits
from .formats import FloatFormat
from .primitives import Primitives, TorchPrimitives, Value, wrap_int32

Granularity = Literal["block", "weight"]

DEFAULT_FORMATS = ("fp4_e2m1", "fp6_e3m2", "fp8_e4m3", "fp12_e4m7", "bf16")

_EXPONENT = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF

# A width within this of what a format stands for is that format's: rounding to a format has to be stable.
_TOLERANCE = 2.0**-10


@dataclass(frozen=True)
class LearnedBits:
    """Bit widths that are trained along with the weights (arXiv 2505.11170, section 3).

    The width of a block (or weight) is ``b = target + b_i * (init - target)``, kept within ``min`` and ``max``; the
    float32 ``b_i``, 1 at the start, is what an optimizer moves: give it `Backend.parameters`.

    Args:
        init: width at the start.
        target: width at ``b_i = 0``: what weight decay on ``b_i``, and `Backend.bit_loss`, pull towards.
        granularity: ``"block"``, a width for each block, or ``"weight"``.
        min: smallest width.
        max: largest width.
        average: the average width, over all elements, that training is to end with. `Backend.bit_loss` is then an
            augmented Lagrangian of this constraint, to be added to the loss as it is.
        formats: what widths stand for in noise-free calls: the first format whose mantissa bits + 2 reach the width, or
            else the last. Ascending in mantissa bits.

    Raises:
        ValueError: a bad value; the message names it and what is accepted.
    """

    init: float = 6.0
    target: float = 4.0
    granularity: Granularity = "block"
    min: float = 2.0
    max: float = 10.0
    average: float | None = None
    formats: tuple[str | FloatFormat, ...] = DEFAULT_FORMATS

    def __post_init__(self) -> None:
        for name in ("min", "max", "init", "target"):
            check_bits(f"LearnedBits.{name}", getattr(self, name))
        if not self.min < self.max:
            raise ValueError(f"LearnedBits.min must be below max, got min={self.min:g}, max={self.max:g}")
        for name in ("init", "target", "average"):
            value = getattr(self, name)
            if value is not None and not (check_bits(f"LearnedBits.{name}", value) and self.min <= value <= self.max):
                raise ValueError(
                    f"LearnedBits.{name} must lie within min={self.min:g} and max={self.max:g}, got {value:g}"
                )
        if self.init == self.target:
            raise ValueError(
                f"LearnedBits.init and target must differ, got {self.init:g} for both: widths move between them as "
                "target + b_i * (init - target)"
            )
        if self.granularity not in ("block", "weight"):
            raise ValueError(f"LearnedBits.granularity must be 'block' or 'weight', got {self.granularity!r}")
        if isinstance(self.formats, str) or not self.formats:
            raise ValueError(f"LearnedBits.formats must be a list of formats, got {self.formats!r}")
        formats = tuple(FloatFormat.parse(fmt) for fmt in self.formats)
        object.__setattr__(self, "formats", formats)
        mantissas = [fmt.mantissa_bits for fmt in formats]
        if mantissas != sorted(mantissas) or len(set(formats)) != len(formats) or mantissas[-1] > 22:
            raise ValueError(
                "LearnedBits.formats must be different and ascend in mantissa bits, at most 22, got "
                + ", ".join(f"{fmt.name} ({fmt.mantissa_bits})" for fmt in formats)
            )

    @property
    def widest(self) -> FloatFormat:
        """The format of the largest widths."""
        fmt = self.formats[-1]
        assert isinstance(fmt, FloatFormat)
        return fmt


def check_bits(name: str, value: object) -> float:
    """A bit width as a float.

    Raises:
        ValueError: no number from 2 to 24.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 2 <= value <= 24
        or not math.isfinite(value)
    ):
        raise ValueError(f"{name} must be a number from 2 to 24, got {value!r}")
    return float(value)


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
    formats: tuple[FloatFormat, ...]

    @staticmethod
    def of(learned: LearnedBits) -> WidthRule:
        """The rule of a setting."""
        formats = tuple(FloatFormat.parse(fmt) for fmt in learned.formats)
        return WidthRule(float(learned.init), float(learned.target), float(learned.min), float(learned.max), formats)

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
        return WidthRule(init, target, low, high, tuple(map(FloatFormat.parse, parts[4:])))

    @property
    def slope(self) -> float:
        """The derivative of b by b_i, a float32 value."""
        return _float32(self.init - self.target)

    @property
    def reaches(self) -> tuple[float, ...]:
        """The largest width that each format but the last stands for."""
        return tuple(fmt.mantissa_bits + 2 + _TOLERANCE for fmt in self.formats[:-1])

    def index(self, widths: torch.Tensor) -> torch.Tensor:
        """int64: which of `formats` each width stands for."""
        return torch.bucketize(widths.detach().float().contiguous(), torch.tensor(self.reaches, device=widths.device))

    def widths(self, parameter: torch.Tensor) -> torch.Tensor:
        """float32: the widths within ``min`` and ``max``, as the operator computes them; no gradient."""
        return torch.as_tensor(width(TorchPrimitives(), parameter.detach(), self))

    def parameter(self, widths: torch.Tensor) -> torch.Tensor:
        """The ``b_i`` of these widths."""
        return (widths - self.target) / self.slope

    def rounded(self, widths: torch.Tensor) -> torch.Tensor:
        """Each width rounded up to what its format stands for; one that is beyond every format stays as it is."""
        index = self.index(widths)
        reached = torch.tensor([fmt.noise_bits for fmt in self.formats], device=widths.device)[index]
        return torch.where(widths > reached, widths, reached)


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def unclamped_width(p: Primitives, parameter: Value, rule: WidthRule) -> Value:
    """``target + b_i * (init - target)``, float32.

    The product's last bit is dropped, so that no compiler contracts product and sum into one rounding: eager and
    compiled code have to agree on the width to the last bit.
    """
    product = p.bits_float(p.iand(p.float_bits(p.fmul(parameter, rule.slope)), -2))
    return p.fadd(product, _float32(rule.target))


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
        factor = _float32(2.0 ** -(2.0 ** (bit - _FRACTION_BITS)))
        mask = p.ilt(0, p.iand(fixed, 1 << bit))
        power = p.fselect(mask, p.fmul(power, factor), power)
    return p.fmul(amax, power)


@dataclass(frozen=True)
class Grid:
    """What the cast of an element needs to know of its block: int32 values."""

    x: Value
    largest: Value
    smallest: Value
    shift: Value

    def map(self, function: object) -> Grid:
        """The same of each field."""
        assert callable(function)
        return Grid(*(function(getattr(self, name)) for name in ("x", "largest", "smallest", "shift")))


def block_grid(
    p: Primitives,
    b: Value,
    amax: Value,
    drawing: Value | None,
    fmt: FloatFormat,
    rule: WidthRule,
    scale: str | None,
    dtype: torch.dtype,
) -> Grid:
    """The grid that a block is cast to.

    Args:
        p: the operations to write it in.
        b: float32 width.
        amax: float32 block maximum.
        drawing: int32, -1 while noise is drawn at learned widths: the grid is that of ``fmt``. 0, or None: the grid is
            that of the width's format.
        fmt: the format of training.
        rule: its formats.
        scale: rule of the block scale.
        dtype: the weight's.
    """
    grids = [_grid(p, amax, candidate, scale, dtype) for candidate in rule.formats]
    bits = p.float_bits(b)
    chosen = grids[-1]
    for reach, grid in zip(reversed(rule.reaches), reversed(grids[:-1]), strict=True):
        beyond = p.ilt(float32_bits(_float32(reach)), bits)
        chosen = _select(p, beyond, chosen, grid)
    if drawing is not None:
        chosen = _select(p, p.ilt(drawing, 0), _grid(p, amax, fmt, scale, dtype), chosen)
    return Grid(broken_block(p, amax, chosen.x), chosen.largest, chosen.smallest, chosen.shift)


def _select(p: Primitives, mask: Value, x: Grid, y: Grid) -> Grid:
    pairs = ((x.x, y.x), (x.largest, y.largest), (x.smallest, y.smallest), (x.shift, y.shift))
    same = [isinstance(a, int) and isinstance(b, int) and a == b for a, b in pairs]
    return Grid(*(a if equal else p.iselect(mask, a, b) for equal, (a, b) in zip(same, pairs, strict=True)))


# A format with 8 exponent bits has no scale, but `cast_to_grid` computes with one: the block maximum goes to 2**100,
# where every normal float32 value below it is normal too, and `shift` does not overflow.
_WIDE_EXPONENT = 100


def _grid(p: Primitives, amax: Value, fmt: FloatFormat, scale: str | None, dtype: torch.dtype) -> Grid:
    shift = (23 - fmt.mantissa_bits) << 23
    largest = float32_bits(largest_value(fmt, scale, dtype))
    if fmt.scaled:
        x = scale_bits(p, amax, fmt, scale, dtype) if scale is not None else 127 << 23
        return Grid(x, largest, float32_bits(fmt.min_normal), shift)
    exponent = p.iand(p.float_bits(amax), _EXPONENT)
    x = p.isub(p.imax(exponent, (_WIDE_EXPONENT + 1) << 23), _WIDE_EXPONENT << 23)
    # max / X and 2**-126 / X, kept where adding `shift` does not overflow; no |y| / X comes near that limit.
    limit = 231
    lowest = max((largest >> 23) + 127 - limit, 1)
    # Without a step beyond int32: signed overflow is undefined in C++, and compilers use that.
    over = p.isub(p.imax(x, lowest << 23), lowest << 23)
    largest_scaled = p.isub(largest + ((127 - lowest) << 23), over)
    smallest = p.imax(p.isub((fmt.emin + 127 + 127) << 23, x), 1 << 23)
    return Grid(x, largest_scaled, smallest, shift)


def cast_to_grid(p: Primitives, y: Value, grid: Grid) -> Value:
    """`gws_compile.cast.cast` with the grid as operands: float32 on the grid, NaN where the block is broken."""
    inverse = p.bits_float(p.isub(254 << 23, grid.x))
    q = p.float_bits(p.fmul(y, inverse))
    magnitude = p.imin(p.iand(q, _MAGNITUDE), grid.largest)
    exponent = p.imax(p.iand(magnitude, _EXPONENT), grid.smallest)
    c = p.bits_float(p.iadd(exponent, grid.shift))
    rounded = p.float_bits(p.fsub(p.fadd(p.bits_float(magnitude), c), c))
    signed = p.bits_float(p.ior(rounded, p.iand(q, wrap_int32(0x80000000))))
    return p.fmul(signed, p.bits_float(grid.x))


def width_gradient(p: Primitives, gradient: Value, parameter: Value, rule: WidthRule) -> Value:
    """dL/db_i from dL/db: zero where b lies beyond ``min`` or ``max`` and a descent step would take it further out."""
    b = p.float_bits(unclamped_width(p, parameter, rule))
    sign = p.float_bits(gradient)
    above = p.ilt(float32_bits(rule.max), b)
    below = p.ilt(b, float32_bits(rule.min))
    inside = p.fselect(above, p.fselect(p.ilt(sign, 0), 0.0, gradient), gradient)
    inside = p.fselect(below, p.fselect(p.ilt(sign, 0), gradient, 0.0), inside)
    return p.fmul(inside, rule.slope)


def parameter_shape(matrices: int, rows: int, cols: int, block: Sequence[int], granularity: str) -> tuple[int, ...]:
    """Shape of ``b_i``: () for a weight; (block rows, block columns) for a matrix, with the matrices in front of it."""
    if granularity == "weight":
        return ()
    blocks = (-(-rows // block[0]), -(-cols // block[1]))
    return blocks if matrices == 1 else (matrices, *blocks)
