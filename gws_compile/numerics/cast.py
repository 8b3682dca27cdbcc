"""The cast onto a format's grid, as float32 bit arithmetic.

Nothing here converts to a narrow dtype: Inductor drops pairs of conversions inside a fused kernel, while arithmetic on
bits stays. No step makes a float32 subnormal either (formats with 8 exponent bits apart, which are cast by integers
alone), so the result does not depend on a device's or thread's flush-to-zero mode.
"""

from __future__ import annotations

import torch

from .elements import ElementFormat
from .float32 import EXPONENT, MAGNITUDE, NAN, SIGN, bits_float32, float32_bits
from .formats import FloatFormat
from .integers import IntFormat
from .primitives import Primitives, Value, wrap_int32
from .scales import STORAGE

_HALF = FloatFormat.make(5, 10, max=65504.0)
"""float16, as an element format."""


def largest_value(fmt: ElementFormat, scale: str | None, dtype: torch.dtype) -> float:
    """Where ``|y| / X`` saturates: the format's maximum, or what the weight's dtype can hold of it."""
    emax, mantissa_bits = STORAGE[dtype]
    drop = max(fmt.mantissa_bits - mantissa_bits, 0)
    truncated = float32_bits(fmt.max) >> (23 - fmt.mantissa_bits + drop) << (23 - fmt.mantissa_bits + drop)
    scaled = fmt.scaled and scale is not None
    if scaled or fmt.emax <= emax:
        return bits_float32(truncated)
    return (2 - 2.0 ** -min(fmt.mantissa_bits, mantissa_bits)) * 2.0**emax


def cast(
    p: Primitives,
    y: Value,
    inverse: Value | None,
    x: Value | None,
    fmt: ElementFormat,
    scale: str | None,
    dtype: torch.dtype,
    word: Value | None = None,
) -> Value:
    """Round ``y`` to the nearest value of the block's grid: ties to even, subnormals kept, saturating.

    Or, with a random word, stochastically: to one of the two values around it, to each with a probability that makes
    ``y`` the mean.

    Args:
        p: the operations to write it in.
        y: float32.
        inverse: float32, 1 / X, see `block_scale`; None for X = 1.
        x: float32, the block scale X; None where `needs_block_maximum` says no.
        fmt: the element format.
        scale: see `scale_bits`; None for X = 1.
        dtype: the weight's; the result is finite in it.
        word: int32, uniform over all words; None to round to nearest.

    Returns:
        float32 on the grid. NaN wherever ``x`` is; without ``x``, where ``y`` is.
    """
    q = p.float_bits(y if inverse is None else p.fmul(y, inverse))
    magnitude = p.iand(q, MAGNITUDE)
    largest = float32_bits(largest_value(fmt, scale, dtype))
    if word is not None:
        rounded = round_stochastic(p, p.imin(magnitude, largest), fmt, word)
    elif fmt.scaled:
        rounded = round_scaled(p, p.imin(magnitude, largest), fmt)
    else:
        rounded = p.imin(_round_wide(p, magnitude, fmt.mantissa_bits), largest)
    if x is None:
        rounded = p.iselect(p.ilt(magnitude, EXPONENT), rounded, NAN)
        return p.bits_float(p.ior(rounded, p.iand(q, SIGN)))
    signed = p.bits_float(p.ior(rounded, p.iand(q, SIGN)))
    return p.fmul(signed, x)


