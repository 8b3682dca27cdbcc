"""Noticing parameters of the backend's own that get gradients and that no optimizer moves."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..runtime.step_rounds import StepRounds
from ..torch_internals.autograd import times_changed
from ..warning import GwsWarning
from .by_weight import ParametersByWeight

_PATIENCE = 10
"""Optimizer steps within which some optimizer should have taken the parameters."""


class Followed:
    """Which parameters of one kind optimizers hold.

    Args:
        parameters: all of them.
        words: what the warning calls them.
    """

    def __init__(self, parameters: ParametersByWeight[Any], words: str) -> None:
        self._parameters = parameters
        self._words = words
        self._followed: set[str] = set()
        self._seen: dict[str, tuple[torch.Tensor, int]] = {}
        self._rounds = StepRounds()
        self._waited = 0

    def held_by(self, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
        """The parameters that an optimizer has, by the weights' names."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = self._parameters.by_name.items()
        return {name: one.parameter for name, one in named if id(one.parameter) in held}

    def after_step(self, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
        """Look at an optimizer behind its step, and warn, once, of what none has had for some training steps.

        Returns:
            `held_by` this one.
        """
        if self._rounds.begins_with(optimizer):
            self._notice()
        followed = self.held_by(optimizer)
        self._followed |= followed.keys()
        return followed

    def _notice(self) -> None:
        unfollowed = [
            name
            for name, one in self._parameters.by_name.items()
            if name not in self._followed and self._has_new_gradient(name, one.parameter)
        ]
        if not unfollowed:
            return
        self._waited += 1
        if self._waited == _PATIENCE:
            warnings.warn(
                f"{_PATIENCE} optimizer steps, and no optimizer has the {self._words} of {', '.join(unfollowed[:8])}, "
                "which do get gradients: give Backend.parameters() to one, after Backend.prepare(model, ...) or the "
                "first forward",
                GwsWarning,
                stacklevel=2,
            )

    def _has_new_gradient(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a gradient came since the last look: what steps may be another model's, and this one left alone."""
        gradient = parameter.grad
        if gradient is None:
            return False
        # A gradient that nobody takes away is added to in place. The tensor is kept, so no other one has its identity.
        now = gradient, times_changed(gradient)
        seen, self._seen[name] = self._seen.get(name), now
        return seen is None or seen[0] is not gradient or seen[1] != now[1]
