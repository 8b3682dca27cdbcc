"""The quotient of two floats, rounded to nearest on every device.

A CPU divides so. A GPU's own division is off by up to two units in the last place (``div.full.f32``, which Triton
writes for ``/``), and where the divisor is a constant, eager torch on a GPU multiplies by its reciprocal. So the
quotient that a device gives is a first guess: what is left over is computed in integers, exactly, and moves it to the
nearest.
"""

from __future__ import annotations

from .float32 import EXPONENT, FRACTION, float32_bits
from .primitives import Primitives, Value

LAST_BITS = 2.0**-22
"""By how much a float32 quotient times its divisor may differ from the dividend, and more."""

_ONE = 127 << 23
_LEADING = 1 << 23
_OFF = 2
"""Units in the last place that a guess may be off by."""


def divide(p: Primitives, x: Value, y: Value) -> Value:
    """``x / y`` rounded to nearest; there are no ties.

    Args:
        p: the operations to write it in.
        x: float32, positive and normal, or a Python number that is a float32 value.
        y: likewise; the quotient has to be a normal float32 value too.

    Returns:
        float32.
    """
    x_bits, y_bits = _bits(p, x), _bits(p, y)
    dividend, divisor = _mantissa(p, x_bits), _mantissa(p, y_bits)
    guess = p.float_bits(p.fdiv(_in_first_binade(p, x_bits), _in_first_binade(p, y_bits)))
    # The quotient of two numbers from [1, 2) lies in [1/2, 1) or [1, 2), and so does the guess, once that is seen to:
    # then a unit in its last place is that of the quotient.
    below_one = p.ilt(dividend, divisor)
    lowest, highest = p.iselect(below_one, _ONE - _LEADING, _ONE), p.iselect(below_one, _ONE - 1, _ONE + FRACTION)
    guess = p.imax(p.imin(guess, highest), lowest)
    # dividend * 2**24 (or 2**23) - mantissa * divisor: the difference of two numbers of 48 bits, which has fewer than
    # 28 itself, so that their low 30 bits give it. The nearest mantissa leaves less than half of the divisor.
    mantissa = p.ior(p.iand(guess, FRACTION), _LEADING)
    whole = p.iselect(below_one, _low_product(p, dividend, 24), _low_product(p, dividend, 23))
    rest = _signed(p, p.isub(whole, _low_bits_of_product(p, mantissa, divisor)))
    twice = p.iadd(rest, rest)
    quotient = guess
    for unit in range(_OFF):
        reach = _times(p, divisor, 2 * unit + 1)
        quotient = p.iadd(quotient, p.iselect(p.ilt(reach, twice), 1, 0))
        quotient = p.isub(quotient, p.iselect(p.ilt(twice, _minus(p, reach)), 1, 0))
    return p.bits_float(p.iadd(quotient, _minus_exponents(p, x_bits, y_bits)))


def _bits(p: Primitives, x: Value) -> Value:
    return float32_bits(x) if isinstance(x, float) else p.float_bits(x)


def _mantissa(p: Primitives, bits: Value) -> Value:
    if isinstance(bits, int):
        return (bits & FRACTION) | _LEADING
    return p.ior(p.iand(bits, FRACTION), _LEADING)


def _in_first_binade(p: Primitives, bits: Value) -> Value:
    if isinstance(bits, int):
        return 1.0 + (bits & FRACTION) / _LEADING
    return p.bits_float(p.ior(p.iand(bits, FRACTION), _ONE))


def _times(p: Primitives, x: Value, factor: int) -> Value:
    if isinstance(x, int):
        return x * factor
    return x if factor == 1 else p.imul(x, factor)


_LOW = 30
_LIMB = 15


def _low_product(p: Primitives, x: Value, power: int) -> Value:
    """The low 30 bits of ``x * 2**power``."""
    kept = (1 << (_LOW - power)) - 1
    return (x & kept) << power if isinstance(x, int) else p.imul(p.iand(x, kept), 1 << power)


def _low_bits_of_product(p: Primitives, x: Value, y: Value) -> Value:
    """A number with the low 30 bits of the product of two numbers of 24 bits.

    No step leaves int32: signed overflow is undefined in C++, and compilers use that.
    """
    x_low, x_high = _limbs(p, x)
    y_low, y_high = _limbs(p, y)
    crossed = p.iand(p.iadd(p.imul(x_high, y_low), p.imul(x_low, y_high)), (1 << _LIMB) - 1)
    return p.iadd(p.imul(x_low, y_low), p.imul(crossed, 1 << _LIMB))


def _limbs(p: Primitives, x: Value) -> tuple[Value, Value]:
    low = (1 << _LIMB) - 1
    return (x & low, x >> _LIMB) if isinstance(x, int) else (p.iand(x, low), p.ishr(x, _LIMB))


def _signed(p: Primitives, x: Value) -> Value:
    """The number of 30 bits, sign included, that ``x`` has as its low bits."""
    sign = 1 << (_LOW - 1)
    return p.isub(p.ixor(p.iand(x, (1 << _LOW) - 1), sign), sign)


def _minus(p: Primitives, x: Value) -> Value:
    return -x if isinstance(x, int) else p.isub(0, x)


def _minus_exponents(p: Primitives, x: Value, y: Value) -> Value:
    x, y = (v & EXPONENT if isinstance(v, int) else p.iand(v, EXPONENT) for v in (x, y))
    return x - y if isinstance(x, int) and isinstance(y, int) else p.isub(x, y)
