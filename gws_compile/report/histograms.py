"""How a weight, its sample and its noise are distributed: `histogram`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..numerics.formats import FloatFormat
from ..runtime.sampled_weights import SampledWeight
from .sampled_parts import SamplingState, parts

BINS = 81
_SAMPLED = 2**20
"""Elements that are counted at most: the first rows of a weight."""

_FINE = FloatFormat.make(8, 22)
"""A grid so fine that a sample on it is the weight and its noise, not rounded."""


@dataclass(frozen=True)
class Histogram:
    """Counts of one weight's values.

    Attributes:
        name: the weight's unique name.
        shape: of the whole weight.
        fmt: the format of training.
        step: number of the draw.
        elements: how many were counted.
        limit: the bins of ``weight`` and ``sample`` part ``-limit .. limit`` evenly.
        weight: counts of w.
        sample: counts of w_hat, sampled with noise, or cast where the weight gets none.
        noise_limit: the bins of ``noise`` part ``-noise_limit .. noise_limit`` evenly.
        noise: counts of the noise before the cast, ``R * a * 2**(1 - b)``; None for a weight without.
    """

    name: str
    shape: tuple[int, ...]
    fmt: str
    step: int
    elements: int
    limit: float
    weight: tuple[int, ...]
    sample: tuple[int, ...]
    noise_limit: float
    noise: tuple[int, ...] | None


def histogram(weight: SampledWeight, parameter: torch.Tensor | None, state: SamplingState) -> Histogram:
    """Count the values of a weight's first rows.

    Args:
        weight: the weight.
        parameter: that of its learned widths, None for a fixed width.
        state: how it is sampled.
    """
    part = next(parts(weight, parameter, state, elements=_SAMPLED))
    w, sampled = part.w.float(), (part.cast if part.noisy is None else part.noisy).float()
    limit = max(_limit(w), _limit(sampled))
    noise, noise_limit = None, 0.0
    if part.noisy is not None:
        # In float32 and on a grid that rounds next to nothing, the sample is the weight and its noise.
        fine = replace(state, draw=state.draw.with_trained_widths(), fmt=_FINE)
        unrounded = next(parts(replace(weight, dtype=torch.float32), parameter, fine, elements=_SAMPLED))
        assert unrounded.noisy is not None
        difference = unrounded.noisy - unrounded.w
        noise_limit = _limit(difference)
        noise = _counts(difference, noise_limit)
    return Histogram(
        name=weight.name,
        shape=tuple(weight.value.shape),
        fmt=weight.settings.name,
        step=state.draw.step,
        elements=w.numel(),
        limit=limit,
        weight=_counts(w, limit),
        sample=_counts(sampled, limit),
        noise_limit=noise_limit,
        noise=noise,
    )


def _limit(values: torch.Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _counts(values: torch.Tensor, limit: float) -> tuple[int, ...]:
    finite = values[values.isfinite()].cpu()
    edge = limit or 1.0
    return tuple(torch.histc(finite, bins=BINS, min=-edge, max=edge).int().tolist())
