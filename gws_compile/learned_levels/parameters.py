"""The levels of a backend, one parameter for each weight that is cast to them."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ..learned_bits.by_weight import OfWeight, ParametersByWeight
from ..runtime.weight_slots import Slot
from ..settings.levels import Levels


class LevelParameters(ParametersByWeight[OfWeight]):
    """The levels p, float32 (levels,), by the weight's name."""

    def __init__(self) -> None:
        super().__init__("levels", "levels")

    def prepare(self, weight: torch.Tensor, slot: Slot, levels: Levels) -> None:
        """See `prepare_by`, and `evaluated`."""
        self.prepare_by(partial(_make, weight, slot, levels), weight, slot)

    def evaluated(self, weight: torch.Tensor, slot: Slot, levels: Levels) -> nn.Parameter:
        """See `evaluated_by`.

        Args:
            weight: as it comes into a graph.
            slot: its place.
            levels: what its levels begin as.
        """
        return self.evaluated_by(partial(_make, weight, slot, levels), weight, slot)

    def parameter(self, weight: torch.Tensor, slot: Slot, levels: Levels) -> nn.Parameter:
        """See `parameter_by`, and `evaluated`."""
        return self.parameter_by(partial(_make, weight, slot, levels), weight, slot)

    def current(self, slot: Slot, levels: Levels, device: torch.device) -> torch.Tensor:
        """The levels that a weight is cast to now: those of the table where it has none, or is frozen.

        Args:
            slot: its place.
            levels: what its levels began as.
            device: of the result.
        """
        found = self.find(slot)
        parameter = self.original(slot) if found is None else found.parameter
        if parameter is None:
            return torch.tensor(levels.table, dtype=torch.float32, device=device)
        return parameter.detach().to(device)


def _make(weight: torch.Tensor, slot: Slot, levels: Levels) -> OfWeight:
    parameter = nn.Parameter(torch.tensor(levels.table, dtype=torch.float32, device="cpu"))
    return OfWeight(parameter, tuple(weight.shape), slot, only_evaluated=False)
