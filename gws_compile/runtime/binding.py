"""What belongs to the Parameters that a compiled graph is called with: looked up once for each set of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from ..passes import InputLayout, Weight
from .clock import Clock
from .keys import key_tensors
from .sampled_weights import SampledWeights
from .weight_cache import WeightCache
from .weight_registry import WeightRegistry


class WidthInput(Protocol):
    """The learned widths of one weight of a graph."""

    def tensor(self) -> torch.Tensor:
        """What the graph takes for them at this call."""
        ...


FindWidths = Callable[[Sequence[torch.Tensor]], Sequence[WidthInput]]
"""Looks up the widths of the weights of `InputLayout.learned`, which have been registered, in this order."""


class Binding:
    """What a graph takes beside the Parameters of one set, and how often it was called with them in this draw.

    Attributes:
        keys: per device, the keys of the weights that draw noise; int32, (2,) each.
        widths: the learned widths.
    """

    def __init__(self, keys: Mapping[torch.device, Sequence[torch.Tensor]], widths: Sequence[WidthInput]) -> None:
        self.keys = keys
        self.widths = widths
        self._draw = -1
        self._uses = 0

    def count(self, draw: int) -> int:
        """Count a call in this draw, and say how many there were, this one included; 0 where nothing draws noise."""
        if not self.keys:
            return 0
        self._uses = self._uses + 1 if draw == self._draw else 1
        self._draw = draw
        return self._uses

    def inputs(self, clock: Clock) -> list[torch.Tensor]:
        """The inputs behind the graph's own, in the order of `gws_compile.passes.InputLayout`."""
        noise = [tensor for device, keys in self.keys.items() for tensor in (*keys, clock.tensor(device))]
        return [*noise, *(widths.tensor() for widths in self.widths)]


class Bindings:
    """A `Binding` for each set of Parameters that one graph is called with, made at their first call.

    Args:
        layout: what the graph takes behind its own inputs.
        weights: the weights that it samples.
        seed: that of the keys.
        registry: names the weights that draw noise, and those with learned widths.
        sampled: is told of every set.
        find_widths: looks learned widths up; None where widths are fixed.
    """

    def __init__(
        self,
        layout: InputLayout,
        weights: Sequence[Weight],
        *,
        seed: int,
        registry: WeightRegistry,
        sampled: SampledWeights,
        find_widths: FindWidths | None,
    ) -> None:
        place = {weight.position: i for i, weight in enumerate(weights)}
        self._weights = weights
        self._keyed = {device: [place[i] for i in positions] for device, positions in layout.positions.items()}
        self._learned = [place[learned.position] for learned in layout.learned]
        self._seed = seed
        self._registry = registry
        self._sampled = sampled
        self._find_widths = find_widths
        self._made = WeightCache(self._make)

    def __call__(self, parameters: Sequence[torch.Tensor]) -> Binding:
        """The binding of these Parameters, one for each of the weights.

        Raises:
            ValueError: a Parameter that is new has another shape than a loaded state says, or than its bit widths.
        """
        return self._made(parameters)

    def _make(self, parameters: Sequence[torch.Tensor]) -> Binding:
        keys = {}
        for device, places in self._keyed.items():
            self._register(parameters, places)
            names = self._registry.names([parameters[i] for i in places])
            keys[device] = key_tensors(self._seed, names, device)
        self._sampled.record(parameters, self._weights)
        if self._find_widths is None:
            return Binding(keys, ())
        self._register(parameters, self._learned)
        return Binding(keys, self._find_widths([parameters[i] for i in self._learned]))

    def _register(self, parameters: Sequence[torch.Tensor], places: Sequence[int]) -> None:
        self._registry.register([parameters[i] for i in places], [self._weights[i].name for i in places])
