"""Learned bit widths as a backend has them: parameters, loss terms, what follows each optimizer step, and state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..runtime.step_rounds import StepRounds
from ..settings.learned_bits import LearnedBits
from ..warning import GwsWarning
from .average_constraint import AverageConstraint
from .history import WidthHistory
from .loss import distance_from_target, widths_and_shares
from .parameters import WidthParameters
from .summary import BitsSummary, summarize

_PATIENCE = 10
"""Optimizer steps within which some optimizer should have taken the widths."""


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
        self._rounds = StepRounds()
        self._kept: dict[str, torch.Tensor] = {}  # the gradients in front of the step that is being taken
        self._gradients: dict[str, torch.Tensor] = {}  # of the widths that have moved in this training step
        self._followed: set[str] = set()
        self._unheld: set[str] = set()
        self._waited = 0

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

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """In front of an optimizer's step: keep the gradients, which some optimizers overwrite (schedule-free)."""
        if not self.parameters.frozen:
            self._kept = _gradients(self._held_by(optimizer), getattr(optimizer, "grad_scale", None))

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Behind an optimizer's step: move the multiplier; notice widths that no optimizer holds.

        Where several optimizers have the widths, one for each parameter perhaps, a training step has ended with the
        last of them.
        """
        kept, self._kept = self._kept, {}
        weights = self.parameters.by_name
        if self.parameters.frozen or not weights:
            return
        if self._rounds.begins_with(optimizer):
            self._notice_unfollowed()
        followed = self._held_by(optimizer)
        self._followed |= followed.keys()
        if not followed:
            return
        if self._gradients.keys() & followed.keys():  # the last training step has ended without some widths
            self._unheld = weights.keys() - self._gradients.keys()
            self._end_step()
        self._gradients |= kept if kept.keys() == followed.keys() else _gradients(followed)
        if self._gradients.keys() | self._unheld >= weights.keys():
            self._end_step()

    def _held_by(self, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
        """The width parameters that an optimizer has, by the weights' names."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = self.parameters.by_name.items()
        return {name: weight.parameter for name, weight in named if id(weight.parameter) in held}

    def _end_step(self) -> None:
        """What follows a training step that has moved the widths."""
        moved, self._gradients = self._gradients, {}
        due = self.history.due()
        if not due and self.constraint is None:
            return
        with torch.no_grad():
            widths, shares = self._widths_and_shares()
        if due:
            self.history.record(widths, shares)
        if self.constraint is not None:
            left = {name: w.parameter for name, w in self.parameters.by_name.items() if name not in moved}
            moved |= _gradients(left)
            gradients = torch.cat([moved[name].to(widths.device) for name in self.parameters.by_name])
            self.constraint.update((widths * shares).sum(), gradients / self.parameters.rule.slope, shares)

    def _notice_unfollowed(self) -> None:
        unfollowed = [
            name
            for name, weight in self.parameters.by_name.items()
            if weight.parameter.grad is not None and name not in self._followed
        ]
        if not unfollowed:
            return
        self._waited += 1
        if self._waited == _PATIENCE:
            warnings.warn(
                f"{_PATIENCE} optimizer steps, and no optimizer has the bit widths of {', '.join(unfollowed[:8])}, "
                "which do get gradients: give Backend.parameters() to one, after Backend.prepare(model, ...) or the "
                "first forward",
                GwsWarning,
                stacklevel=2,
            )

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


def _gradients(parameters: Mapping[str, nn.Parameter], scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Copies of the gradients, zeros where there are none, flat; made at once.

    Args:
        parameters: by name.
        scale: what the gradients have been multiplied with; that of ``GradScaler``, which a fused optimizer divides by.
    """
    if not parameters:
        return {}
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
    device = flat[0].device
    joined = torch.cat([gradient.detach().reshape(-1).to(device) for gradient in flat])
    if scale is not None:
        joined = joined / scale.to(device)
    return dict(zip(parameters, torch.split(joined, [gradient.numel() for gradient in flat]), strict=True))
