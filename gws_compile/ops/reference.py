"""The references in eager torch: `quantize`, the cast alone, and `sample`, noise then cast."""

from __future__ import annotations

import torch

from ..config import Config
from ..numerics.blocks import Block
from ..numerics.elements import ElementFormat
from ..numerics.keys import key_words
from ..numerics.noise import Noise
from ..numerics.primitives import wrap_int32
from ..settings.arguments import DEFAULTS
from ..settings.weight_settings import ScaleSetting
from .eager import sample_eager
from .sample_weight import DTYPES


def quantize(
    w: torch.Tensor,
    fmt: str | ElementFormat,
    block: Block | None = DEFAULTS.block,
    scale: ScaleSetting = DEFAULTS.scale,
) -> torch.Tensor:
    """Cast a weight onto a format's grid, without noise: the reference for what is deployed.

    Args:
        w: float32, bfloat16 or float16. Blocks are those of a matrix: two dims as they are, four or more (a
            convolution weight) as (out, the rest), three (expert weights) block the last two dims of each expert; a
            tensor of one dim or none is one row. A 1-d convolution's weight is ``w.flatten(1)``.
        fmt: as in `gws_compile.backend`.
        block: block shape (rows, columns), None for a whole side; sizes that are no multiple of it end in partial
            blocks. The preset's, or 32 x 32, when None.
        scale: the rule for a block's scale X: ``"floor"`` (OCP MX v1.0, section 6.3) or ``"ceil"``, powers of two, see
            `gws_compile.numerics.scales.scale_bits`; ``"amax"``, see `gws_compile.numerics.scales.amax_scale`;
            ``"nvfp4"``, see `gws_compile.numerics.nvfp4`; None (X = 1); ``"auto"`` as in `gws_compile.backend`.

    Returns:
        A new tensor of the shape and dtype of ``w``, rounded to nearest with ties to even, saturated at ``+-X * max``;
        outside autograd. A block with a NaN or an Inf is NaN.

    Raises:
        ValueError: unknown format or scale, bad block.
        TypeError: ``w`` is no tensor of these dtypes.
    """
    config = Config.make(fmt, block=block, scale=scale, noise="none")
    matrix, batch_dims = _as_matrices("quantize", w)
    result = sample_eager(matrix, config.sample_spec(w.dtype), batch_dims, config.block)
    return result.view(w.shape)


def sample(
    w: torch.Tensor,
    fmt: str | ElementFormat,
    *,
    name: str,
    step: int = 0,
    seed: int = DEFAULTS.seed,
    noise: Noise | None = DEFAULTS.noise,
    bits: float | None = None,
    block: Block | None = DEFAULTS.block,
    scale: ScaleSetting = DEFAULTS.scale,
) -> torch.Tensor:
    """Sample a weight as a compiled training graph does, bit for bit: the reference for what is trained.

    ``cast(w + R * a * 2**(1 - bits))`` with R drawn for this name, step, seed and each element (arXiv 2505.11170).

    Args:
        w: as in `quantize`; the whole weight, where ranks hold shards.
        fmt: as in `gws_compile.backend`.
        name: the weight's qualified name in the outermost module that is called, such as ``"layers.0.fc.weight"``;
            `Backend.state_dict` lists the names.
        step: number of the draw: how many optimizer steps came before, with ``resample="step"``.
        seed: that of the backend.
        noise: ``"rounded_normal"``, the default, ``"uniform"`` or ``"none"``.
        bits: bit width b; when None the format's mantissa bits + 2, and N for intN.
        block: block shape, as in `quantize`.
        scale: rule of the block scale, as in `quantize`.

    Returns:
        A new tensor of the shape and dtype of ``w``, outside autograd.

    Raises:
        ValueError: a bad setting. TypeError: ``w`` is no tensor of these dtypes.
    """
    config = Config.make(fmt, noise=noise, bits=bits, block=block, scale=scale, seed=seed)
    matrix, batch_dims = _as_matrices("sample", w)
    key = torch.tensor(key_words(seed, name), dtype=torch.int32, device=w.device)
    clock = torch.tensor([wrap_int32(step), -1], dtype=torch.int32, device=w.device)
    result = sample_eager(matrix, config.sample_spec(w.dtype), batch_dims, config.block, key, clock)
    return result.view(w.shape)


def _as_matrices(function: str, w: torch.Tensor) -> tuple[torch.Tensor, int]:
    if not isinstance(w, torch.Tensor) or w.dtype not in DTYPES:
        got = w.dtype if isinstance(w, torch.Tensor) else type(w).__name__
        raise TypeError(f"{function} takes a tensor of {', '.join(map(str, DTYPES))}, got {got}")
    return (w if w.ndim >= 2 else w.reshape(1, -1)), int(w.ndim == 3)
