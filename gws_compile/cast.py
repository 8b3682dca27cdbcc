"""The cast onto a format's grid, as float32 bit arithmetic.

Nothing here converts to a narrow dtype: Inductor drops pairs of conversions inside a fused kernel, while arithmetic on
bits stays. No step makes a float32 subnormal either (formats with 8 exponent bits apart, which are cast by integers
alone), so the result does not depend on a device's or thread's flush-to-zero mode.
"""

from __future__ import annotations

import struct

import torch

from .formats import FloatFormat
from .primitives import Primitives, Value, wrap_int32

SCALES = ("floor", "ceil", None)

_SIGN = wrap_int32(0x80000000)
_MAGNITUDE = 0x7FFFFFFF
_EXPONENT = 0x7F800000
_FRACTION = 0x007FFFFF
_NAN = 0x7FC00000


def float32_bits(value: float) -> int:
    """The bits of a non-negative float32 value as an int."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


STORAGE = {torch.float32: (127, 23), torch.bfloat16: (127, 7), torch.float16: (15, 10)}
"""Weight dtype -> its largest exponent and its mantissa bits: what the result has to fit into."""


def scale_exponent_range(fmt: FloatFormat, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Smallest and largest exponent of a block scale X.

    X and 1 / X are normal float32 values. From below, the grid's smallest value stays at or above 2**-124, a normal
    float32; from above, its largest value stays finite in the weight's dtype. Blocks whose maximum is so small (2**-107
    for fp8_e4m3) use the lower part of the grid.
    """
    return max(-126, -124 - (fmt.emin - fmt.mantissa_bits)), min(126, STORAGE[dtype][0] - fmt.emax)


def largest_value(fmt: FloatFormat, scale: str | None, dtype: torch.dtype) -> float:
    """Where ``|y| / X`` saturates: the format's maximum, or what the weight's dtype can hold of it."""
    emax, mantissa_bits = STORAGE[dtype]
    drop = max(fmt.mantissa_bits - mantissa_bits, 0)
    truncated = float32_bits(fmt.max) >> (23 - fmt.mantissa_bits + drop) << (23 - fmt.mantissa_bits + drop)
    scaled = fmt.scaled and scale is not None
    if scaled or fmt.emax <= emax:
        return bits_float32(truncated)
    return (2 - 2.0 ** -min(fmt.mantissa_bits, mantissa_bits)) * 2.0**emax


def needs_block_maximum(fmt: FloatFormat, scale: str | None, noise: str) -> bool:
    """Whether the block maximum enters the result: for the scale, or for the amplitude of noise."""
    return noise != "none" or (scale is not None and fmt.scaled)


def bits_float32(bits: int) -> float:
    """The non-negative float32 value with these bits."""
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


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
        bits = p.iadd(bits, _FRACTION - (float32_bits(fmt.max) & _FRACTION))
    low, high = scale_exponent_range(fmt, dtype)
    # Limited before emax goes off, or a negative emax would carry the exponent out of int32.
    exponent = p.imax(p.iand(bits, _EXPONENT), (low + 127 + fmt.emax) << 23)
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


def cast(
    p: Primitives,
    y: Value,
    inverse: Value | None,
    x: Value | None,
    fmt: FloatFormat,
    scale: str | None,
    dtype: torch.dtype,
) -> Value:
    """Round ``y`` to the nearest value of the block's grid: ties to even, subnormals kept, saturating.

    Args:
        p: the operations to write it in.
        y: float32.
        inverse: float32, 1 / X, see `block_scale`; None for X = 1.
        x: float32, the block scale X; None where `needs_block_maximum` says no.
        fmt: the element format.
        scale: see `scale_bits`; None for X = 1.
        dtype: the weight's; the result is finite in it.

    Returns:
        float32 on the grid. NaN wherever ``x`` is; without ``x``, where ``y`` is.
    """
    q = p.float_bits(y if inverse is None else p.fmul(y, inverse))
    magnitude = p.iand(q, _MAGNITUDE)
    largest = float32_bits(largest_value(fmt, scale, dtype))
    if fmt.scaled:
        rounded = _round_scaled(p, p.imin(magnitude, largest), fmt)
    else:
        rounded = p.imin(_round_wide(p, magnitude, fmt.mantissa_bits), largest)
    if x is None:
        rounded = p.iselect(p.ilt(magnitude, _EXPONENT), rounded, _NAN)
        return p.bits_float(p.ior(rounded, p.iand(q, _SIGN)))
    signed = p.bits_float(p.ior(rounded, p.iand(q, _SIGN)))
    return p.fmul(signed, x)


def broken_block(p: Primitives, amax: Value, x_bits: Value) -> Value:
    """The bits of X; those of a NaN where the block has a NaN or an Inf, so that it becomes NaN as a whole."""
    finite = p.ilt(p.iand(p.float_bits(amax), _MAGNITUDE), _EXPONENT)
    return p.iselect(finite, x_bits, _NAN)


def _round_scaled(p: Primitives, magnitude: Value, fmt: FloatFormat) -> Value:
    """Round the bits of ``|y| / X``: adding and subtracting ``c = 2**(e + 23 - M)`` leaves M bits behind exponent e.

    ``e`` is that of the value, not below the format's smallest normal exponent. Both sums stay below ``2 c`` because
    ``M <= 22``; the value comes saturated, so ``c`` does not overflow.
    """
    m = fmt.mantissa_bits
    smallest = float32_bits(fmt.min_normal)
    if m == 23:  # float32's own precision: only what lies below the smallest normal value is rounded
        c = p.fselect(p.ilt(magnitude, smallest), fmt.min_normal, 0.0)
    else:
        # A product by a power of two: exact, and a GPU makes one instruction of it and the addition behind it.
        c = p.fmul(p.bits_float(p.imax(p.iand(magnitude, _EXPONENT), smallest)), 2.0 ** (23 - m))
    return p.float_bits(p.fsub(p.fadd(p.bits_float(magnitude), c), c))


def _round_wide(p: Primitives, magnitude: Value, m: int) -> Value:
    """Round the bits of ``|y|`` to M mantissa bits at float32's own exponents, subnormals included."""
    drop = 23 - m
    if drop == 0:
        return magnitude
    odd = p.iand(p.ishr(magnitude, drop), 1)
    up = p.iadd(p.iadd(magnitude, (1 << (drop - 1)) - 1), odd)
    return p.iand(up, wrap_int32(-(1 << drop)))
