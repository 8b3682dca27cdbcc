"""The block scale X, a power of two that follows from the block's maximum.

X and 1 / X are read from exponent bits: no logarithm and no division, so that every device gets the same ones.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from .float32 import EXPONENT, FRACTION, MAGNITUDE, NAN, float32_bits
from .formats import FloatFormat
from .primitives import Primitives, Value

Scale = Literal["floor", "ceil", None]
"""A rule for the block scale, or none."""

SCALES: tuple[Scale, ...] = get_args(Scale)
"""The rules: OCP MX's, the smallest power of two at which nothing saturates, and none."""

STORAGE = {torch.float32: (127, 23), torch.bfloat16: (127, 7), torch.float16: (15, 10)}
"""Weight dtype -> its largest exponent and its mantissa bits: what the result has to fit into."""


def scale_exponent_range(fmt: FloatFormat, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Smallest and largest exponent of a block scale X.

    X and 1 / X are normal float32 values. From below, the grid's smallest value stays at or above 2**-124, a normal
    float32; from above, its largest value stays finite in the weight's dtype. Blocks whose maximum is so small (2**-107
    for fp8_e4m3) use the lower part of the grid.
    """
    return max(-126, -124 - (fmt.emin - fmt.mantissa_bits)), min(126, STORAGE[dtype][0] - fmt.emax)


def needs_block_maximum(fmt: FloatFormat, scale: str | None, noise: str) -> bool:
    """Whether the block maximum enters the result: for the scale, or for the amplitude of noise."""
    return noise != "none" or (scale is not None and fmt.scaled)


def scale_bits(p: Primitives, amax: Value, fmt: FloatFormat, scale: str, dtype: torch.dtype = torch.float32) -> Value:
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


def block_scale(
    p: Primitives, amax: Value, fmt: FloatFormat, scale: str | None, dtype: torch.dtype
) -> tuple[Value | None, Value]:
    """What `cast` needs to know of a block: 1 / X, None for X = 1; and X, NaN where the block has a NaN or an Inf.

    Args:
        p: the operations to write it in.
        amax: float32 block maximum.
        fmt: the element format.
        scale: see `scale_bits`; None for X = 1.
        dtype: the weight's.
    """
    if not fmt.scaled or scale is None:
        return None, p.bits_float(broken_block(p, amax, 127 << 23))
    x_bits = scale_bits(p, amax, fmt, scale, dtype)
    return p.bits_float(p.isub(254 << 23, x_bits)), p.bits_float(broken_block(p, amax, x_bits))


def broken_block(p: Primitives, amax: Value, x_bits: Value) -> Value:
    """The bits of X; those of a NaN where the block has a NaN or an Inf, so that it becomes NaN as a whole."""
    finite = p.ilt(p.iand(p.float_bits(amax), MAGNITUDE), EXPONENT)
    return p.iselect(finite, x_bits, NAN)
