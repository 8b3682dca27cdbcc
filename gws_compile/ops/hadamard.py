"""The operator ``gws::hadamard``: the random Hadamard transform of an operand, along what a product sums over."""

from __future__ import annotations

from typing import Any

import torch

from ..numerics.blocks import matrix_shape
from ..numerics.hadamard import transform_group
from ..numerics.primitives import TorchPrimitives
from .sample_arguments import HadamardArguments


@torch.library.custom_op("gws::hadamard", mutates_args=())
def hadamard(x: torch.Tensor, size: int, batch_dims: int, rows: bool, version: int) -> torch.Tensor:
    """Transform groups of ``size`` elements that lie below one another, or side by side, in each matrix.

    ``y = x S H / sqrt(size)``, see `gws_compile.numerics.hadamard`; arXiv 2509.25149.

    Args:
        x: float32, bfloat16 or float16, two or more dims.
        size: of a group, one of `gws_compile.numerics.hadamard.SIZES`; it divides the side that groups run along.
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        rows: groups run over rows, not over columns.
        version: `OPERATOR_VERSION`.

    Returns:
        Shape, strides and dtype of ``x``.
    """
    y = x.reshape(matrix_shape(x.shape, batch_dims)).to(torch.float32)
    y = y.transpose(1, 2) if rows else y
    groups = y.reshape(*y.shape[:2], -1, size)
    found = torch.stack(transform_group(TorchPrimitives(), groups.unbind(-1), x.dtype), -1).reshape(y.shape)
    found = found.transpose(1, 2) if rows else found
    return torch.empty_like(x).copy_(found.reshape(x.shape))


@hadamard.register_fake
def _(*arguments: Any) -> torch.Tensor:
    given = HadamardArguments(*arguments)
    given.check_version()
    return torch.empty_like(given.x)
