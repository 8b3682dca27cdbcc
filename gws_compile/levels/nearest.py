"""The cast onto levels in plain torch operations: the eager kernel, and what Inductor compiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..numerics.blocks import Blocks, block_maximum
from ..numerics.division import divide
from ..numerics.float32 import bits_float32, float32_bits
from ..numerics.primitives import TorchPrimitives

_SMALLEST, _LARGEST = 2.0**-126, 2.0**126
"""Of a scale: it and its reciprocal are normal float32 values."""


def nearest_level(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The number of the level nearest to each element.

    The levels may come in any order, as training may leave them: they are sorted, and a level reaches from the float32
    midpoint with its neighbour below, exclusive, to that with its neighbour above, inclusive.

    Args:
        x: float32.
        levels: float32, (levels,).

    Returns:
        int64, shape of ``x``: an index into ``levels``.
    """
    ordered, order = torch.sort(levels, stable=True)
    midpoints = (ordered[:-1] + ordered[1:]) * 0.5
    return order[torch.bucketize(x.contiguous(), midpoints)]


def level_scale(amax: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = a / largest``, NaN where a is NaN or Inf, and ``1 / s``; float32, rounded to nearest on every device.

    Both stay normal float32 values: s within 2**-126 and 2**126, also of a block of zeros.

    Args:
        amax: float32, the maxima of blocks.
        largest: the largest magnitude of the table.
    """
    p = TorchPrimitives()
    # float32 values that a lies within: neither they, nor their quotients, are subnormal or infinite.
    low = float32_bits(max(_SMALLEST, _SMALLEST * largest))
    high = float32_bits(min(torch.finfo(torch.float32).max, _LARGEST * largest))
    a = p.bits_float(torch.clamp(p.float_bits(amax.abs()), low, high))
    scale = torch.clamp(divide(p, a, bits_float32(float32_bits(largest))), _SMALLEST, _LARGEST)
    inverse = divide(p, 1.0, scale)
    return torch.where(amax.isfinite(), scale, torch.nan), inverse


def numbers_and_scales(
    w: torch.Tensor, levels: torch.Tensor, largest: float, batch_dims: int, block: Sequence[int | None], *, scaled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each element's level, and its block's scale.

    Args:
        w: the weight, two or more dims.
        levels: float32, (levels,).
        largest: the largest magnitude of the table that they began as.
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        block: block shape.
        scaled: whether blocks have a scale; else it is 1, and NaN for an element that is NaN or Inf.

    Returns:
        int64 and float32, (matrices, rows, columns).
    """
    blocks = Blocks(w, batch_dims, block)
    y = blocks.matrices(w)
    if not scaled:
        return nearest_level(y, levels.detach()), torch.where(y.isfinite(), 1.0, torch.nan)
    scale, inverse = level_scale(block_maximum(y, block), largest)
    return nearest_level(y * blocks.expand(inverse), levels.detach()), blocks.expand(scale)


def cast_to_levels(
    w: torch.Tensor, levels: torch.Tensor, largest: float, batch_dims: int, block: Sequence[int | None], *, scaled: bool
) -> torch.Tensor:
    """``s * p[q(w / s)]``, shape and dtype of ``w``; arguments as of `numbers_and_scales`."""
    numbers, scales = numbers_and_scales(w, levels, largest, batch_dims, block, scaled=scaled)
    return (levels.detach()[numbers] * scales).to(w.dtype).view(w.shape)


def levels_gradient(
    grad: torch.Tensor,
    w: torch.Tensor,
    levels: torch.Tensor,
    largest: float,
    batch_dims: int,
    block: Sequence[int | None],
    *,
    scaled: bool,
) -> torch.Tensor:
    """``dL/dp_j``: the sum over the elements whose level is j of ``s * dL/dw_hat``.

    Products and sums are float64, in an order that the device's threads do not change.

    Args:
        grad: dL/dw_hat, shape of ``w``.
        w, levels, largest, batch_dims, block, scaled: of `numbers_and_scales`.

    Returns:
        float32, shape of ``levels``.
    """
    numbers, scales = numbers_and_scales(w, levels, largest, batch_dims, block, scaled=scaled)
    parts = scales.double().reshape(-1) * grad.reshape(-1).double()
    # On a CPU in one pass, on one thread; elsewhere it would add with atomics, in any order.
    add = sums_in_one_pass if w.device.type == "cpu" else sums_level_by_level
    return add(numbers.reshape(-1), parts, len(levels)).float()


def sums_in_one_pass(numbers: torch.Tensor, parts: torch.Tensor, count: int) -> torch.Tensor:
    """The sums of the parts of each number, of ``count`` numbers."""
    return torch.bincount(numbers, parts, count)


def sums_level_by_level(numbers: torch.Tensor, parts: torch.Tensor, count: int) -> torch.Tensor:
    """The same in as many passes as there are numbers."""
    return torch.stack([torch.where(numbers == j, parts, 0.0).sum() for j in range(count)])
