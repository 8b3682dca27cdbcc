"""The block scale X: a power of two that follows from the block's maximum, or the exact one, `amax_scale`.

Powers of two, and their reciprocals, are read from exponent bits: no logarithm and no division, so that every device
gets the same ones. What has to be divided is divided by `gws_compile.numerics.division`. The scale of two levels,
``"nvfp4"``, is in `gws_compile.numerics.nvfp4`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from .division import divide
from .elements import ElementFormat
from .float32 import EXPONENT, FRACTION, MAGNITUDE, NAN, bits_float32, float32_bits
from .primitives import Primitives, Value

Scale = Literal["floor", "ceil", "amax", "nvfp4", None]
"""A rule for the block scale, or none."""

SCALES: tuple[Scale, ...] = get_args(Scale)
"""The rules: OCP MX's, the smallest power of two at which nothing saturates, the exact scale ``a / max``, NVFP4's two
levels, and none."""

OPERAND_SCALES = (*(one for one in SCALES if one), "unit", "none")
"""The rules of an operand that is no weight: ``"unit"`` is ``1 / max`` whatever the values, for those from -1 to 1."""

POWERS_OF_TWO: tuple[Scale, ...] = ("floor", "ceil")
"""The rules whose X is a power of two."""

STORAGE = {torch.float32: (127, 23), torch.bfloat16: (127, 7), torch.float16: (15, 10)}
"""Weight dtype -> its largest exponent and its mantissa bits: what the result has to fit into."""


def scale_exponent_range(fmt: ElementFormat, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Smallest and largest exponent of a block scale X.

    X and 1 / X are normal float32 values. From below, the grid's smallest value stays at or above 2**-124, a normal
    float32; from above, its largest value stays finite in the weight's dtype. Blocks whose maximum is so small (2**-107
    for fp8_e4m3) use the lower part of the grid.
    """
    return max(-126, -124 - (fmt.emin - fmt.mantissa_bits)), min(126, STORAGE[dtype][0] - fmt.emax)


def needs_block_maximum(fmt: ElementFormat, scale: str | None, noise: str) -> bool:
    """Whether the block maximum enters the result: for the scale, or for the amplitude of noise."""
    return noise != "none" or (scale not in (None, "unit") and fmt.scaled)


def scale_bits(p: Primitives, amax: Value, fmt: ElementFormat, scale: str, dtype: torch.dtype = torch.float32) -> Value:
    """Bits of the block scale X, a power of two (an int32 with only exponent bits).

    Args:
        p: the operations to write it in.
        amax: float32 block maximum of ``|w|``.
        fmt: the element format.
        scale: ``"floor"``, ``2**(floor(log2 amax) - emax)`` (OCP MX v1.0, section 6.3), or ``"ceil"``, the smallest
            power of two with ``amax / X <= max``; both within `scale_exponent_range`.
        dtype: the weight's.
    """
    bits = p.float_bits(amax)
    if scale == "ceil":
        # Carry into the exponent when the block maximum's fraction is above the format maximum's.
        bits = p.iadd(bits, FRACTION - (float32_bits(fmt.max) & FRACTION))
    low, high = scale_exponent_range(fmt, dtype)
    # Limited before emax goes off, or a negative emax would carry the exponent out of int32.
    exponent = p.imax(p.iand(bits, EXPONENT), (low + 127 + fmt.emax) << 23)
    return p.isub(p.imin(exponent, (high + 127 + fmt.emax) << 23), fmt.emax << 23)


def neighbouring_tops(
    p: Primitives, amax: Value, fmt: ElementFormat, largest: float, dtype: torch.dtype
) -> tuple[Value, Value]:
    """Where the scale ``"floor"`` leaves a gap: a block's largest value ``max * X``, and the least with the next scale.

    A block maximum between the two saturates.

    Args:
        p: the operations to write it in.
        amax: float32 block maximum.
        fmt: the element format.
        largest: the largest ``|w| / X``.
        dtype: the weight's.

    Returns:
        float32; the second is Inf where there is no larger scale.
    """
    bits = scale_bits(p, amax, fmt, "floor", dtype)
    x = p.bits_float(bits)
    last = (scale_exponent_range(fmt, dtype)[1] + 127) << 23
    return p.fmul(x, largest), p.fselect(p.ilt(bits, last), p.fmul(x, 2.0 ** (fmt.emax + 1)), float("inf"))


def amax_scale(p: Primitives, amax: Value, fmt: ElementFormat, dtype: torch.dtype) -> tuple[Value, Value]:
    """``X = a / max``, at which the block maximum becomes the format's; and ``1 / X``. Both rounded to nearest.

    X stays within the normal float32 values at which the grid's smallest value is one too, and its largest finite in
    the weight's dtype; a block of zeros has the smallest.

    Args:
        p: the operations to write it in.
        amax: float32 block maximum of ``|w|``.
        fmt: the element format.
        dtype: the weight's.

    Returns:
        1 / X and X, float32.
    """
    low, _ = scale_exponent_range(fmt, dtype)
    # The smallest a is a power of two times max, whose quotient is that power of two.
    smallest = float32_bits(2.0**low * fmt.max)
    largest = float32_bits(min(2.0**127 * fmt.max, bits_float32(EXPONENT - 1)))
    bits = p.imax(p.imin(p.iand(p.float_bits(amax), MAGNITUDE), largest), smallest)
    x_bits = p.imin(p.float_bits(divide(p, p.bits_float(bits), fmt.max)), largest_scale_bits(fmt.max, dtype))
    x = p.bits_float(x_bits)
    return divide(p, 1.0, x), x


def largest_scale_bits(largest: float, dtype: torch.dtype) -> int:
    """The bits of the largest float32 X, up to 2**126, with which ``largest * X`` is finite in a dtype."""
    limit = float(torch.finfo(dtype).max)
    bits = float32_bits(min(limit / largest, 2.0**126))
    return bits if bits_float32(bits) * largest <= limit else bits - 1  # float64: exact for a format's few bits


def block_scale(
    p: Primitives, amax: Value, fmt: ElementFormat, scale: str | None, dtype: torch.dtype
) -> tuple[Value | None, Value]:
    """What `cast` needs to know of a block: 1 / X, None for X = 1; and X, NaN where the block has a NaN or an Inf.

    Args:
        p: the operations to write it in.
        amax: float32 block maximum.
        fmt: the element format.
        scale: see `scale_bits` and `amax_scale`; None for X = 1.
        dtype: the weight's.
    """
    if not fmt.scaled or scale is None:
        return None, p.bits_float(broken_block(p, amax, 127 << 23))
    if scale == "amax":
        inverse, x = amax_scale(p, amax, fmt, dtype)
        return inverse, p.bits_float(broken_block(p, amax, p.float_bits(x)))
    x_bits = scale_bits(p, amax, fmt, scale, dtype)
    return p.bits_float(p.isub(254 << 23, x_bits)), p.bits_float(broken_block(p, amax, x_bits))


def broken_block(p: Primitives, amax: Value, x_bits: Value) -> Value:
    """The bits of X; those of a NaN where the block has a NaN or an Inf, so that it becomes NaN as a whole."""
    finite = p.ilt(p.iand(p.float_bits(amax), MAGNITUDE), EXPONENT)
    return p.iselect(finite, x_bits, NAN)
