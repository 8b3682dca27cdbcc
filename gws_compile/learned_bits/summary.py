"""What learned bit widths stand for: averages, shares of the formats, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..numerics.widths import WidthRule
from .parameters import WeightWidths


@dataclass(frozen=True)
class BitsSummary:
    """What learned bit widths stand for.

    Attributes:
        average: bit width, over all elements.
        share: format -> share of the elements that are cast to it in noise-free calls.
        stored_bytes: of the cast weights, with a byte for each block's scale where the format is scaled.
        by_weight: the same for each weight; empty in a weight's own summary.
    """

    average: float
    share: dict[str, float]
    stored_bytes: int
    by_weight: dict[str, BitsSummary]


def average_width(weight: WeightWidths, rule: WidthRule) -> float:
    """A weight's average width over its elements."""
    elements = weight.elements.double()
    return float((rule.widths(weight.parameter).double() * elements).sum() / elements.sum())


def summarize(weights: Mapping[str, WeightWidths], rule: WidthRule) -> BitsSummary | None:
    """Average, formats and bytes, of each weight and of all; None while no weight is known."""
    if not weights:
        return None
    by_weight = {name: _summary(weight, rule) for name, weight in weights.items()}
    sizes = {name: math.prod(weight.shape) for name, weight in weights.items()}
    total = sum(sizes.values())

    def mean(value: Callable[[BitsSummary], float]) -> float:
        return sum(value(summary) * sizes[name] for name, summary in by_weight.items()) / total

    return BitsSummary(
        average=mean(lambda s: s.average),
        share={fmt.name: mean(lambda s, f=fmt.name: s.share[f]) for fmt in rule.formats},  # type: ignore[misc]
        stored_bytes=sum(s.stored_bytes for s in by_weight.values()),
        by_weight=by_weight,
    )


def _summary(weight: WeightWidths, rule: WidthRule) -> BitsSummary:
    widths, elements = rule.widths(weight.parameter).double(), weight.elements.double()
    index, total = rule.index(widths), elements.sum()
    counts = [float(elements[index == i].sum()) for i in range(len(rule.formats))]
    stored = sum(n * fmt.storage_bits / 8 for n, fmt in zip(counts, rule.formats, strict=True))
    scaled = torch.tensor([fmt.scaled for fmt in rule.formats], device=index.device)[index]
    blocks = weight.blocks if widths.ndim == 0 else 1
    return BitsSummary(
        average=average_width(weight, rule),
        share={fmt.name: n / float(total) for n, fmt in zip(counts, rule.formats, strict=True)},
        stored_bytes=round(stored + int(scaled.sum()) * blocks),
        by_weight={},
    )
