"""The cast whose format depends on the block, as with learned widths: `cast` with the format's numbers as operands."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from .cast import largest_value
from .elements import ElementFormat
from .float32 import EXPONENT, MAGNITUDE, SIGN, float32_bits, nearest_float32
from .primitives import Primitives, Value
from .scales import amax_scale, broken_block, scale_bits
from .widths import WidthRule


@dataclass(frozen=True)
class Grid:
    """What the cast of an element needs to know of its block: int32 values.

    Attributes:
        x: bits of the block scale X.
        largest: bits of the largest ``|y| / X``.
        smallest: bits of the smallest normal ``|y| / X``.
        shift: what is added to the bits of a power of two for the constant that rounds in its binade.
        inverse: bits of 1 / X; None where X is a power of two, whose bits say those of its reciprocal.
    """

    x: Value
    largest: Value
    smallest: Value
    shift: Value
    inverse: Value | None = None


def block_grid(
    p: Primitives,
    b: Value,
    amax: Value,
    drawing: Value | None,
    fmt: ElementFormat,
    rule: WidthRule,
    scale: str | None,
    dtype: torch.dtype,
) -> Grid:
    """The grid that a block is cast to.

    Args:
        p: the operations to write it in.
        b: float32 width.
        amax: float32 block maximum.
        drawing: int32, -1 while noise is drawn at learned widths: the grid is that of ``fmt``. 0, or None: the grid is
            that of the width's format.
        fmt: the format of training.
        rule: its formats.
        scale: rule of the block scale.
        dtype: the weight's.
    """
    grids = [_grid(p, amax, candidate, scale, dtype) for candidate in rule.formats]
    bits = p.float_bits(b)
    chosen = grids[-1]
    for reach, grid in zip(reversed(rule.reaches), reversed(grids[:-1]), strict=True):
        beyond = p.ilt(float32_bits(nearest_float32(reach)), bits)
        chosen = _select(p, beyond, chosen, grid)
    if drawing is not None:
        chosen = _select(p, p.ilt(drawing, 0), _grid(p, amax, fmt, scale, dtype), chosen)
    return replace(chosen, x=broken_block(p, amax, chosen.x))


def _select(p: Primitives, mask: Value, x: Grid, y: Grid) -> Grid:
    def select(a: Value, b: Value) -> Value:
        if a is None or (isinstance(a, int) and isinstance(b, int) and a == b):
            return a
        return p.iselect(mask, a, b)

    return Grid(*(select(getattr(x, field.name), getattr(y, field.name)) for field in fields(Grid)))


# A format with 8 exponent bits has no scale, but `cast_to_grid` computes with one: the block maximum goes to 2**100,
# where every normal float32 value below it is normal too, and `shift` does not overflow.
_WIDE_EXPONENT = 100


def _grid(p: Primitives, amax: Value, fmt: ElementFormat, scale: str | None, dtype: torch.dtype) -> Grid:
    shift = (23 - fmt.mantissa_bits) << 23
    largest = float32_bits(largest_value(fmt, scale, dtype))
    exact = scale == "amax"
    if fmt.scaled and exact:
        inverse, scale_x = amax_scale(p, amax, fmt, dtype)
        return Grid(p.float_bits(scale_x), largest, float32_bits(fmt.min_normal), shift, inverse=p.float_bits(inverse))
    if fmt.scaled:
        x = scale_bits(p, amax, fmt, scale, dtype) if scale is not None else 127 << 23
        return Grid(x, largest, float32_bits(fmt.min_normal), shift)
    exponent = p.iand(p.float_bits(amax), EXPONENT)
    x = p.isub(p.imax(exponent, (_WIDE_EXPONENT + 1) << 23), _WIDE_EXPONENT << 23)
    # max / X and 2**-126 / X, kept where adding `shift` does not overflow; no |y| / X comes near that limit.
    limit = 231
    lowest = max((largest >> 23) + 127 - limit, 1)
    # Without a step beyond int32: signed overflow is undefined in C++, and compilers use that.
    over = p.isub(p.imax(x, lowest << 23), lowest << 23)
    largest_scaled = p.isub(largest + ((127 - lowest) << 23), over)
    smallest = p.imax(p.isub((fmt.emin + 127 + 127) << 23, x), 1 << 23)
    return Grid(x, largest_scaled, smallest, shift, inverse=p.isub(254 << 23, x) if exact else None)


def cast_to_grid(p: Primitives, y: Value, grid: Grid) -> Value:
    """`cast` with the grid as operands: float32 on the grid, NaN where the block is broken."""
    inverse = p.bits_float(p.isub(254 << 23, grid.x) if grid.inverse is None else grid.inverse)
    q = p.float_bits(p.fmul(y, inverse))
    magnitude = p.imin(p.iand(q, MAGNITUDE), grid.largest)
    exponent = p.imax(p.iand(magnitude, EXPONENT), grid.smallest)
    c = p.bits_float(p.iadd(exponent, grid.shift))
    rounded = p.float_bits(p.fsub(p.fadd(p.bits_float(magnitude), c), c))
    signed = p.bits_float(p.ior(rounded, p.iand(q, SIGN)))
    return p.fmul(signed, p.bits_float(grid.x))
