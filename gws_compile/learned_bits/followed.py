"""Noticing parameters of the backend's own that get gradients and that no optimizer moves."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..runtime.step_rounds import StepRounds
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
            if one.parameter.grad is not None and name not in self._followed
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
