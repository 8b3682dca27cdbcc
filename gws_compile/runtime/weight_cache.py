"""What is kept for each set of Parameters that a compiled graph is called with."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class WeightCache(Generic[T]):
    """A value for each tuple of Parameters, by identity; values of Parameters that are gone are dropped."""

    def __init__(self, make: Callable[[Sequence[torch.Tensor]], T]) -> None:
        self._make = make
        self._kept: dict[tuple[int, ...], tuple[list[weakref.ref[torch.Tensor]], T]] = {}

    def __call__(self, weights: Sequence[torch.Tensor]) -> T:
        """The value of these weights, made at their first call."""
        ids = tuple(map(id, weights))
        found = self._kept.get(ids)
        if found is not None and all(map(operator.is_, map(operator.call, found[0]), weights)):
            return found[1]
        # Ids of dead Parameters are used again: drop what no longer matches, so that the values do not pile up either.
        self._kept = {k: v for k, v in list(self._kept.items()) if all(ref() is not None for ref in v[0])}
        value = self._make(weights)
        self._kept[ids] = ([weakref.ref(w) for w in weights], value)
        return value
