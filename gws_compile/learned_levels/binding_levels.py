"""What a graph takes of its weights that is trained beside them: bit widths, and levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..learned_bits.binding_widths import WidthFinder
from ..learned_bits.parameters import WidthParameters
from ..passes import LearnedInput
from ..runtime.binding import WidthInput
from ..runtime.weight_registry import WeightRegistry
from ..runtime.weight_slots import Slot
from ..settings.levels import Levels
from .parameters import LevelParameters


@dataclass(frozen=True)
class BoundLevels:
    """The levels of a weight that a graph is called with.

    Attributes:
        parameters: the levels there are.
        slot: the weight.
        found: its levels, as they were when the graph was first called with the weight.
    """

    parameters: LevelParameters
    slot: Slot
    found: nn.Parameter

    def tensor(self) -> torch.Tensor:
        """The parameter; a copy that is trained from here on has levels of its own."""
        own = self.parameters.own(self.slot)
        return self.found if own is None else own


class LearnedFinder:
    """Looks up what one graph takes; a `gws_compile.runtime.binding.FindWidths`.

    Args:
        widths: the bit widths there are; None where none is learned.
        levels: the levels there are; None where no weight is cast to some.
        registry: names the weights.
        inputs: the weights whose widths or levels the graph takes.
    """

    def __init__(
        self,
        widths: WidthParameters | None,
        levels: LevelParameters | None,
        registry: WeightRegistry,
        inputs: Sequence[LearnedInput],
    ) -> None:
        self._widths = widths
        self._levels = levels
        self._registry = registry
        self._inputs = inputs

    def __call__(
        self, weights: Sequence[torch.Tensor], slots: Sequence[Slot], trained: Sequence[bool]
    ) -> list[WidthInput]:
        """Those of these weights; ``trained`` says which of them this graph trains.

        Raises:
            ValueError: a parameter of another shape was prepared or loaded for a weight.
        """
        found: list[WidthInput] = []
        for weight, slot, is_trained, given in zip(weights, slots, trained, self._inputs, strict=True):
            if given.levels is not None:
                found.append(self._bound(weight, slot, given.levels, is_trained=is_trained))
            else:
                assert self._widths is not None
                found += WidthFinder(self._widths, self._registry, [given])([weight], [slot], [is_trained])
        return found

    def _bound(self, weight: torch.Tensor, slot: Slot, levels: Levels, *, is_trained: bool) -> BoundLevels:
        assert self._levels is not None
        if is_trained:
            self._registry.register([slot])
            parameter = self._levels.parameter(weight, slot, levels)
        else:
            parameter = self._levels.evaluated(weight, slot, levels)
        return BoundLevels(self._levels, slot, parameter)
