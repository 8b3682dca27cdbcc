"""Noticing parameters of the backend's own that get gradients and that no optimizer moves."""

from __future__ import annotations

import warnings
from typing import Any

import torch

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
        self._waited = 0

    def after_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Look at an optimizer behind its step, and warn, once, of what none has had for a while.

        Returns:
            Whether this one has some.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        followed = {name for name, one in self._parameters.by_name.items() if id(one.parameter) in held}
        self._followed |= followed
        self._notice()
        return bool(followed)

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
