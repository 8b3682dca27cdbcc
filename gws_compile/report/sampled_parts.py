"""The weights as they are sampled now, part by part, in eager torch: what metrics and histograms are counted from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..config import Config
from ..levels.nearest import cast_to_levels, numbers_and_scales
from ..numerics.blocks import Blocks, block_maximum, matrix_shape
from ..numerics.division import LAST_BITS
from ..numerics.elements import ElementFormat
from ..numerics.keys import key_words
from ..numerics.primitives import TorchPrimitives
from ..numerics.sparsity import keep
from ..numerics.spec import SampleSpec
from ..ops.eager import sample_eager
from ..ops.parts import weight_parts
from ..runtime.clock import DrawState, clock_words
from ..runtime.sampled_weights import SampledWeight
from ..settings.levels import Levels
from ..settings.schedule import Schedule
from ..torch_internals.distributed import whole_tensor

PART_ELEMENTS = 2**22
"""Elements that are looked at together: bounds the memory taken, about 100 bytes each."""


@dataclass(frozen=True)
class SamplingState:
    """How weights are sampled now.

    Attributes:
        config: the settings.
        draw: what a forward sees of the clock. That noise is switched off here and now is left out of account.
        fmt: the element format, without block scales, that samples are cast to; the weight's own when None.
    """

    config: Config
    draw: DrawState
    fmt: ElementFormat | None = None

    @property
    def clock(self) -> tuple[int, ...]:
        """The words of the clock."""
        return clock_words(self.draw.with_noise(), self.config.schedule or Schedule())


@dataclass(frozen=True)
class Part:
    """Some rows of a weight.

    Attributes:
        w: (matrices, rows, columns), in the dtype in which the weight is sampled; 0 where it is masked.
        cast: without noise, shape and dtype of ``w``.
        noisy: with the noise of the draw; None for a weight that gets none.
        largest: float64, of each element's block: the grid's largest value, with an exact scale the block maximum; NaN
            in a broken block.
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
        parameter: that of its learned widths, see `gws_compile.numerics.widths.parameter_shape`, or its levels, of
            which it comes as one part; None for a fixed width.
        state: how.
        elements: how many come together, about; `PART_ELEMENTS` when None.
    """
    if weight.settings.levels is not None:
        assert parameter is not None
        yield _of_levels(weight, weight.settings.levels, parameter)
        return
    elements = elements or PART_ELEMENTS
    spec = weight.settings.sample_spec(weight.dtype)
    if parameter is None:
        spec = replace(spec, rule=None)
    if state.fmt is not None:
        spec = replace(spec, fmt=state.fmt, scale=None)
    without_noise = replace(spec, noise="none")
    w = whole_tensor(weight.value).to(weight.dtype)
    mask = None
    if weight.mask is not None:
        mask = weight.mask.of(w, state.draw.step)
        w = keep(w, mask)
        mask = mask.expand(w.shape).reshape(matrix_shape(w.shape, weight.batch_dims))
    key = torch.tensor(key_words(state.config.seed, weight.name), dtype=torch.int32, device=w.device)
    clock = torch.tensor(state.clock, dtype=torch.int32, device=w.device)
    block = weight.settings.block
    for part in weight_parts(w, spec, weight.batch_dims, block, parameter, elements):
        noisy = None
        if weight.noisy:
            noisy = sample_eager(
                part.w,
                spec,
                1,
                part.block,
                key,
                clock,
                part.learned,
                whole=part.whole,
                offset=(part.first, part.start, 0),
                maxima=part.maxima,
            )
            if mask is not None:
                count, height = part.w.shape[:2]
                kept = mask[part.first : part.first + count, part.start : part.start + height]
                noisy = keep(noisy, kept)
        cast = sample_eager(part.w, without_noise, 1, part.block, learned=part.learned, maxima=part.maxima)
        largest = _largest(part.w, part.learned, without_noise, part.block, part.maxima)
        yield Part(part.w, cast, noisy, largest)


def _of_levels(weight: SampledWeight, levels: Levels, parameter: torch.Tensor) -> Part:
    """A whole weight that is cast to levels."""
    w = whole_tensor(weight.value).to(weight.dtype)
    block, scaled = weight.settings.block, weight.settings.scale is not None
    given = (w, parameter, levels.largest, weight.batch_dims, block)
    _, scales = numbers_and_scales(*given, scaled=scaled)
    cast = cast_to_levels(*given, scaled=scaled)
    shape = scales.shape
    return Part(w.reshape(shape), cast.reshape(shape), None, scales.double() * parameter.abs().max().double())


def _largest(
    w: torch.Tensor,
    learned: torch.Tensor | None,
    spec: SampleSpec,
    block: tuple[int, int],
    maxima: torch.Tensor | None,
) -> torch.Tensor:
    p = TorchPrimitives()
    blocks = Blocks(w, 1, block)
    given = None if maxima is None else maxima.view(torch.float32)
    amax = block_maximum(blocks.matrices(w), block) if given is None or spec.needs_matrix_maximum else given
    of_matrix = spec.of_matrix(p, lambda: given)
    x, largest = spec.grid_limit(
        p,
        amax,
        None if learned is None else learned.detach().expand(amax.shape),
        lambda name: of_matrix[name]().expand(amax.shape),
    )
    # Two factors of float32: their product may lie beyond it.
    limit = x.double() * (largest.double() if isinstance(largest, torch.Tensor) else largest)
    if spec.scale == "amax":
        # The block maximum is the grid's largest value, up to the last bit of the scale.
        limit = torch.where((amax.double() / limit - 1).abs() < LAST_BITS, amax.double(), limit)
    return blocks.expand(limit)
