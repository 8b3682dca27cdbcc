"""Pseudo-quantization training without a compiler: the oracle of whole training runs.

Each step samples the weights with the public reference `gws_compile.sample` and calls the unmodified model through
`torch.func.functional_call`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

import gws_compile


def gradients(
    model: nn.Module,
    loss_of: Callable[[Callable[..., Any]], torch.Tensor],
    sampled: Iterable[str],
    fmt: str,
    step: int,
    *,
    dtype: torch.dtype | None = None,
    prefix: str = "",
    schedule: gws_compile.Schedule | None = None,
    **settings: Any,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one forward and backward.

    Args:
        model: holds the weights; it is not changed.
        loss_of: gets a function that calls the model, and returns the loss.
        sampled: names of the weights to sample; the others are used as they are.
        fmt: the format.
        step: number of the draw.
        dtype: what the weights are cast to before they are sampled.
        prefix: in front of the names that noise is drawn for.
        schedule: says noise and width of the step.
        **settings: of `gws_compile.sample`.
    """
    sampled = set(sampled)
    if schedule is not None:
        settings |= {"bits": schedule.width(step)} | ({} if schedule.draws(step) else {"noise": "none"})
    values = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().to(dtype or parameter.dtype)
        if name in sampled:
            value = gws_compile.sample(value, fmt, name=prefix + name, step=step, **settings)
        values[name] = value.clone().requires_grad_()
    loss = loss_of(lambda *args, **kwargs: functional_call(model, values, args, kwargs))
    loss.backward()
    return loss.item(), {name: v.grad for name, v in values.items() if v.grad is not None}


def train(
    model: nn.Module,
    micro_batches: Sequence[Sequence[Any]],
    loss_of: Callable[[Callable[..., Any], Any], torch.Tensor],
    sampled: Iterable[str],
    fmt: str,
    *,
    lr: float = 0.1,
    first_step: int = 0,
    **settings: Any,
) -> list[float]:
    """Train the model in place by SGD and return the mean loss of each step.

    Args:
        model: changed.
        micro_batches: per step, the batches whose gradients are averaged: an accumulation, or the ranks' shares.
        loss_of: ``(call, batch)`` to a loss.
        sampled, fmt, settings: as in `gradients`.
        lr: learning rate.
        first_step: number of the first draw.
    """
    sampled, losses = list(sampled), []
    for step, batches in enumerate(micro_batches, first_step):
        results = [
            gradients(model, lambda call, x=x: loss_of(call, x), sampled, fmt, step, **settings) for x in batches
        ]
        losses.append(sum(loss for loss, _ in results) / len(results))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                total = sum(grads[name] for _, grads in results) / len(results)
                parameter -= lr * total.to(parameter.dtype)
    return losses
