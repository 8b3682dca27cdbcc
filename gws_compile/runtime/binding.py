"""What belongs to the weights that a compiled graph is called with: looked up once for each set of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import nn

from ..passes import InputLayout, Weight
from .clock import Clock, DrawState
from .keys import key_tensors
from .weight_registry import WeightRegistry
from .weight_slots import Slot, WeightSlots

_MOST_IDS = 4096
"""Sets of tensors that are kept by their ids; `functional_call` may bring new ones in each call."""


class WidthInput(Protocol):
    """The learned widths, or levels, of one weight of a graph."""

    def tensor(self) -> torch.Tensor:
        """What the graph takes for them at this call."""
        ...


class FindWidths(Protocol):
    """Looks up the learned widths, or levels, of the weights of `InputLayout.learned`."""

    def __call__(
        self, weights: Sequence[torch.Tensor], slots: Sequence[Slot], trained: Sequence[bool]
    ) -> Sequence[WidthInput]:
        """Those of these weights, in this order; ``trained`` says which of them the graph trains."""
        ...


class Binding:
    """What a graph takes beside the weights of one set, and how often it was called with them in this draw.

    Attributes:
        slots: the weights.
        noisy: those with whose keys something is drawn: noise, or the rounding of gradients.
        reads: of each weight that is trained, how its reads are: ``{True}`` where all have noise, ``{True, False}``
            where no gradient flows through some, and so on.
        keys: per device, the keys of the weights that the graph takes; int32, (2,) each.
        widths: the learned widths.
        form: the names by which another form of the graph serves these weights, by source; None for this one.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        noisy: Sequence[Slot],
        keys: Mapping[torch.device, Sequence[torch.Tensor]],
        widths: Sequence[WidthInput],
        *,
        reads: Mapping[Slot, frozenset[bool]] = MappingProxyType({}),
        form: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.form = form
        self.reads = reads
        self.slots = slots
        self.noisy = noisy
        self.keys = keys
        self.widths = widths
        self._draw = -1
        self._uses = 0

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are what stands at the places of the weights now."""
        return all(slot.tensor() is tensor for slot, tensor in zip(self.slots, tensors, strict=True))

    def count(self, draw: int) -> int:
        """Count a call in this draw, and say how many there were, this one included; 0 where nothing draws noise."""
        if not self.noisy:
            return 0
        self._uses = self._uses + 1 if draw == self._draw else 1
        self._draw = draw
        return self._uses

    def inputs(self, clock: Clock, state: DrawState) -> list[torch.Tensor]:
        """The inputs behind the graph's own, in the order of `gws_compile.passes.InputLayout`.

        Args:
            clock: has the tensors.
            state: what the call is to see of the clock.
        """
        noise = [tensor for device, keys in self.keys.items() for tensor in (*keys, clock.tensor(device, state))]
        return [*noise, *(widths.tensor() for widths in self.widths)]


class Bindings:
    """A `Binding` for each set of weights that one graph is called with, made at their first call.

    Args:
        layout: what the graph takes behind its own inputs.
        weights: all of its weights, those that are left alone too.
        seed: that of the keys.
        slots: finds the weights.
        registry: names those that draw noise, and those with learned widths.
        find_widths: looks learned widths up; None where widths are fixed.
        form_of: says by which names another form of the graph serves what it is called with; see `Binding.form`.
        name_trained: also name the weights that are trained and draw nothing in the graph.
    """

    def __init__(
        self,
        layout: InputLayout,
        weights: Sequence[Weight],
        *,
        seed: int,
        slots: WeightSlots,
        registry: WeightRegistry,
        find_widths: FindWidths | None,
        form_of: Callable[[Sequence[torch.Tensor]], Mapping[str, tuple[str, ...]] | None],
        name_trained: bool = False,
    ) -> None:
        self._name_trained = name_trained
        self._keyed = dict(layout.positions)
        self._learned = [learned.position for learned in layout.learned]
        # What has to be the same from call to call; of the others a graph takes the values alone.
        keyed = [position for positions in self._keyed.values() for position in positions]
        read = [weight.position for weight in weights if weight.reads and not weight.source.endswith(".data")]
        self._needed = list(dict.fromkeys([*keyed, *self._learned, *read]))
        self._drawing = layout.drawing
        self._trained = {weight.position for weight in weights if weight.trains_learned}
        self._weights = weights
        self._seed = seed
        self._slots = slots
        self._registry = registry
        self._find_widths = find_widths
        self._form_of = form_of
        self._known: list[Binding] = []
        self._by_ids: dict[tuple[int, ...], Binding] = {}
        self._lock = threading.RLock()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Binding:
        """The binding of the weights among a graph's inputs.

        Raises:
            ValueError: a weight that is new has another shape than a loaded state says, or than its bit widths.
        """
        tensors = [inputs[position] for position in self._needed]
        # Where nothing is needed, for the record alone.
        ids = tuple(map(id, tensors or self._parameters(inputs)))
        found = self._by_ids.get(ids)
        if found is None or not found.holds(tensors):
            with self._lock:
                found = self._look_up(inputs, tensors)
                if len(self._by_ids) >= _MOST_IDS:
                    self._by_ids = {}
                self._by_ids[ids] = found
        return found

    def _parameters(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        given = (inputs[weight.position] for weight in self._weights)
        return [tensor for tensor in given if isinstance(tensor, nn.Parameter)]

    def _look_up(self, inputs: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> Binding:
        if self._needed:
            different = len(set(map(id, tensors)))  # fewer, where weights have been tied
            for known in reversed(self._known):
                if len(set(known.slots)) == different and known.holds(tensors):
                    return known
        made = self._make(inputs)
        same = [known for known in self._known if known.slots != made.slots and all(s.is_alive() for s in known.slots)]
        self._known = [*same, made]
        return made

    def _make(self, inputs: Sequence[torch.Tensor]) -> Binding:
        weights = {
            weight.position: weight
            for weight in self._weights
            if weight.position in self._needed or isinstance(inputs[weight.position], nn.Parameter)
        }
        found = self._slots.find([inputs[p] for p in weights], [weight.name for weight in weights.values()])
        slots = dict(zip(weights, found, strict=True))
        needed = [slots[position] for position in self._needed]
        form = self._form_of([inputs[weight.position] for weight in self._weights])
        if form is not None:
            return Binding(needed, [], {}, (), form=form)
        for position, weight in weights.items():
            slots[position].add(weight)
        keys, noisy = {}, []
        for device, positions in self._keyed.items():
            members = [slots[position] for position in positions]
            self._registry.register(members)
            noisy += [slots[position] for position in positions if position in self._drawing]
            keys[device] = key_tensors(self._seed, [slot.name or "" for slot in members], device)
        widths: Sequence[WidthInput] = ()
        if self._find_widths is not None:
            widths = self._find_widths(
                [inputs[position] for position in self._learned],
                [slots[position] for position in self._learned],
                [position in self._trained for position in self._learned],
            )
        trained = {p: weight for p, weight in weights.items() if weight.reason is None and weight.trainable}
        if self._name_trained:
            self._registry.register([slots[position] for position, weight in trained.items() if weight.gradients])
        reads = {slots[p]: frozenset(read.noisy for read in weight.reads) for p, weight in trained.items()}
        return Binding(needed, noisy, keys, widths, reads=reads)
