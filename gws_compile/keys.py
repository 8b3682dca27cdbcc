"""Which random stream a weight draws from: a key for each Parameter, looked up when the compiled graph is called."""

from __future__ import annotations

import hashlib
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from .by_weights import ByWeights
from .callers import Callers
from .primitives import wrap_int32
from .warning import GwsWarning

_STAGE = re.compile(r"stage\d+")


def key_words(seed: int, name: str) -> tuple[int, int]:
    """The two int32 key words of a weight: BLAKE2b of its name, keyed with the seed.

    Stable across processes, ranks and machines.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return wrap_int32(int.from_bytes(digest[:4], "little")), wrap_int32(int.from_bytes(digest[4:], "little"))


class KeyRegistry:
    """Names the Parameters that come in and gives each a key.

    One compiled graph may serve many layers, so nothing about a layer is in the graph. A Parameter has its name in the
    outermost module that is being called (see `Callers`), or else its name in the graph. Where several have the same
    (models that share a backend, copies of a model), the first one seen has that name, the next ones ``name#1``,
    ``name#2`` in the order of first use, which is the same in every process that runs the same program. A tied
    Parameter has one name.
    Entries of Parameters that are gone are dropped.

    Attributes:
        roots: the outermost modules seen.
    """

    def __init__(self, seed: int) -> None:
        self.roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._seed = seed
        self._names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._groups: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._used: dict[str, int] = {}
        self._saved: dict[str, tuple[int, ...]] | None = None
        self._lock = threading.RLock()

    def words(self, weights: Sequence[torch.Tensor], hints: Sequence[str]) -> list[tuple[int, int]]:
        """The two int32 key words of each weight; the hints are their names in the graph.

        Raises:
            ValueError: a weight that is new has another shape than the loaded state says.
        """
        with self._lock:
            if any(self.name(weight) is None for weight in weights):
                callers = Callers()
                if callers.root is not None:
                    self.roots.add(callers.root)
                for weight, hint in zip(weights, hints, strict=True):
                    if self.name(weight) is None:
                        self._add(weight, callers.name(weight, hint))
                        self._groups[weight] = callers.groups
            return [key_words(self._seed, str(self.name(weight))) for weight in weights]

    def name(self, weight: torch.Tensor) -> str | None:
        """The weight's unique name; None when it has not been seen."""
        name: str | None = self._names.get(weight)  # type: ignore[no-untyped-call]
        return name

    def groups(self, weight: torch.Tensor) -> tuple[Any, ...]:
        """The process groups over which the weight's gradient is averaged, as far as the stack told."""
        groups: tuple[Any, ...] = self._groups.get(weight, ())  # type: ignore[no-untyped-call]
        return groups

    def _add(self, weight: torch.Tensor, name: str) -> None:
        count = self._used.get(name, 0)
        unique = name if count == 0 else f"{name}#{count}"
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
        if self._saved is None:
            return
        saved = self._saved.get(name)
        stage = name.partition(".")[0]
        if saved is None and _STAGE.fullmatch(stage) and not any(n.startswith(f"{stage}.") for n in self._saved):
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


class KeyTable:
    """The keys of a graph's weights, a `KeyRows` on each device for each set of Parameters that it is called with.

    Args:
        registry: gives the keys.
        names: per device, the names in the graph of the weights whose keys are the rows.
        places: per device, where these weights stand among those that the table is called with.
        on_new: called with each new set of Parameters.
    """

    def __init__(
        self,
        registry: KeyRegistry,
        names: Mapping[torch.device, Sequence[str]],
        places: Mapping[torch.device, Sequence[int]],
        on_new: Callable[[Sequence[torch.Tensor]], None],
    ) -> None:
        self._registry = registry
        self._names = names
        self._places = places
        self._on_new = on_new
        self._rows = ByWeights(self._make)

    def __call__(self, weights: Sequence[torch.Tensor]) -> dict[torch.device, KeyRows]:
        """The keys of these weights."""
        return self._rows(weights)

    def _make(self, weights: Sequence[torch.Tensor]) -> dict[torch.device, KeyRows]:
        made = {}
        for device, places in self._places.items():
            words = self._registry.words([weights[i] for i in places], self._names[device])
            # Each of them at a multiple of 16 bytes, or Inductor would copy it at each call.
            table = torch.tensor([[*row, 0, 0] for row in words], dtype=torch.int32, device=device)
            made[device] = KeyRows([row[:2] for row in table.unbind()])
        self._on_new(weights)
        return made


class KeyRows:
    """The keys of one set of Parameters, and how often they were used in the current draw.

    Attributes:
        tensors: int32, (2,) each.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        self._draw = -1
        self._uses = 0

    def count(self, draw: int) -> int:
        """Count a use in this draw, and say how many there were, this one included."""
        self._uses = self._uses + 1 if draw == self._draw else 1
        self._draw = draw
        return self._uses
