"""Loss terms of learned bit widths: what they are functions of, and the distance from `LearnedBits.target`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from ..numerics.primitives import TorchPrimitives
from ..numerics.widths import WidthRule, width_gradient
from .parameters import WeightWidths


def widths_and_shares(weights: Collection[WeightWidths], rule: WidthRule) -> tuple[torch.Tensor, torch.Tensor]:
    """All widths in a row, float32 with a gradient to the parameters, and the share of all elements that each has.

    Raises:
        RuntimeError: there are no weights.
    """
    if not weights:
        raise RuntimeError(
            "no weight with learned bits is known yet: call this after the first forward, or "
            "Backend.prepare(model, ...) before"
        )
    device = next(iter(weights)).parameter.device
    flat = torch.cat([weight.parameter.reshape(-1).to(device) for weight in weights])
    elements = torch.cat([weight.elements.reshape(-1).to(device) for weight in weights])
    widths: torch.Tensor = _Widths.apply(flat, rule)  # type: ignore[no-untyped-call]
    return widths, elements / elements.sum()


def distance_from_target(
    weights: Collection[WeightWidths], rule: WidthRule, weighting: str, target: float
) -> torch.Tensor:
    """The mean of ``|b - target|`` over each weight's blocks, averaged over the weights; a float32 scalar.

    Args:
        weights: at least one.
        rule: of the widths.
        weighting: ``"weight"``, all weights alike, or ``"size"``, by their number of elements.
        target: `LearnedBits.target`, or what a schedule says in its place.
    """
    widths, _ = widths_and_shares(weights, rule)
    counts = [weight.parameter.numel() for weight in weights]
    if weighting == "weight":
        each = [torch.full((n,), 1 / (n * len(counts)), dtype=torch.float32, device=widths.device) for n in counts]
    else:
        sizes = [weight.elements.sum().to(widths.device) for weight in weights]
        total = torch.stack(sizes).sum()
        each = [(size / (total * n)).expand(n) for size, n in zip(sizes, counts, strict=True)]
    return ((widths - target).abs() * torch.cat(each)).sum()


class _Widths(torch.autograd.Function):
    """Parameters to widths; the gradient is `gws_compile.numerics.widths.width_gradient`."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, rule: WidthRule) -> torch.Tensor:
        ctx.save_for_backward(parameter)
        ctx.rule = rule
        return rule.widths(parameter)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (parameter,) = ctx.saved_tensors
        gradient = width_gradient(TorchPrimitives(), grad.contiguous(), parameter, ctx.rule)
        assert isinstance(gradient, torch.Tensor)
        return gradient, None