def round_scaled(p: Primitives, magnitude: Value, fmt: ElementFormat) -> Value:
    """Round the bits of ``|y| / X``: adding and subtracting ``c = 2**(e + 23 - M)`` leaves M bits behind exponent e.

    ``e`` is that of the value, not below the format's smallest normal exponent. Both sums stay below ``2 c`` because
    ``M <= 22``; the value comes saturated, so ``c`` does not overflow. For an integer format ``c`` is ``2**23``.
    """
    m = fmt.mantissa_bits
    smallest = float32_bits(fmt.min_normal)
    c: Value
    if isinstance(fmt, IntFormat):
        c = 2.0**23
    elif m == 23:  # float32's own precision: only what lies below the smallest normal value is rounded
        c = p.fselect(p.ilt(magnitude, smallest), fmt.min_normal, 0.0)
    else:
        # A product by a power of two: exact, and a GPU makes one instruction of it and the addition behind it.
        c = p.fmul(p.bits_float(p.imax(p.iand(magnitude, EXPONENT), smallest)), 2.0 ** (23 - m))
    return p.float_bits(p.fsub(p.fadd(p.bits_float(magnitude), c), c))


def round_stochastic(p: Primitives, magnitude: Value, fmt: ElementFormat, word: Value) -> Value:
    """Round the bits of ``|y| / X``, saturated, up or down by chance: the value is the mean of the results.

    Of the ``23 - M`` bits that the grid does not have, a random number is added to, and the sum is cut: the carry is
    the step up. What lies below the smallest normal value is lifted by that value first, where the grid is as fine; of
    a value there bits below 2**-23 of it are rounded to nearest before.

    Args:
        p: the operations to write it in.
        magnitude: int32, at most the bits of the format's largest value.
        fmt: the element format.
        word: int32, uniform over all words; its low bits are used.
    """
    drop = 23 - fmt.mantissa_bits
    chance = p.iand(word, (1 << drop) - 1)
    kept = wrap_int32(-(1 << drop))
    if not fmt.scaled:  # float32's own exponents
        return p.iand(p.iadd(magnitude, chance), kept)
    lift = p.fselect(p.ilt(magnitude, float32_bits(fmt.min_normal)), fmt.min_normal, 0.0)
    lifted = p.float_bits(p.fadd(p.bits_float(magnitude), lift))
    cut = p.bits_float(p.iand(p.iadd(lifted, chance), kept))
    return p.float_bits(p.fsub(cut, lift))


def round_to_dtype(p: Primitives, y: Value, dtype: torch.dtype) -> Value:
    """``y`` rounded to what a 16-bit dtype holds, ties to even, as float32; ``y`` itself for float32. Not beyond max.

    In a fused kernel the conversion that stores the result, and the one of a reader back to float32, are dropped as a
    pair; what is on the dtype's grid already goes through them unchanged.
    """
    if dtype == torch.float32:
        return y
    bits = p.float_bits(y)
    magnitude = p.iand(bits, MAGNITUDE)
    if dtype == torch.bfloat16:
        rounded = _round_wide(p, magnitude, STORAGE[dtype][1])
    else:
        rounded = round_scaled(p, p.imin(magnitude, float32_bits(_HALF.max)), _HALF)
    # A NaN has no rest to be rounded; that of a broken block is the one written here.
    rounded = p.iselect(p.ilt(magnitude, EXPONENT), rounded, NAN)
    return p.bits_float(p.ior(rounded, p.iand(bits, SIGN)))


def needs_rounding(fmt: ElementFormat, exact_powers: bool, dtype: torch.dtype) -> bool:
    """Whether the grid has values that a 16-bit dtype does not hold.

    Args:
        fmt: the element format.
        exact_powers: whether block scales are powers of two.
        dtype: the weight's.
    """
    if dtype == torch.float16:  # its own subnormal values are coarser than those of a small block
        return True
    return dtype == torch.bfloat16 and (not exact_powers or fmt.mantissa_bits > STORAGE[dtype][1])


def _round_wide(p: Primitives, magnitude: Value, m: int) -> Value:
    """Round the bits of ``|y|`` to M mantissa bits at float32's own exponents, subnormals included."""
    drop = 23 - m
    if drop == 0:
        return magnitude
    odd = p.iand(p.ishr(magnitude, drop), 1)
    up = p.iadd(p.iadd(magnitude, (1 << (drop - 1)) - 1), odd)
    return p.iand(up, wrap_int32(-(1 << drop)))
