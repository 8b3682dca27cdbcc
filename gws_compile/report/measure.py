"""What the cast, and the noise, do to a weight: its `WeightMetrics`, computed on demand in eager torch."""

from __future__ import annotations

import math
from math import prod

import torch

from ..runtime.sampled_weights import SampledWeight
from .metrics import WeightMetrics
from .sampled_parts import Part, SamplingState, parts


def measure(weight: SampledWeight, parameter: torch.Tensor | None, bits: float, state: SamplingState) -> WeightMetrics:
    """The metrics of one weight.

    Args:
        weight: the weight.
        parameter: that of its learned widths, or its levels; None for a fixed width.
        bits: its bit width, the average of learned ones.
        state: how it is sampled.
    """
    sums = torch.stack([_sums(part) for part in parts(weight, parameter, state)]).sum(0).tolist()
    signal, error, noise, saturated, flushed, exact, zeros = sums
    shape = tuple(weight.value.shape)
    elements = prod(shape)
    return WeightMetrics(
        name=weight.name,
        shape=shape,
        dtype=str(weight.dtype).removeprefix("torch."),
        fmt=weight.settings.name if weight.settings.learned is None else "by width",
        bits=bits if weight.noisy else None,
        sqnr=_decibels(signal, error),
        sqnr_noise=_decibels(signal, noise) if weight.noisy else None,
        saturated=saturated / elements,
        flushed=flushed / elements,
        exact=exact / elements,
        zeros=zeros / elements,
    )


def _sums(part: Part) -> torch.Tensor:
    w, c = part.w.double(), part.cast.double()
    noisy = c if part.noisy is None else part.noisy.double()
    return torch.stack(
        [
            w.square().sum(),
            (w - c).square().sum(),
            (w - noisy).square().sum(),
            (w.abs() > part.largest).sum().double(),
            ((w != 0) & (c == 0)).sum().double(),
            (w == c).sum().double(),
            (c == 0).sum().double(),
        ]
    )


def _decibels(signal: float, noise: float) -> float:
    if math.isnan(signal) or math.isnan(noise) or math.isinf(signal):
        return math.nan
    return 10 * math.log10(signal / noise) if noise else math.inf
