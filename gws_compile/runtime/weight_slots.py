"""The places of weights in models: what a weight is, whatever Parameter stands there."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..passes import Weight
from ..torch_internals.modules import held_parameters, modules_alive
from .call_stack import CallStack
from .clock import DrawState
from .held_weights import held_weights

_MOST_DEAD = 4096
"""Places of models that have gone, of which a report still tells."""


@dataclass(eq=False)
class Slot:
    """The place of a weight: an attribute of a module.

    Whatever comes to stand there is this weight: a Parameter that ``load_state_dict(assign=True)`` puts in the place
    of another, what ``functional_call`` puts there for one call, the whole weight that FSDP2 puts in the place of a
    shard. No reference to a Parameter is kept, not even a weak one, which ``torch.utils.swap_tensors`` refuses.

    Attributes:
        path: its qualified name in the outermost module that it was seen in before it drew.
        owner: the module; None for a Parameter that no module holds.
        attribute: its name there.
        owner_type: the module's class.
        root: the outermost module; None for one that is not known.
        shape: the whole weight's, as last seen.
        dtype: as last seen.
        loose: the Parameter that no module holds.
        name: the unique name that it draws by; None as long as it does not.
        groups: the process groups over which its gradient is averaged, as far as the stack told.
        graphs: what each graph that was called with it knows of it.
        prepared: what a graph that samples it would know of it, where `Backend.prepare` found that out.
        seen: what the last training forward saw; None before the first.
    """

    path: str
    owner: weakref.ref[nn.Module] | None
    attribute: str
    owner_type: type[nn.Module] | None
    root: weakref.ref[nn.Module] | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    loose: weakref.ref[torch.Tensor] | None = None
    name: str | None = None
    groups: tuple[Any, ...] = ()
    graphs: list[Weight] = field(default_factory=list)
    prepared: Weight | None = None
    seen: DrawState | None = None

    def tensor(self) -> torch.Tensor | None:
        """What stands there now."""
        if self.owner is None:
            return None if self.loose is None else self.loose()
        owner = self.owner()
        return None if owner is None else held_parameters(owner).get(self.attribute)

    @property
    def known_as(self) -> str:
        """The unique name, or the path as long as it has none."""
        return self.name or self.path

    def place(self) -> tuple[int, str]:
        """The module's id, and the attribute; for those of modules that are alive."""
        return id(None if self.owner is None else self.owner()), self.attribute

    def is_alive(self) -> bool:
        """Whether its module is alive."""
        return (self.loose if self.owner is None else self.owner)() is not None  # type: ignore[misc]

    def add(self, weight: Weight) -> None:
        """Note what a graph knows of it, once for each graph."""
        if not any(weight is known for known in self.graphs):
            self.graphs.append(weight)


