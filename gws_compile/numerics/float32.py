"""The parts of a float32's bits, and the way from a number to its bits and back."""

from __future__ import annotations

import struct

from .primitives import wrap_int32

SIGN = wrap_int32(0x80000000)
MAGNITUDE = 0x7FFFFFFF
EXPONENT = 0x7F800000
FRACTION = 0x007FFFFF
NAN = 0x7FC00000


def float32_bits(value: float) -> int:
    """The bits of a non-negative float32 value as an int."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def bits_float32(bits: int) -> float:
    """The non-negative float32 value with these bits."""
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def nearest_float32(value: float) -> float:
    """The float32 value nearest to a number."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
