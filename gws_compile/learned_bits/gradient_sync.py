"""Reducing the gradients of bit widths over processes, as data and tensor parallelism do for those of the weights."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import nn

from ..torch_internals import autograd


class SumOverShards(torch.autograd.Function):
    """The identity on a parameter that every rank has whole and uses its own part of; the gradients' parts are added.

    Only what comes through here is added up: a loss term on the whole parameter is the same on every rank already.
    """

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, groups: tuple[Any, ...]) -> torch.Tensor:
        """``parameter``; the groups are those of the mesh dims along which the weight is sharded."""
        ctx.groups = groups
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The sum over the groups."""
        import torch.distributed as dist

        total = grad.contiguous().clone()
        for group in ctx.groups:
            dist.all_reduce(total, group=group)
        return total, None


class GradientSync:
    """Averages the watched parameters' gradients at the end of each backward, in one piece for each set of groups.

    Micro-batches of an accumulation are reduced one by one: what is already the mean stays it. Every process of a group
    has to run backward equally often, as DistributedDataParallel demands too.
    """

    def __init__(self) -> None:
        self._groups: dict[str, tuple[Any, ...]] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._queued = False

    def watch(self, name: str, parameter: nn.Parameter, groups: tuple[Any, ...]) -> None:
        """Average this parameter's gradient over the process groups from now on."""
        if not groups or (self._groups.get(name) == groups and self._parameters[name] is parameter):
            return
        if self._parameters.get(name) is not parameter:
            hook = partial(_queue, weakref.ref(self))
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self._groups[name] = groups
        self._parameters[name] = parameter

    def queue(self) -> None:
        """Ask for the reduction at the end of the backward that is running."""
        if not self._queued:
            self._queued = True
            autograd.at_end_of_backward(self._reduce)

    def _reduce(self) -> None:
        self._queued = False
        for groups in dict.fromkeys(self._groups.values()):
            names = sorted(name for name, g in self._groups.items() if g == groups)
            parameters = [self._parameters[name] for name in names]
            parameters = [p for p in parameters if p.requires_grad]
            if parameters:
                _average(parameters, groups)


def _queue(sync: weakref.ref[GradientSync], parameter: torch.Tensor) -> None:
    alive = sync()
    if alive is not None:
        alive.queue()


def _average(parameters: list[nn.Parameter], groups: tuple[Any, ...]) -> None:
    import torch.distributed as dist

    # One that got no gradient here may have got one elsewhere.
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    for group in groups:
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
    parts = torch.split(flat, [g.numel() for g in grads])
    for parameter, grad, part in zip(parameters, grads, parts, strict=True):
        parameter.grad = part.view(grad.shape).clone()
