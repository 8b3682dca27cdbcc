"""Trained levels as a backend has them: parameters, what follows each optimizer step, and state."""

from __future__ import annotations

import torch

from ..learned_bits.followed import Followed
from .parameters import LevelParameters


class LearnedLevels:
    """The levels of one backend.

    Attributes:
        parameters: one of each weight.
    """

    def __init__(self) -> None:
        self.parameters = LevelParameters()
        self._followed = Followed(self.parameters, "levels")

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Behind an optimizer's step: notice levels that no optimizer holds."""
        self._followed.after_step(optimizer)

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """``"levels"``: see `ParametersByWeight.values`."""
        return {"levels": self.parameters.values()}
