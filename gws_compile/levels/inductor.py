"""Inductor's form of ``gws::cast_to_levels``: plain torch operations, which it fuses, of weights of whole blocks."""

from __future__ import annotations

from typing import Any

import torch

from ..numerics.blocks import clamped, matrix_shape
from ..torch_internals.compilers import decompose
from .arguments import LevelsArguments
from .operators import computed


def register() -> None:
    """Have Inductor take the operator apart from here on; the one of its gradient stays whole."""
    decompose(torch.ops.gws.cast_to_levels.default, _decomposed)


def _decomposed(*arguments: Any) -> torch.Tensor:
    given = LevelsArguments(*arguments)
    w = given.w
    _, rows, cols = matrix_shape(w.shape, given.batch_dims)
    sides = clamped(given.block, rows, cols)
    # The operator keeps the strides. And of partial blocks Inductor's loops on a CPU would leave elements out:
    # CppScheduling.try_loop_split splits a loop of 72 by 32 into 2 of 32 (docs/torch.md).
    if not w.is_contiguous() or rows % sides[0] or cols % sides[1]:
        whole: torch.Tensor = torch.ops.gws.cast_to_levels_whole(*given.call())
        return whole
    return computed(given)
