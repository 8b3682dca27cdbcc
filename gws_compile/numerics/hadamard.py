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
    scale = nearest_float32(1 / math.sqrt(size))
    return [round_to_dtype(p, p.fmul(term, scale), dtype) for term in terms]


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
    term = p.fadd(load(0), p.bits_float(p.ixor(p.float_bits(load(1)), flip)))
    if last is None:
        return term
    size, dtype = last
    return round_to_dtype(p, p.fmul(term, nearest_float32(1 / math.sqrt(size))), dtype)


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
    terms = [
        load(i) if sign > 0 else p.bits_float(p.ixor(p.float_bits(load(i)), SIGN)) for i, sign in enumerate(signs(size))
    ]
    bit = 0
    while len(terms) > 1:
        flipped = flip(bit)
        terms = [
            p.fadd(first, p.bits_float(p.ixor(p.float_bits(second), flipped)))
            for first, second in zip(terms[::2], terms[1::2], strict=True)
        ]
        bit += 1
    return round_to_dtype(p, p.fmul(terms[0], nearest_float32(1 / math.sqrt(size))), dtype)
