"""The cast alone: `quantize`."""

from __future__ import annotations

import torch

from .config import Config, Scale
from .formats import FloatFormat
from .sampling import DTYPES, sample_eager


def quantize(
    w: torch.Tensor, fmt: str | FloatFormat, block: tuple[int, int] = (32, 32), scale: Scale = "floor"
) -> torch.Tensor:
    """Cast a weight onto a format's grid, without noise: the reference for what is deployed.

    Args:
        w: float32, bfloat16 or float16. Blocks are those of a matrix: two dims as they are, four or more (a
            convolution weight) as (out, the rest), three (expert weights) block the last two dims of each expert; a
            tensor of one dim or none is one row. A 1-d convolution's weight is ``w.flatten(1)``.
        fmt: format name or `FloatFormat`.
        block: block shape (rows, columns); sizes that are no multiple of it end in partial blocks.
        scale: the rule for a block's scale X, a power of two: ``"floor"`` (OCP MX v1.0, section 6.3), ``"ceil"`` or
            None (X = 1); see `gws_compile.cast.scale_bits`.

    Returns:
        A new tensor of the shape and dtype of ``w``, rounded to nearest with ties to even, saturated at ``+-X * max``;
        outside autograd. A block with a NaN or an Inf is NaN.

    Raises:
        ValueError: unknown format or scale, bad block.
        TypeError: ``w`` is no tensor of these dtypes.
    """
    config = Config.make(fmt, block=block, scale=scale, noise="none")
    if not isinstance(w, torch.Tensor) or w.dtype not in DTYPES:
        got = w.dtype if isinstance(w, torch.Tensor) else type(w).__name__
        raise TypeError(f"quantize takes a tensor of {', '.join(map(str, DTYPES))}, got {got}")
    matrix = w if w.ndim >= 2 else w.reshape(1, -1)
    batch_dims = 1 if w.ndim == 3 else 0
    result = sample_eager(
        matrix, None, None, 0, batch_dims, config.fmt, config.bits, "none", config.block, config.scale
    )
    return result.view(w.shape)
