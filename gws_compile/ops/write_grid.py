"""Writing an updated weight onto its format's grid by stochastic rounding, as Direct Quantized Training does.

    w = round_stochastic(w_updated)          E[w] = w_updated

K. Zhao et al., "Direct Quantized Training of Language Models with Stochastic Rounding" (arXiv 2412.04787). Apart from
that paper's code the scale is that of the updated weight's maximum of ``|w|``, of each block.

What is written stays where it is: `cast` gives it back bit for bit, and so does a second writing, whatever the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..numerics.blocks import Blocks, block_argument, block_maximum
from ..numerics.cast import largest_value
from ..numerics.division import LAST_BITS
from ..numerics.noise import random_word
from ..numerics.nvfp4 import neighbouring_maxima
from ..numerics.primitives import TorchPrimitives
from ..numerics.scales import neighbouring_tops
from ..numerics.shards import element_index
from ..numerics.spec import SampleSpec, key_at
from .eager import sample_eager
from .round_operand import round_operand
from .sample_arguments import RoundArguments

WRITE_PLACE, LIFT_PLACE = 2**30, 2**30 + 1
"""`SampleSpec.place` of the two roundings: numbers that no product's operand has."""


def write_to_grid(
    w: torch.Tensor,
    spec: SampleSpec,
    batch_dims: int,
    block: Sequence[int | None],
    key: torch.Tensor,
    clock: torch.Tensor,
) -> torch.Tensor:
    """Round a weight to its grid, up or down by chance, so that the weight is the mean of the results.

    The grid moves with the block maximum, which is rounded first: where a scale cannot follow it (``"floor"`` between
    ``max * X`` and the next power of two, NVFP4 between two values of ``S_b``) what lies beyond the lower of the two
    maxima goes to one of them by chance. Without this a block's maximum would never grow past such a gap in small
    updates.

    Args:
        w: float32, bfloat16 or float16; the whole weight.
        spec: how it is cast, without noise.
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        block: block shape.
        key: int32, (2,), of the weight.
        clock: int32 words; the first is the number of the draw.

    Returns:
        Shape and dtype of ``w``; a value of ``w`` that `cast` gives back is itself. A block with a NaN or an Inf is
        NaN. Saturates where no scale of the format can hold a value.
    """
    y = w
    if spec.fmt.scaled and spec.scale == "floor":
        y = _with_maxima_on_grid(w, spec, batch_dims, block, key, clock)
    elif spec.scale == "nvfp4":
        # Of a maximum on the grid, rounded to 16 bits or not, the scale is found again but for its last bits.
        lifted = _with_maxima_on_grid(w, spec, batch_dims, block, key, clock)
        y = _but_on_grid(w, _cast(w, spec, batch_dims, block), lifted)
    chance = replace(spec, rounding="stochastic", place=WRITE_PLACE)
    y = _but_on_grid(y, _cast(y, spec, batch_dims, block), _cast(y, chance, batch_dims, block, key, clock))
    if spec.scale in ("amax", "nvfp4"):
        # A scale that is divided for, of the maximum that it has rounded, may differ in its last bit.
        for _ in range(2):
            y = _cast(y, spec, batch_dims, block)
    return y


def _cast(
    w: torch.Tensor,
    spec: SampleSpec,
    batch_dims: int,
    block: Sequence[int | None],
    key: torch.Tensor | None = None,
    clock: torch.Tensor | None = None,
) -> torch.Tensor:
    """The cast; by its operator, which Inductor has kernels for, where graphs read the weight as it is stored."""
    if w.dtype != spec.dtype:
        return sample_eager(w, spec, batch_dims, block, key, clock)
    given = RoundArguments(
        w,
        key,
        clock,
        batch_dims,
        spec.fmt.spec,
        block_argument(block),
        spec.scale or "",
        spec.rounding,
        spec.place,
        switch=0,
    )
    rounded: torch.Tensor = round_operand(*given.call())
    return rounded


def _but_on_grid(w: torch.Tensor, nearest: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """``rounded``, and what lies on the grid as it is, up to the last bits of a quotient."""
    on_grid = (w.float() - nearest.float()).abs() <= nearest.float().abs() * LAST_BITS
    return torch.where(on_grid, nearest, rounded)


def _with_maxima_on_grid(
    w: torch.Tensor,
    spec: SampleSpec,
    batch_dims: int,
    block: Sequence[int | None],
    key: torch.Tensor,
    clock: torch.Tensor,
) -> torch.Tensor:
    """The weight with what lies beyond the lower of two neighbouring block maxima rounded to one of them."""
    p = TorchPrimitives()
    blocks = Blocks(w, batch_dims, block)
    y = blocks.matrices(w)
    amax = block_maximum(y, block)
    if spec.scale == "nvfp4":
        low, high = neighbouring_maxima(p, amax, block_maximum(y, (None, None), finite=True).expand(amax.shape))
    else:
        low, high = neighbouring_tops(p, amax, spec.fmt, largest_value(spec.fmt, spec.scale, spec.dtype), spec.dtype)
    finite = amax.isfinite() & high.isfinite() & (high <= torch.finfo(spec.dtype).max)
    low, high = (blocks.expand(torch.where(finite, value, torch.inf)) for value in (low, high))
    index = blocks.matrices(element_index(w.shape, w.shape, [0] * w.ndim, w.device))
    word = random_word(p, index, key_at(p, key.__getitem__, LIFT_PLACE), clock[0])
    chance = ((word >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24
    size = y.abs()
    beyond = torch.where(chance * (high - low) < size - low, high, low)
    lifted = torch.where(size > low, torch.copysign(beyond, y), y)
    return torch.empty_like(w).copy_(lifted.to(w.dtype).view(w.shape))
