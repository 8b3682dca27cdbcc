"""The names that a graph's weights have in the module that was compiled, found while it is traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..source_names import cell_of, last_name, prefixes_of
from ..torch_internals.compilers import is_compiled
from ..torch_internals.dynamo import value_of_source
from ..torch_internals.fake_tensors import is_fake
from ..weight_names import qualified_name
from .call_stack import CallStack
from .held_weights import HeldWeight, held_weights


@dataclass(frozen=True)
class TracedWeight:
    """A weight of a graph that is being traced.

    Attributes:
        names: in the module that was compiled and, where it is another one, in the outermost that is being called.
            Where a function was compiled: in the outermost module that it reaches the weight through, and the same
            behind what the function calls that module by, as in ``teacher.fc.weight``.
        places: where it stands in the modules that are known; several where it is tied.
    """

    names: tuple[str, ...]
    places: tuple[HeldWeight, ...]


def traced_weights(inputs: Mapping[str, object]) -> dict[str, TracedWeight]:
    """The inputs of a graph that modules hold, by source; asked from inside the graph's compilation.

    A name is relative to the outermost compiled module that is being called; where a function was compiled, to the
    outermost module that is being called, or that the function reaches the weight through. What a source says is no
    name: Dynamo writes sources in many ways.

    Args:
        inputs: what the graph was traced with, by source.
    """
    roots = _Roots(_compiled_roots())
    found = {}
    for source, value in inputs.items():
        real = value_of_source(source) if is_fake(value) else None
        tensor = real if isinstance(real, torch.Tensor) else value
        if isinstance(tensor, torch.Tensor) and (places := roots.places(tensor, source)):
            found[source] = TracedWeight(roots.names(tensor, places, source), tuple(places))
    return found


def called_weights(tensors: Sequence[torch.Tensor]) -> list[TracedWeight | None]:
    """What `traced_weights` would say of what a graph is called with, from inside the call.

    Returns:
        None for a tensor that no module on the stack holds.
    """
    roots = _Roots(_compiled_roots())
    places = [(tensor, roots.places(tensor, "")) for tensor in tensors]
    return [TracedWeight(roots.names(tensor, found), tuple(found)) if found else None for tensor, found in places]


def _compiled_roots() -> list[nn.Module]:
    """The outermost compiled module that is being called, and the outermost of all."""
    modules = CallStack().modules
    outermost = [module for module in modules if is_compiled(module)][-1:]
    return [*outermost, *modules[-1:]]


class _Roots:
    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._held: dict[int, dict[int, list[HeldWeight]]] = {}

    def places(self, tensor: torch.Tensor, source: str) -> list[HeldWeight]:
        """Where a tensor stands: in the modules that are called, or else in the one that its source begins with."""
        found = [held for module in self._modules for held in self._of(module, tensor)]
        if found or not source:
            return found
        within = 0
        for value in map(value_of_source, prefixes_of(source)):  # from the outermost object on
            if isinstance(value, nn.Module):
                if held := self._of(value, tensor):
                    # A module inside a plain list is none of its owner's: only the source has the whole name.
                    return [replace(one, name=qualified_name(source)) for one in held[:1]] if within else held
                within += 1
        return []

    def names(self, tensor: torch.Tensor, places: Sequence[HeldWeight], source: str = "") -> tuple[str, ...]:
        """Of a tensor that stands at these places: that of the first, and that in the outermost module.

        Where no module is called that has it, the same behind what the function calls the outermost module by that the
        source leads through: two models in one function, a student and its teacher, have weights of the same names.
        """
        outermost = self._of(self._modules[-1], tensor)[:1] if self._modules else []
        names = [held.name for held in (*places[:1], *outermost)]
        if source and not any(self._of(module, tensor) for module in self._modules):
            called = _called(source)
            names += [f"{called}.{places[0].name}"] if called else []
        return tuple(dict.fromkeys(names))

    def _of(self, module: nn.Module, tensor: torch.Tensor) -> list[HeldWeight]:
        if id(module) not in self._held:
            places: dict[int, list[HeldWeight]] = {}
            for held in held_weights(module):
                places.setdefault(id(held.tensor), []).append(held)
            self._held[id(module)] = places
        return self._held[id(module)].get(id(tensor), [])


def _called(source: str) -> str:
    """What a function calls the outermost module by that a source leads through; empty where it has no name for it."""
    for expression in prefixes_of(source):
        if isinstance(value_of_source(expression), nn.Module):
            cell = cell_of(expression)
            return last_name(expression) if cell is None else _free_variable(*cell)
    return ""


def _free_variable(function: str, number: int) -> str:
    code = getattr(value_of_source(function), "__code__", None)
    return "" if code is None else str(code.co_freevars[number])
