"""The operators' eager kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..numerics.blocks import Blocks, block_maximum
from ..numerics.primitives import TorchPrimitives, Value
from ..numerics.shards import element_index
from ..numerics.spec import Operand, SampleSpec, WidthGradientSpec


def sample_eager(
    w: torch.Tensor,
    spec: SampleSpec,
    batch_dims: int,
    block: tuple[int, int],
    key: torch.Tensor | None = None,
    clock: torch.Tensor | None = None,
    learned: torch.Tensor | None = None,
    whole: Sequence[int] = (),
    offset: Sequence[int] = (),
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
    """
    if not w.numel():
        return torch.empty_like(w)
    p = TorchPrimitives()
    blocks = Blocks(w, batch_dims, block)
    y = blocks.matrices(w)
    of_block: dict[str, Operand] = {}
    if spec.block_values:
        amax = block_maximum(y, block)
        parameter = None if learned is None else learned.detach().expand(amax.shape)
        of_block = spec.of_block(
            p,
            lambda: amax,
            None if parameter is None else lambda: parameter,
            None if clock is None else clock.__getitem__,
        )

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


def bits_gradient_eager(
    grad: torch.Tensor,
    w: torch.Tensor,
    key: torch.Tensor,
    clock: torch.Tensor,
    learned: torch.Tensor,
    spec: WidthGradientSpec,
    batch_dims: int,
    block: tuple[int, int],
    whole: Sequence[int] = (),
    offset: Sequence[int] = (),
) -> torch.Tensor:
    """The gradient of a width parameter; arguments as in `sample_eager`, ``grad`` that of the sampled weight."""
    if not w.numel():
        return torch.zeros_like(learned)
    p = TorchPrimitives()
    blocks = Blocks(w, batch_dims, block)
    index = blocks.matrices(element_index(w.shape, whole or w.shape, offset or [0] * w.ndim, w.device))
    r = spec.of_element(p, lambda: index, key.__getitem__, clock.__getitem__)
    total = blocks.sum(blocks.matrices(grad) * r)
    amax = block_maximum(blocks.matrices(w), block)
    parameter = learned.detach()
    gradient = spec.of_block(p, lambda: total, lambda: amax, lambda: parameter.expand(amax.shape))
    if parameter.ndim == 0:
        gradient = gradient.sum()
    of_parameter = spec.of_parameter(p, gradient.reshape(parameter.shape), parameter)
    assert isinstance(of_parameter, torch.Tensor)
    return of_parameter
