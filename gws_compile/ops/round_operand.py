"""The operator ``gws::round_operand``: the cast of a product's operand that is no weight, an activation or a gradient.

It is `gws_compile.ops.sample_weight.sample_weight` without noise, in the same arithmetic, but for two things: the cast
may round stochastically, and blocks are those of whatever matrix the operand is.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from ..numerics.spec import Rounding
from .eager import sample_eager
from .sample_arguments import RoundArguments
from .sample_weight import DTYPES


@torch.library.custom_op("gws::round_operand", mutates_args=())
def round_operand(
    x: torch.Tensor,
    key: torch.Tensor | None,
    clock: torch.Tensor | None,
    batch_dims: int,
    fmt: str,
    block: list[int],
    scale: str,
    rounding: str,
    place: int,
    switch: int,
    version: int,
) -> torch.Tensor:
    """Cast an operand: ``cast(x)``, to nearest with ties to even, or stochastically.

    Args:
        x: float32, bfloat16 or float16, two or more dims.
        key: int32, (2,): that of the weight whose product it is. None where nothing is drawn.
        clock: see `gws_compile.ops.sample_weight.sample_weight`. None where nothing is drawn or switched.
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        fmt: the ``spec`` of the element format.
        block: block shape; 0 for a side that is as long as the matrix.
        scale: one of `gws_compile.numerics.scales.OPERAND_SCALES`; ``""`` for no block scale. The second level of
            ``"nvfp4"`` is that of each matrix.
        rounding: ``"nearest"`` or ``"stochastic"``. Its words are those of the key, the draw, the place, and the
            element's row-major index.
        place: a number for the product and the operand's part in it, so that two of one weight draw different words.
        switch: bits of the clock's fifth word: while one of them is set, ``x`` stays as it is.
        version: `OPERATOR_VERSION`.

    Returns:
        Shape, strides and dtype of ``x``. A block with a NaN or an Inf is NaN. The gradient is the identity.
    """
    how = cast(Rounding, rounding)
    given = RoundArguments(x, key, clock, batch_dims, fmt, block, scale, how, place, switch, version)
    return sample_eager(x, given.spec(x.dtype), batch_dims, block, key, clock)


@round_operand.register_fake
def _(*arguments: Any) -> torch.Tensor:
    given = RoundArguments(*arguments)
    if given.x.dtype not in DTYPES:
        raise TypeError(f"gws::round_operand takes {', '.join(map(str, DTYPES))}, got {given.x.dtype}")
    given.check_version()
    return torch.empty_like(given.x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    pass


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return RoundArguments.gradients(x=grad)


round_operand.register_autograd(_backward, setup_context=_setup_context)
