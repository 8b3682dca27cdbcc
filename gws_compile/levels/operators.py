"""The operators ``gws::cast_to_levels`` and ``gws::levels_gradient``, with autograd."""

from __future__ import annotations

from typing import Any

import torch

from . import nearest
from .arguments import LevelsArguments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _cast_to_levels(
    w: torch.Tensor,
    levels: torch.Tensor | None,
    table: list[float],
    batch_dims: int,
    block: list[int],
    scale: str,
    out_dtype: torch.dtype | None,
    keep: bool,
    version: int,
) -> torch.Tensor:
    """Cast a weight onto levels that are trained: ``s * p[q(w / s)]`` (arXiv 1802.05668, section 4).

    The gradient of ``w`` is that of the result, dL/dp that of `gws_compile.levels.nearest.levels_gradient`.

    Args:
        w: the weight, float32, bfloat16 or float16, two or more dims.
        levels: float32, (levels,), in any order; None for ``table``, whose levels are not trained.
        table: what the levels began as: its largest magnitude is what block maxima are mapped to.
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        block: block shape; 0 for a side that is as long as the matrix.
        scale: ``"amax"``, or ``""`` for none.
        out_dtype, keep: as of `gws_compile.ops.sample_weight.sample_weight`.
        version: `gws_compile.levels.arguments.LEVELS_VERSION`.

    Returns:
        Shape and strides of ``w``. A block with a NaN or an Inf is NaN; without a scale, the element alone.
    """
    given = LevelsArguments(w, levels, table, batch_dims, block, scale, out_dtype, keep, version)
    return torch.empty_like(w, dtype=out_dtype or w.dtype).copy_(computed(given))


cast_to_levels = torch.library.custom_op("gws::cast_to_levels", _cast_to_levels, mutates_args=())
cast_to_levels_whole = torch.library.custom_op("gws::cast_to_levels_whole", _cast_to_levels, mutates_args=())
"""The same, as Inductor calls it where it is not to take it apart."""


def computed(given: LevelsArguments) -> torch.Tensor:
    """The result of a call, in plain torch operations; its strides are those of a contiguous tensor."""
    w, out_dtype = given.w, given.out_dtype or given.w.dtype
    cast = nearest.cast_to_levels(
        w, _levels(given), given.largest, given.batch_dims, given.block, scaled=bool(given.scale)
    )
    return cast.to(out_dtype)


def _levels(given: LevelsArguments) -> torch.Tensor:
    if given.levels is not None:
        levels: torch.Tensor = given.levels
        return levels
    return torch.tensor(list(given.table), dtype=torch.float32, device=given.w.device)


@cast_to_levels.register_fake
@cast_to_levels_whole.register_fake
def _(*arguments: Any) -> torch.Tensor:
    given = LevelsArguments(*arguments)
    if given.w.dtype not in DTYPES:
        raise TypeError(f"gws::cast_to_levels takes weights of {', '.join(map(str, DTYPES))}, got {given.w.dtype}")
    given.check_version()
    return torch.empty_like(given.w, dtype=given.out_dtype or given.w.dtype)


@torch.library.custom_op("gws::levels_gradient", mutates_args=())
def levels_gradient(
    grad: torch.Tensor,
    w: torch.Tensor,
    levels: torch.Tensor,
    table: list[float],
    batch_dims: int,
    block: list[int],
    scale: str,
    version: int,
) -> torch.Tensor:
    """The gradient of trained levels, see `gws_compile.levels.nearest.levels_gradient`.

    Args:
        grad: that of the result of ``gws::cast_to_levels``, of its shape.
        w, levels, table, batch_dims, block, scale, version: of it.

    Returns:
        float32, shape of ``levels``.
    """
    given = LevelsArguments(w, levels, table, batch_dims, block, scale, version=version)
    return nearest.levels_gradient(grad, w, levels, given.largest, batch_dims, block, scaled=bool(scale))


@levels_gradient.register_fake
def _(
    grad: torch.Tensor,
    w: torch.Tensor,
    levels: torch.Tensor,
    table: list[float],
    batch_dims: int,
    block: list[int],
    scale: str,
    version: int,
) -> torch.Tensor:
    return torch.empty_like(levels)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    given = LevelsArguments(*inputs)
    ctx.dtype = given.w.dtype
    ctx.trained = given.levels is not None
    if ctx.trained:
        ctx.save_for_backward(given.w, given.levels)
        ctx.rest = (list(given.table), given.batch_dims, list(given.block), given.scale, given.version)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    of_levels = None
    if ctx.trained and ctx.needs_input_grad[1]:
        w, levels = ctx.saved_tensors
        of_levels = levels_gradient(grad, w, levels, *ctx.rest)
    return (grad.to(ctx.dtype), of_levels, *[None] * 7)


cast_to_levels.register_autograd(_backward, setup_context=_setup_context)
