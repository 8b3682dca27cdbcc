"""The weights as they are sampled now, part by part, in eager torch: what metrics and histograms are counted from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..config import Config
from ..numerics.blocks import Blocks, block_maximum, matrix_shape
from ..numerics.keys import key_words
from ..numerics.primitives import TorchPrimitives, wrap_int32
from ..numerics.spec import SampleSpec
from ..ops.eager import sample_eager
from ..runtime.sampled_weights import SampledWeight
from ..torch_internals.distributed import whole_tensor

PART_ELEMENTS = 2**22
"""Elements that are looked at together: bounds the memory taken, about 100 bytes each."""


@dataclass(frozen=True)
class SamplingState:
    """How weights are sampled now.

    Attributes:
        config: the settings.
        step: number of the draw.
        frozen: learned widths are fixed, and noisy samples are cast to their formats too.
    """

    config: Config
    step: int
    frozen: bool = False


@dataclass(frozen=True)
class Part:
    """Some rows of a weight.

    Attributes:
        w: (matrices, rows, columns), in the dtype in which the weight is sampled.
        cast: without noise, shape and dtype of ``w``.
        noisy: with the noise of the draw; None for a weight that gets none.
        largest: float64, of each element's block: the grid's largest value; NaN in a broken block.
    """

    w: torch.Tensor
    cast: torch.Tensor
    noisy: torch.Tensor | None
    largest: torch.Tensor


def parts(
    weight: SampledWeight, parameter: torch.Tensor | None, state: SamplingState, *, elements: int | None = None
) -> Iterator[Part]:
    """Sample a weight part by part, as the compiled graphs do, bit for bit.

    Args:
        weight: the weight. A DTensor is gathered, which every rank has to take part in.
        parameter: that of its learned widths, see `gws_compile.numerics.widths.parameter_shape`; None for a fixed
            width.
        state: how.
        elements: how many come together, about; `PART_ELEMENTS` when None.
    """
    elements = elements or PART_ELEMENTS
    config = state.config
    spec = config.sample_spec(weight.dtype)
    if parameter is None:
        spec = replace(spec, rule=None)
    without_noise = replace(spec, noise="none")
    value = whole_tensor(weight.value).to(weight.dtype)
    count, rows, cols = whole = matrix_shape(value.shape, weight.batch_dims)
    w = value.reshape(whole)
    side = config.block[0]
    if parameter is not None and parameter.ndim:
        parameter = parameter.detach().view(count, -(-rows // side), -1)
    key = torch.tensor(key_words(config.seed, weight.name), dtype=torch.int32, device=w.device)
    clock = torch.tensor([wrap_int32(state.step), -1, -int(state.frozen)], dtype=torch.int32, device=w.device)
    height = max(elements // cols // side, 1) * side
    depth = max(elements // (rows * cols), 1)
    for first in range(0, count, depth):
        for start in range(0, rows, height):
            part = w[first : first + depth, start : start + height]
            learned = parameter
            if learned is not None and learned.ndim:
                learned = learned[first : first + depth, start // side : -(-(start + height) // side)]
            noisy = None
            if weight.noisy:
                noisy = sample_eager(
                    part, spec, 1, config.block, key, clock, learned, whole=whole, offset=(first, start, 0)
                )
            cast = sample_eager(part, without_noise, 1, config.block, learned=learned)
            yield Part(part, cast, noisy, _largest(part, learned, spec, config.block))


def _largest(w: torch.Tensor, learned: torch.Tensor | None, spec: SampleSpec, block: tuple[int, int]) -> torch.Tensor:
    p = TorchPrimitives()
    blocks = Blocks(w, 1, block)
    amax = block_maximum(blocks.matrices(w), block)
    x, largest = spec.grid_limit(p, amax, None if learned is None else learned.detach().expand(amax.shape))
    # Two factors of float32: their product may lie beyond it.
    return blocks.expand(x.double() * (largest.double() if isinstance(largest, torch.Tensor) else largest))
