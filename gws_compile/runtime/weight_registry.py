"""Which weight is which: a unique name for each Parameter, found when compiled graphs are called."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..warning import GwsWarning
from ..weight_names import numbered, stage_prefix_of
from .call_stack import CallStack


class WeightRegistry:
    """Names the Parameters that come in.

    One compiled graph may serve many layers, so nothing about a layer is in the graph. A Parameter has its name in the
    outermost module that is being called (see `CallStack`), or else its name in the graph. Where several have the same
    (models that share a backend, copies of a model), the first one seen has that name, the next ones ``name#1``,
    ``name#2`` in the order of first use, which is the same in every process that runs the same program. A tied
    Parameter has one name.
    Entries of Parameters that are gone are dropped.

    Attributes:
        roots: the outermost modules seen.
    """

    def __init__(self) -> None:
        self.roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._groups: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._used: dict[str, int] = {}
        self._saved: dict[str, tuple[int, ...]] | None = None
        self._lock = threading.RLock()

    def register(self, weights: Sequence[torch.Tensor], hints: Sequence[str]) -> None:
        """Name the weights that have no name yet, in this order, from inside the model's call.

        Args:
            weights: the Parameters.
            hints: their names in the graph.

        Raises:
            ValueError: a weight that is new has another shape than the loaded state says.
        """
        with self._lock:
            if all(self.name(weight) is not None for weight in weights):
                return
            stack = CallStack()
            if stack.root is not None:
                self.roots.add(stack.root)
            for weight, hint in zip(weights, hints, strict=True):
                if self.name(weight) is None:
                    self._add(weight, stack.name(weight, hint))
                    self._groups[weight] = stack.groups

    def name(self, weight: torch.Tensor) -> str | None:
        """The weight's unique name; None when it has not been registered."""
        name: str | None = self._names.get(weight)  # type: ignore[no-untyped-call]
        return name

    def names(self, weights: Sequence[torch.Tensor]) -> list[str]:
        """The unique names of weights that have been registered."""
        return [self._names[weight] for weight in weights]

    def groups(self, weight: torch.Tensor) -> tuple[Any, ...]:
        """The process groups over which the weight's gradient is averaged, as far as the stack told."""
        groups: tuple[Any, ...] = self._groups.get(weight, ())  # type: ignore[no-untyped-call]
        return groups

    def _add(self, weight: torch.Tensor, name: str) -> None:
        count = self._used.get(name, 0)
        unique = numbered(name, count)
        self._check(unique, tuple(weight.shape))
        self._used[name] = count + 1
        self._names[weight] = unique

    def __len__(self) -> int:
        return len(self._names)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The names and weights that are alive."""
        for weight, name in self._names.items():  # type: ignore[no-untyped-call]
            yield name, weight

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and whole shape of every weight that is alive, and of those of a loaded state that are still to come."""
        return {**(self._saved or {}), **{name: tuple(weight.shape) for name, weight in self.items()}}

    def expect(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Hold the weights, present and to come, to the names and shapes of a saved run, if it had any.

        Raises:
            ValueError: a weight that is alive has another shape.
        """
        before, self._saved = self._saved, shapes or None
        try:
            for name, weight in self.items():
                self._check(name, tuple(weight.shape))
        except ValueError:
            self._saved = before
            raise

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        """Hold a weight to what `expect` has said of it; a `GwsWarning` where that is nothing.

        Args:
            name: its unique name.
            shape: its whole shape.

        Raises:
            ValueError: the saved run had it in another shape.
        """
        if self._saved is None:
            return
        saved = self._saved.get(name)
        stage = stage_prefix_of(name)
        if saved is None and stage and not any(n.startswith(stage) for n in self._saved):
            return  # the state of another pipeline stage: a shared checkpoint holds that of one rank
        if saved is None:
            warnings.warn(
                f"{name} is not among the weights of the loaded state: it draws noise of its own, which the saved run "
                "did not draw (is the model, or the way it is called, another one?)",
                GwsWarning,
                stacklevel=2,
            )
        elif saved != shape:
            raise ValueError(f"the state was saved with {name} of shape {saved}, this model has it of shape {shape}")