class WeightSlots:
    """Finds the slots of the tensors that graphs are called with."""

    def __init__(self) -> None:
        self._by_owner: WeakIdKeyDictionary = WeakIdKeyDictionary()  # module -> {attribute: Slot}
        self._slots: list[Slot] = []
        self._searched: list[weakref.ref[nn.Module]] = []
        self._lock = threading.RLock()

    def __iter__(self) -> Iterator[Slot]:
        """All slots, in the order in which they were seen; those of models that have gone too."""
        return iter(list(self._slots))

    def see_caller(self) -> CallStack:
        """Take in the outermost module that is calling, from inside a call, and all of its weights."""
        stack = CallStack()
        if stack.root is not None:
            self.add_root(stack.root, stack)
        return stack

    def add_root(self, root: nn.Module, stack: CallStack | None = None) -> None:
        """Take in an outermost module, and all of its weights of two or more dims."""
        with self._lock:
            for slot in self.of_module(root, "" if stack is None else stack.prefix):
                slot.root = slot.root or weakref.ref(root)

    def of_module(self, module: nn.Module, prefix: str = "") -> list[Slot]:
        """The slots of a module's weights of two or more dims, each once, made where there are none."""
        with self._lock:
            places: dict[int, list[Any]] = {}
            for held in held_weights(module):
                if held.tensor.ndim >= 2:
                    places.setdefault(id(held.tensor), []).append(held)
            parts = set(map(id, module.modules())) - {id(module)}
            return [self._of_places(found, prefix, parts) for found in places.values()]

    def _of_places(self, places: list[Any], prefix: str, parts: Set[int] = frozenset()) -> Slot:
        """The slot of a tied weight's places: that of the first that has one.

        Args:
            places: in a module.
            prefix: in front of their names.
            parts: the ids of what lies inside of the module.
        """
        known = (self._known(held.owner, held.attribute, held.tensor) for held in places)
        slot = next((one for one in known if one is not None), None)
        first = places[0]
        if slot is None:
            slot = self._make(prefix + first.name, first.owner, first.attribute, first.tensor)
        elif slot.name is None and ((root := slot.root and slot.root()) is None or id(root) in parts):
            # A part was given to the backend, prepared or called before the model around it: names are the model's,
            # whatever was looked at earlier.
            slot.path, slot.root = prefix + first.name, None
        elif slot.name is None and prefix:  # of a stage, which only a call tells
            slot.path = prefix + first.name
        for held in places[1:]:  # a part of the model may be called without the module that has the first
            other = self._places_of(held.owner).setdefault(held.attribute, slot)
            if other is not slot and other.name is None and other.prepared is None:
                self._merge(other, slot, held)
        return _looked_at(slot, first.tensor)

    def _merge(self, other: Slot, slot: Slot, held: Any) -> None:
        """One slot in the place of two: parts were looked at by themselves before, where no tie shows."""
        self._places_of(held.owner)[held.attribute] = slot
        self._slots = [one for one in self._slots if one is not other]
        for weight in other.graphs:
            slot.add(weight)

    def _places_of(self, owner: nn.Module) -> dict[str, Slot]:
        places: dict[str, Slot] | None = self._by_owner.get(owner)  # type: ignore[no-untyped-call]
        if places is None:
            self._by_owner[owner] = places = {}
        return places

    def _known(self, owner: nn.Module, attribute: str, tensor: torch.Tensor) -> Slot | None:
        """The slot of a place; not that of a weight that it was tied to, and is no longer."""
        slot: Slot | None = self._by_owner.get(owner, {}).get(attribute)  # type: ignore[no-untyped-call]
        if slot is None or slot.place() == (id(owner), attribute) or slot.tensor() is tensor:
            return slot
        return None

    def _make(self, path: str, owner: nn.Module | None, attribute: str, tensor: torch.Tensor) -> Slot:
        slot = Slot(
            path=path,
            owner=None if owner is None else weakref.ref(owner),
            attribute=attribute,
            owner_type=None if owner is None else type(owner),
            root=None,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            loose=weakref.ref(tensor) if owner is None else None,
        )
        if owner is not None:
            self._places_of(owner)[attribute] = slot
        self._forget_oldest()
        self._slots.append(slot)
        return slot

    def _forget_oldest(self) -> None:
        if len(self._slots) % _MOST_DEAD == 0:
            dead = [slot for slot in self._slots if not slot.is_alive()]
            gone = set(map(id, dead[:-_MOST_DEAD]))
            self._slots = [slot for slot in self._slots if id(slot) not in gone]

    def find(self, tensors: Sequence[torch.Tensor], hints: Sequence[str]) -> list[Slot]:
        """The slots of tensors that a graph is called with, from inside the model's call.

        Args:
            tensors: the Parameters, or what stands in for them.
            hints: their names in the graph, for those that no module on the stack holds.
        """
        with self._lock:
            stack = self.see_caller()
            places: dict[int, list[Any]] = {}
            if stack.root is not None:
                for held in held_weights(stack.root):
                    places.setdefault(id(held.tensor), []).append(held)
            missing = [t for t in tensors if id(t) not in places]
            owners = self._owners_of(missing) if missing else {}
            slots = []
            for tensor, hint in zip(tensors, hints, strict=True):
                if id(tensor) in places:
                    slot = self._of_places(places[id(tensor)], stack.prefix)
                else:
                    slot = self._of_owners(owners.get(id(tensor), []), tensor, stack.prefix + hint)
                slot.groups = slot.groups or stack.groups
                slots.append(slot)
            return slots

    def _owners_of(self, tensors: Sequence[torch.Tensor]) -> dict[int, list[tuple[nn.Module, str]]]:
        """The modules that hold tensors, by the tensors' ids.

        Asked for weights that no module on the stack holds: a function is compiled that calls a model. Looked for among
        all objects of the process, which takes some 50 ms, unless they are where an earlier search came by.
        """
        wanted = set(map(id, tensors))
        found = _held_by((module for known in self._searched if (module := known()) is not None), wanted)
        if found.keys() != wanted:
            modules = list(modules_alive())
            self._searched = list(map(weakref.ref, modules))
            found = _held_by(modules, wanted)
        return found

    def _of_owners(self, owners: list[tuple[nn.Module, str]], tensor: torch.Tensor, path: str) -> Slot:
        for owner, attribute in owners:
            known = self._known(owner, attribute, tensor)
            if known is not None:
                return _looked_at(known, tensor)
        if owners:
            return self._make(path, *owners[0], tensor)
        loose = [slot for slot in self._slots if slot.owner is None]
        for slot in loose:
            if slot.tensor() is tensor:
                return slot
        for slot in loose:
            if slot.path == path and slot.tensor() is None:  # the next one of a variable, say
                slot.loose = weakref.ref(tensor)
                return _looked_at(slot, tensor)
        return self._make(path, None, "", tensor)


def _looked_at(slot: Slot, tensor: torch.Tensor) -> Slot:
    slot.shape, slot.dtype = tuple(tensor.shape), tensor.dtype
    return slot


def _held_by(modules: Iterable[nn.Module], wanted: Set[int]) -> dict[int, list[tuple[nn.Module, str]]]:
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in modules:
        for attribute, tensor in held_parameters(module).items():
            if id(tensor) in wanted:
                found.setdefault(id(tensor), []).append((module, attribute))
    return found
