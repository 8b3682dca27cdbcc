"""Which random stream a weight draws from: a key for each Parameter, looked up when the compiled graph is called."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .primitives import wrap_int32


def key_words(seed: int, name: str) -> tuple[int, int]:
    """The two int32 key words of a weight: BLAKE2b of its name, keyed with the seed.

    Stable across processes, ranks and machines.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return wrap_int32(int.from_bytes(digest[:4], "little")), wrap_int32(int.from_bytes(digest[4:], "little"))


class KeyRegistry:
    """Names the Parameters that come in and gives each a key.

    One compiled graph may serve many layers, so nothing about a layer is in the graph: its name there is relative
    to the compiled module. The first Parameter seen under a name has that name, the next ones ``name#1``, ``name#2``
    in the order of first use, which is the same in every process that runs the same program. A tied Parameter has
    one name.
    Entries of Parameters that are gone are dropped.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._used: dict[str, int] = {}

    def name(self, weight: torch.Tensor, hint: str) -> str:
        """The weight's unique name; ``hint`` is its name in the graph, used when it is new."""
        known: str | None = self._names.get(weight)  # type: ignore[no-untyped-call]
        if known is not None:
            return known
        count = self._used.get(hint, 0)
        self._used[hint] = count + 1
        name = hint if count == 0 else f"{hint}#{count}"
        self._names[weight] = name
        return name

    def words(self, weight: torch.Tensor, hint: str) -> tuple[int, int]:
        """The weight's two int32 key words."""
        return key_words(self._seed, self.name(weight, hint))

    def __len__(self) -> int:
        return len(self._names)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The names and weights that are alive."""
        for weight, name in self._names.items():  # type: ignore[no-untyped-call]
            yield name, weight


class KeyTable:
    """The int32 (weights, 2) key tensors of a graph on a device, one for each set of Parameters it is called with."""

    def __init__(self, registry: KeyRegistry, names: Sequence[str], device: torch.device) -> None:
        self._registry = registry
        self._names = names
        self._device = device
        self._tables: dict[tuple[int, ...], tuple[list[weakref.ref[torch.Tensor]], torch.Tensor]] = {}

    def __call__(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """The keys of these weights, a row each, in this order."""
        ids = tuple(map(id, weights))
        found = self._tables.get(ids)
        if found is not None and all(ref() is w for ref, w in zip(found[0], weights, strict=True)):
            return found[1]
        # Ids of dead Parameters are used again: drop what no longer matches, so that the tables do not pile up either.
        self._tables = {k: v for k, v in self._tables.items() if all(ref() is not None for ref in v[0])}
        rows = [self._registry.words(w, name) for w, name in zip(weights, self._names, strict=True)]
        table = torch.tensor(rows, dtype=torch.int32, device=self._device)
        self._tables[ids] = ([weakref.ref(w) for w in weights], table)
        return table
