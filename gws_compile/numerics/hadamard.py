"""The random Hadamard transform of groups of elements: a rotation, after which outliers are spread over their group.

    y = x S H / sqrt(n)          of each group of n elements, H Sylvester's matrix, H[i, j] = (-1)**popcount(i & j)

S is diagonal, with one fixed vector of signs: "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149) keeps
one for the whole training, and TransformerEngine has this one for n = 16. Since H S is orthogonal, the product of two
operands that are both transformed along what is summed over is that of the two as they were.

The sum over a group is that of the fast transform, pair by pair, in float32: every device adds in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .cast import round_to_dtype
from .float32 import SIGN, nearest_float32
from .primitives import Primitives, Value

SIZES = (16, 32, 128)
"""Elements of a group."""

_SIGNS = "+++-+------+-+--"


def signs(size: int) -> tuple[int, ...]:
    """The diagonal of S: 1 or -1 for each element of a group; the vector for 16 again and again in larger ones."""
    return tuple(1 if _SIGNS[i % len(_SIGNS)] == "+" else -1 for i in range(size))


def transform_group(p: Primitives, elements: Sequence[Value], dtype: torch.dtype) -> list[Value]:
    """All elements of a transformed group, by the fast transform.

    Args:
        p: the operations to write it in.
        elements: float32, those of the group.
        dtype: what the results are rounded to: that of the operand.

    Returns:
        float32 values of the dtype.
    """
    size = len(elements)
    terms = [x if sign > 0 else p.fsub(0.0, x) for x, sign in zip(elements, signs(size), strict=True)]
    half = 1
    while half < size:
        pairs = [(i, i | half) for i in range(size) if not i & half]
        for first, second in pairs:
            low, high = terms[first], terms[second]
            terms[first], terms[second] = p.fadd(low, high), p.fsub(low, high)
        half *= 2
    return [_scaled(p, term, size, dtype) for term in terms]


def transform_stage(
    p: Primitives, load: Callable[[int], Value], flip: Value, last: tuple[int, torch.dtype] | None
) -> Value:
    """An element behind one stage of the fast transform, where each stage is stored.

    Args:
        p: the operations to write it in.
        load: float32, the lower element of its pair, 0, or the upper one, 1; in the first stage with the signs of S.
        flip: int32, the sign bit where the element is the upper one; else 0.
        last: size of a group and dtype of the operand, behind the last stage; else None.
    """
    term = p.fadd(load(0), _flipped(p, load(1), flip))
    return term if last is None else _scaled(p, term, *last)


def transform(
    p: Primitives, load: Callable[[int], Value], flip: Callable[[int], Value], size: int, dtype: torch.dtype
) -> Value:
    """An element of the transformed group, by the sum that the fast transform makes for it: the same value.

    Args:
        p: the operations to write it in.
        load: float32, an element of the group by its position.
        flip: int32, the sign bit alone where a bit, by its number, of the element's own position is set; else 0.
        size: n, of `SIZES`.
        dtype: what the result is rounded to: that of the operand.

    Returns:
        float32, a value of the dtype.
    """
    terms = [load(i) if sign > 0 else _flipped(p, load(i), SIGN) for i, sign in enumerate(signs(size))]
    bit = 0
    while len(terms) > 1:
        sign_bit = flip(bit)
        pairs = zip(terms[::2], terms[1::2], strict=True)
        terms = [p.fadd(first, _flipped(p, second, sign_bit)) for first, second in pairs]
        bit += 1
    return _scaled(p, terms[0], size, dtype)


def _flipped(p: Primitives, x: Value, sign_bit: Value) -> Value:
    """The value with its sign turned where the bit is set."""
    return p.bits_float(p.ixor(p.float_bits(x), sign_bit))


def _scaled(p: Primitives, total: Value, size: int, dtype: torch.dtype) -> Value:
    """What a sum over a group becomes."""
    return round_to_dtype(p, p.fmul(total, nearest_float32(1 / math.sqrt(size))), dtype)
