"""The operators' eager kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch

from ..numerics.blocks import Blocks, block_counts, block_maximum, matrix_shape
from ..numerics.nvfp4 import stored_scale
from ..numerics.primitives import TorchPrimitives, Value
from ..numerics.shards import element_index
from ..numerics.spec import Operand, SampleSpec, WidthGradientSpec


def sample_eager(
    w: torch.Tensor,
    spec: SampleSpec,
    batch_dims: int,
    block: Sequence[int | None],
    key: torch.Tensor | None = None,
    clock: torch.Tensor | None = None,
    learned: torch.Tensor | None = None,
    whole: Sequence[int] = (),
    offset: Sequence[int] = (),
    *,
    maxima: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sample a weight; the tensors are those of `gws_compile.ops.sample_weight.sample_weight`.

    Args:
        w: the weight, of ``spec.dtype``.
        spec: what is done to it.
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        block: block shape.
        key, clock: None without noise.
        learned: None for a fixed width.
        whole, offset: where the weight is a part of one.
        maxima: of `weight_maximum`, where the weight is a part of one; None where it has all that is needed.
    """
    if not w.numel():
        return torch.empty_like(w)
    p = TorchPrimitives()
    blocks = Blocks(w, batch_dims, block)
    y = blocks.matrices(w)
    of_block: dict[str, Operand] = {}
    if spec.block_values:
        amax = _block_maxima(y, block, None if spec.needs_matrix_maximum else maxima)
        of_block = _of_block(spec, amax, _of_matrix(y, spec, maxima), learned, clock)

    def index() -> Value:
        return blocks.matrices(element_index(w.shape, whole or w.shape, offset or [0] * w.ndim, w.device))

    result = spec.of_element(
        p,
        y,
        lambda name: blocks.expand(of_block[name]()),
        index,
        None if key is None else key.__getitem__,
        None if clock is None else clock.__getitem__,
    )
    return torch.empty_like(w).copy_(result.to(w.dtype).view(w.shape))


def levels_eager(
    w: torch.Tensor,
    spec: SampleSpec,
    block: Sequence[int | None],
    learned: torch.Tensor | None = None,
    *,
    maxima: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The cast without noise, and its parts, as a file stores it: levels of the element format, and scales.

    Args:
        w: (matrices, rows, columns), of ``spec.dtype``.
        spec: what is done to it; of a format with a scale.
        block: block shape.
        learned: None for a fixed width.
        maxima: as in `sample_eager`.

    Returns:
        The cast, as `sample_eager` has it, shape and dtype of ``w``. float32: the levels, of the shape of ``w``; each
        block's scale X, (matrices, block rows, block columns); and for NVFP4 the level ``S_enc`` of each matrix,
        (matrices, 1, 1), X being its block's ``S_b`` instead.
    """
    p = TorchPrimitives()
    blocks = Blocks(w, 1, block)
    y = blocks.matrices(w)
    amax = _block_maxima(y, block, None if spec.needs_matrix_maximum else maxima)
    of_matrix = _of_matrix(y, spec, maxima)
    encode = of_matrix["encode"]() if of_matrix else None
    of_block = {name: cache(value) for name, value in _of_block(spec, amax, of_matrix, learned, None).items()}
    levels, value = spec.levels_of_element(p, y, lambda name: blocks.expand(of_block[name]()))
    cast = value.to(w.dtype)
    if encode is not None:
        x = stored_scale(p, amax, encode.expand(amax.shape))
    elif "x" in of_block:
        x = of_block["x"]()
    else:
        x = torch.ones_like(amax)
    return cast, levels, x.view(torch.float32), encode


def _of_matrix(y: torch.Tensor, spec: SampleSpec, maxima: torch.Tensor | None) -> dict[str, Operand]:
    """`SampleSpec.of_matrix` of (matrices, rows, columns)."""
    if not spec.matrix_values:
        return {}
    matrix = _block_maxima(y, (None, None), maxima, finite=True)
    return spec.of_matrix(TorchPrimitives(), lambda: matrix)


def _of_block(
    spec: SampleSpec,
    amax: torch.Tensor,
    of_matrix: Mapping[str, Operand],
    learned: torch.Tensor | None,
    clock: torch.Tensor | None,
) -> dict[str, Operand]:
    """`SampleSpec.of_block`, from the maxima of the blocks."""
    parameter = None if learned is None else learned.detach().expand(amax.shape)
    return spec.of_block(
        TorchPrimitives(),
        lambda: amax,
        None if parameter is None else lambda: parameter,
        None if clock is None else clock.__getitem__,
        lambda name: of_matrix[name]().expand(amax.shape),
    )


def _block_maxima(
    matrices: torch.Tensor, block: Sequence[int | None], maxima: torch.Tensor | None, *, finite: bool = False
) -> torch.Tensor:
    """The maxima of blocks, float32: of their bits, where they are given."""
    return block_maximum(matrices, block, finite=finite) if maxima is None else maxima.view(torch.float32)


def maximum_eager(w: torch.Tensor, batch_dims: int, block: Sequence[int], *, finite: bool) -> torch.Tensor:
    """The maxima of blocks as bits; arguments and result as of `gws_compile.ops.sample_weight.weight_maximum`."""
    matrices, rows, cols = matrix_shape(w.shape, batch_dims)
    if not w.numel():
        return torch.zeros([matrices, *block_counts(block, rows, cols)], dtype=torch.int32, device=w.device)
    return block_maximum(Blocks(w, batch_dims, block).matrices(w), block, finite=finite).view(torch.int32)


def bits_gradient_eager(
    grad: torch.Tensor,
    w: torch.Tensor,
    key: torch.Tensor,
    clock: torch.Tensor,
    learned: torch.Tensor,
    spec: WidthGradientSpec,
    batch_dims: int,
    block: Sequence[int | None],
    whole: Sequence[int] = (),
    offset: Sequence[int] = (),
    *,
    maxima: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of a width parameter; arguments as in `sample_eager`, ``grad`` that of the sampled weight."""
    if not w.numel():
        return torch.zeros_like(learned)
    p = TorchPrimitives()
    blocks = Blocks(w, batch_dims, block)
    index = blocks.matrices(element_index(w.shape, whole or w.shape, offset or [0] * w.ndim, w.device))
    r = spec.of_element(p, lambda: index, key.__getitem__, clock.__getitem__)
    total = blocks.sum(blocks.matrices(grad) * r)
    amax = _block_maxima(blocks.matrices(w), block, maxima)
    parameter = learned.detach()
    gradient = spec.of_block(p, lambda: total, lambda: amax, lambda: parameter.expand(amax.shape))
    if parameter.ndim == 0:
        gradient = gradient.sum()
    of_parameter = spec.of_parameter(p, gradient.reshape(parameter.shape), parameter)
    assert isinstance(of_parameter, torch.Tensor)
    return of_parameter
