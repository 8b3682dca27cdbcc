"""The quotient of two floats, rounded to nearest on every device.

A CPU divides so. A GPU's own division is off by up to two units in the last place (``div.full.f32``, which Triton
writes for ``/``), and where the divisor is a constant, eager torch on a GPU multiplies by its reciprocal. So the
quotient that a device gives is a first guess: what is left over is computed in integers, exactly, and moves it to the
nearest.
"""

from __future__ import annotations

from .float32 import EXPONENT, FRACTION, float32_bits
from .primitives import Primitives, Value

_ONE = 127 << 23
_LEADING = 1 << 23
_STEPS = 3
"""Corrections by one unit in the last place: one more than a device is off."""


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
    guess = p.fdiv(_in_first_binade(p, x_bits), _in_first_binade(p, y_bits))
    # The quotient of two numbers from [1, 2) lies between 1/2 and 2, both excluded.
    quotient = p.imax(p.imin(p.float_bits(guess), _ONE + FRACTION), _ONE - _LEADING)
    at_one, below_one = _times(p, dividend, 1 << 23), _times(p, dividend, 1 << 24)
    for _ in range(_STEPS):
        mantissa = p.ior(p.iand(quotient, FRACTION), _LEADING)
        whole = p.iselect(p.ilt(quotient, _ONE), below_one, at_one)
        # dividend * 2**23 (or 2**24) - mantissa * divisor: numbers of 48 bits, whose difference has fewer than 28, so
        # that arithmetic mod 2**32 gives it. The nearest mantissa leaves less than half of the divisor.
        rest = p.isub(whole, p.imul(mantissa, divisor))
        twice = p.iadd(rest, rest)
        down = p.iselect(p.ilt(twice, _minus(p, divisor)), -1, 0)
        quotient = p.iadd(quotient, p.iselect(p.ilt(divisor, twice), 1, down))
    exponent = _minus_exponents(p, x_bits, y_bits)
    return p.bits_float(p.iadd(quotient, exponent))


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
        product = x * factor & 0xFFFFFFFF
        return product - (1 << 32) if product >= 1 << 31 else product
    return p.imul(x, factor)


def _minus(p: Primitives, x: Value) -> Value:
    return -x if isinstance(x, int) else p.isub(0, x)


def _minus_exponents(p: Primitives, x: Value, y: Value) -> Value:
    x, y = (v & EXPONENT if isinstance(v, int) else p.iand(v, EXPONENT) for v in (x, y))
    return x - y if isinstance(x, int) and isinstance(y, int) else p.isub(x, y)
