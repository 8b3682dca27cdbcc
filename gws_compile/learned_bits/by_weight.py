"""Parameters of the backend's own, one for each weight: found, and made, by the weights and their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from ..runtime.weight_slots import Slot
from ..torch_internals.modes import plain_tensors
from ..weight_names import first_free, without_number
from .gradient_sync import GradientSync


@dataclass
class OfWeight:
    """The parameter of one weight.

    Attributes:
        parameter: itself.
        shape: the weight's.
        slot: the weight; None before one has come under this name.
        only_evaluated: the weight has not been trained or prepared, and has no name: the first one that is takes these.
    """

    parameter: nn.Parameter
    shape: tuple[int, ...]
    slot: Slot | None
    only_evaluated: bool

    def move(self, device: torch.device) -> None:
        """Bring what there is to another device; the parameter stays the same object."""
        self.parameter.data = self.parameter.data.to(device)


T = TypeVar("T", bound=OfWeight)


class ParametersByWeight(Generic[T]):
    """Parameters of one kind, one for each weight, by the weight's name.

    Args:
        kind: what a name ends in: ``"bits"``.
        words: what messages call it: ``"bit widths"``.

    Attributes:
        by_name: those that there are so far: of prepared weights and of weights seen in a forward.
        frozen: they are fixed.
    """

    def __init__(self, kind: str, words: str) -> None:
        self.by_name: dict[str, T] = {}
        self.frozen = False
        self._kind = kind
        self._words = words
        self._prepared: dict[Slot, str] = {}
        self._loaded: dict[str, torch.Tensor] = {}
        self._sync = GradientSync()

    def prepare_by(self, make: Callable[[], T], weight: torch.Tensor, slot: Slot) -> None:
        """Make the parameter of a weight, if it has none.

        Args:
            make: makes it as it begins, with plain tensors alone.
            weight: the Parameter; one on the meta device has its own on the CPU until it comes from another device.
            slot: its place. Another weight that has its name already makes it ``name#1``, ``name#2``, ...
        """
        if slot not in self._prepared:
            self._prepared[slot] = unique = slot.name or first_free(slot.path, self._taken())
            self._get_or_make(unique, make, weight, slot)

    def _taken(self) -> set[str]:
        """The names that a weight which comes to be trained or prepared cannot have."""
        return {name for name, widths in self.by_name.items() if not widths.only_evaluated}

    def evaluated_by(self, make: Callable[[], T], weight: torch.Tensor, slot: Slot) -> nn.Parameter:
        """The parameter of a weight that is evaluated.

        Evaluation gives no name: an average of the weights that is evaluated before the model's first training step is
        not the model. A weight that has none yet has that of the weight that it is a copy of, as far as can be
        told; or else a new one, or a loaded state's, which the first weight takes that is trained or prepared.

        Args:
            make: makes it as it begins.
            weight: as it comes into a graph.
            slot: its place.

        Raises:
            ValueError: that of a loaded state has another shape, or is of a weight of another shape.
        """
        if slot.name is not None or slot in self._prepared:
            return self.parameter_by(make, weight, slot)
        own = self.find(slot)
        if own is not None:
            return own.parameter
        self._forget_gone(slot)
        name = next((name for name in self._loaded if without_number(name) == slot.path), None)
        original = self.original(slot) if name is None else None
        if original is not None:
            return original
        name = name or first_free(slot.path, self.by_name)
        parameter = self._get_or_make(name, make, weight, slot).parameter
        self.by_name[name].only_evaluated = True
        return parameter

    def parameter_by(self, make: Callable[[], T], weight: torch.Tensor, slot: Slot) -> nn.Parameter:
        """The parameter of a weight that is trained, or prepared.

        Args:
            make: makes it as it begins.
            weight: as it comes into a graph.
            slot: its place, which has a name.

        Raises:
            ValueError: what there is under this name has another shape, or is of a weight of another shape.
        """
        name = self._prepared.get(slot) or slot.name
        assert name is not None
        known = self.by_name.get(name)
        if known is not None and known.slot is not slot:
            if known.only_evaluated:
                if known.shape != tuple(weight.shape):
                    del self.by_name[name]
            elif known.slot is not None and not known.slot.is_alive():
                del self.by_name[name]
            elif known.slot is not None:
                # Prepared for another weight, which is there and has not been used yet.
                self._prepared[slot] = name = first_free(slot.path, self.by_name)
        found = self._get_or_make(name, make, weight, slot)
        self._sync.watch(name, found.parameter, slot.groups)
        if found.parameter.device != weight.device and not weight.is_meta:
            with plain_tensors():
                found.move(weight.device)
        return found.parameter

    def _get_or_make(self, name: str, make: Callable[[], T], weight: torch.Tensor, slot: Slot) -> T:
        known = self.by_name.get(name)
        shape = tuple(weight.shape)
        if known is not None:
            if known.shape != shape:
                raise ValueError(f"{name} has shape {shape}, but {self._words} were prepared for shape {known.shape}")
            known.slot, known.only_evaluated = slot, False
            return known
        self._forget_gone(slot)
        original = self.original(slot)
        with plain_tensors():
            made = make()
            if (value := self._loaded.get(name)) is not None:
                self._copy(name, made.parameter, value)
            elif original is not None and original.shape == made.parameter.shape:
                made.parameter.copy_(original)
            made.move(torch.device("cpu") if weight.is_meta else weight.device)
        made.parameter.requires_grad_(not self.frozen)
        self.by_name[name] = made
        self._loaded.pop(name, None)  # not before: one of another shape is refused at every call
        return made

    def _forget_gone(self, slot: Slot) -> None:
        """Drop those of weights that have gone, of which another one has come under the same name."""
        gone = [
            name
            for name, one in self.by_name.items()
            if one.slot is not None
            and one.slot.path == slot.path
            and not one.slot.is_alive()
            # A copy that was evaluated and went: what a loaded state said is still that of the model.
            and not one.only_evaluated
        ]
        for name in gone:
            del self.by_name[name]

    def own(self, slot: Slot) -> nn.Parameter | None:
        """The parameter of a weight that has been trained or prepared; None where it has none of its own."""
        name = self._prepared.get(slot, slot.name)
        known = None if name is None else self.by_name.get(name)
        return None if known is None or known.slot is not slot else known.parameter

    def original(self, slot: Slot) -> nn.Parameter | None:
        """The parameter of the weight that one without its own is a copy of, as far as can be told.

        That is a weight of the same name and shape: that of an average of weights, a target network, a deep copy in the
        middle of training. One that has been trained comes before others.
        """
        if self.find(slot) is not None:
            return None
        found = [
            one
            for one in self.by_name.values()
            if one.slot is not None
            and one.slot is not slot
            and one.slot.path == slot.path
            and one.shape == slot.shape
            and (one.only_evaluated or one.slot.is_alive())
        ]
        found.sort(key=lambda one: one.slot is None or one.slot.seen is None)
        return found[0].parameter if found else None

    def find(self, slot: Slot) -> T | None:
        """What there is of a weight; None for one without."""
        return next((one for one in self.by_name.values() if one.slot is slot), None)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name (the weight's, and behind a dot what kind it is) and parameter."""
        for name, one in self.by_name.items():
            yield f"{name}.{self._kind}", one.parameter

    def values(self) -> dict[str, torch.Tensor]:
        """Copies of the parameters by the weights' names, with those of a loaded state that are still to come."""
        with plain_tensors():
            values = {name: value.clone() for name, value in self._loaded.items()}
            values.update({name: one.parameter.detach().clone() for name, one in self.by_name.items()})
        return values

    def check_shapes(self, values: Mapping[str, torch.Tensor]) -> None:
        """Hold the parameters of a state to those that there are; nothing is changed.

        Raises:
            ValueError: the state has those of a weight in another shape.
        """
        for name, value in values.items():
            if name in self.by_name:
                self._check_shape(name, self.by_name[name].parameter, value)

    def restore(self, values: Mapping[str, torch.Tensor], *, frozen: bool = False) -> None:
        """Continue from a state, with which `check_shapes` agrees; what is still to come waits for its weight.

        Args:
            values: float32, the parameters by the weights' names.
            frozen: they are fixed.
        """
        self.frozen = frozen
        self._loaded = {name: value for name, value in values.items() if name not in self.by_name}
        for name, one in self.by_name.items():
            if name in values:
                self._copy(name, one.parameter, values[name])
            one.parameter.requires_grad_(not frozen)

    def _check_shape(self, name: str, parameter: nn.Parameter, value: torch.Tensor) -> None:
        if parameter.shape != value.shape:
            raise ValueError(
                f"the state was saved with {self._words} of shape {tuple(value.shape)} for {name}, this backend has "
                f"{tuple(parameter.shape)}"
            )

    def _copy(self, name: str, parameter: nn.Parameter, value: torch.Tensor) -> None:
        self._check_shape(name, parameter, value)
        with plain_tensors():
            parameter.copy_(value)
