"""The block scale of NVFP4, in two levels: e4m3 for each block, and float32 for the whole matrix.

    S_enc = min(2688 / A, 2**115)            A the maximum of the matrix, 2688 = 448 * 6; 1 where A is 0
    S_b   = e4m3(min(a * (S_enc * (1/6)), 448))            a the block maximum
    q     = e2m1(w * (1 / (S_b * (1 / S_enc))))            saturated at +-6
    w_hat = q * X,  X = S_b / S_enc

Sources: "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149), and the order of the float32 operations of
TransformerEngine's reference quantizer, with which codes and scales agree bit for bit. That one has float32's largest
value for 2**115: then the scales of a matrix whose maximum is below 6.5e-32 are subnormal, and depend on a device's
mode of flushing those to zero. Here they do not.
"""

from __future__ import annotations

import torch

from .cast import round_scaled, round_stochastic
from .division import divide
from .float32 import EXPONENT, MAGNITUDE, bits_float32, float32_bits, nearest_float32
from .formats import FORMATS
from .primitives import Primitives, Value
from .scales import broken_block, largest_scale_bits

ELEMENT = FORMATS["fp4_e2m1"]
"""The format of the elements."""

_STORED = FORMATS["fp8_e4m3"]
"""The format of S_b."""

_LARGEST_ENCODE = 2.0**115
_SIXTH = nearest_float32(1 / ELEMENT.max)


def encode_scale(p: Primitives, matrix_maximum: Value) -> Value:
    """``S_enc``, float32, from the maximum over what is finite of the matrix, float32."""
    bits = p.float_bits(matrix_maximum)
    smallest = ELEMENT.max * _STORED.max / _LARGEST_ENCODE
    encode = divide(p, ELEMENT.max * _STORED.max, p.bits_float(p.imax(bits, float32_bits(smallest))))
    return p.fselect(p.ilt(0, bits), encode, 1.0)


def stored_scale(p: Primitives, amax: Value, encode: Value) -> Value:
    """``S_b``, a float32 value on e4m3's grid, 0 or more; whatever it is in a block with a NaN or an Inf.

    Args:
        p: the operations to write it in.
        amax: float32 block maximum.
        encode: ``S_enc``.
    """
    return p.bits_float(round_scaled(p, _unrounded_scale(p, amax, encode), _STORED))


def _unrounded_scale(p: Primitives, amax: Value, encode: Value) -> Value:
    """The bits of ``S_b`` before it is rounded; they are saturated."""
    scaled = p.fmul(amax, p.fmul(encode, _SIXTH))
    return p.imin(p.iand(p.float_bits(scaled), MAGNITUDE), float32_bits(_STORED.max))


def neighbouring_maxima(p: Primitives, amax: Value, matrix_maximum: Value) -> tuple[Value, Value]:
    """The two block maxima around one that are ``6 X`` for values of ``S_b``: float32, equal where it is one itself.

    Args:
        p: the operations to write it in.
        amax: float32 block maximum.
        matrix_maximum: float32, that over what is finite of the matrix.
    """
    encode = encode_scale(p, matrix_maximum)
    bits = _unrounded_scale(p, amax, encode)
    # Rounded by the least and by the greatest chance: down, and up.
    low, high = (_maximum_of(p, round_stochastic(p, bits, _STORED, word), encode) for word in (0, -1))
    return low, high


def _maximum_of(p: Primitives, stored_bits: Value, encode: Value) -> Value:
    """``6 X``, from the bits of ``S_b``."""
    empty = p.ilt(stored_bits, 1)  # divided for 1: `divide` takes no 0
    x = divide(p, p.fselect(empty, 1.0, p.bits_float(stored_bits)), encode)
    return p.fselect(empty, 0.0, p.fmul(x, ELEMENT.max))


def nvfp4_scale(p: Primitives, amax: Value, encode: Value, decode: Value, dtype: torch.dtype) -> tuple[Value, Value]:
    """What `cast` needs to know of a block: what elements are multiplied by, and X, NaN where the block is broken.

    In a block so small that ``S_b`` is 0 every value is 0, and the codes are those of the reference: saturated.

    Args:
        p: the operations to write it in.
        amax: float32 block maximum.
        encode: ``S_enc``.
        decode: ``1 / S_enc``.
        dtype: the weight's.
    """
    stored = stored_scale(p, amax, encode)
    empty = p.ilt(p.float_bits(stored), 1)
    divisor = p.fselect(empty, 1.0, stored)
    inverse = divide(p, 1.0, p.fmul(divisor, decode))
    x_bits = p.imin(p.float_bits(divide(p, divisor, encode)), largest_scale_bits(ELEMENT.max, dtype))
    x_bits = p.iselect(empty, 0, x_bits)
    inverse = p.fselect(empty, bits_float32(EXPONENT - 1), inverse)
    return inverse, p.bits_float(broken_block(p, amax, x_bits))
