"""Learned bit widths as a backend has them: parameters, loss terms, what follows each optimizer step, and state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..settings.learned_bits import LearnedBits
from .average_constraint import AverageConstraint
from .followed import Followed
from .history import WidthHistory
from .loss import distance_from_target, widths_and_shares
from .parameters import WidthParameters
from .summary import BitsSummary, summarize


class LearnedWidths:
    """The learned widths of one backend.

    Args:
        settings: those of the widths.
        scheduled: what a schedule says at this draw of the average or target that `loss` leads to; None where there is
            none, or it says nothing.

    Attributes:
        parameters: the width parameters.
        history: how the widths moved.
        constraint: the multiplier that leads to `LearnedBits.average`; None without.
    """

    def __init__(self, settings: LearnedBits, scheduled: Callable[[], float | None] = lambda: None) -> None:
        self.parameters = WidthParameters(settings)
        self._scheduled = scheduled
        self.history = WidthHistory(self.parameters.rule.min, self.parameters.rule.max)
        self.constraint = None if settings.average is None else AverageConstraint(settings.average)
        self._followed = Followed(self.parameters, "bit widths")

    def summary(self) -> BitsSummary | None:
        """Average, formats and bytes, of each weight and of all; None while no weight is known."""
        return summarize(self.parameters.by_name, self.parameters.rule)

    def average(self) -> float:
        """The average width over all elements.

        Raises:
            RuntimeError: no weight is known yet.
        """
        widths, shares = self._widths_and_shares()
        return float((widths.detach() * shares).sum())

    def loss(self, weighting: str) -> torch.Tensor:
        """See `gws_compile.Backend.bit_loss`."""
        if weighting not in ("weight", "size"):
            raise ValueError(f"weighting must be 'weight' or 'size', got {weighting!r}")
        wanted = self._scheduled()
        if self.constraint is None:
            rule = self.parameters.rule
            return distance_from_target(
                self.parameters.by_name.values(), rule, weighting, rule.target if wanted is None else wanted
            )
        if wanted is not None:
            self.constraint.target = wanted
        widths, shares = self._widths_and_shares()
        return self.constraint.loss((widths * shares).sum())

    def _widths_and_shares(self) -> tuple[torch.Tensor, torch.Tensor]:
        return widths_and_shares(self.parameters.by_name.values(), self.parameters.rule)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Behind an optimizer's step: move the multiplier; notice widths that no optimizer holds."""
        weights = self.parameters.by_name.values()
        if self.parameters.frozen or not weights:
            return
        if not self._followed.after_step(optimizer):
            return
        due = self.history.due()
        if not due and self.constraint is None:
            return
        with torch.no_grad():
            widths, shares = self._widths_and_shares()
        if due:
            self.history.record(widths, shares)
        if self.constraint is not None:
            gradients = torch.cat([_gradient(weight.parameter).reshape(-1).to(widths.device) for weight in weights])
            self.constraint.update((widths * shares).sum(), gradients / self.parameters.rule.slope, shares)

    def state_dict(self) -> dict[str, Any]:
        """`WidthParameters.state_dict`, and ``"steering"``, the constraint's, where there is one."""
        state = self.parameters.state_dict()
        if self.constraint is not None:
            state["steering"] = self.constraint.state_dict()
        return state

    def restore(
        self, bits: Mapping[str, torch.Tensor], *, frozen: bool, steering: Mapping[str, torch.Tensor] | None
    ) -> None:
        """Continue from a state, with which `WidthParameters.check_shapes` agrees.

        Args:
            bits: see `WidthParameters.restore`.
            frozen: see there.
            steering: see `AverageConstraint.state_dict`; needed where there is a constraint.
        """
        self.parameters.restore(bits, frozen=frozen)
        if self.constraint is not None and steering is not None:
            self.constraint.restore(steering)


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
