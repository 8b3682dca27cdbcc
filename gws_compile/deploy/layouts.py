"""What a packed weight is called in a file, and what else the file says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import torch

from .containers import Container
from .encode import decode_rows
from .folder import StoredTensor
from .plan import PlannedEntry, stored_shapes

SUFFIXES: Mapping[str, str] = MappingProxyType(
    {"codes": "", "packed": "_packed", "scale": "_scale", "global_scale": "_global_scale", "shape": "_shape"}
)
"""What is stored of a weight -> what stands behind its name for it, as compressed-tensors has it."""


class Layout:
    """The layout of compressed-tensors: ``weight_packed``, ``weight_scale``, and so on."""

    suffixes = SUFFIXES
    containers: tuple[str, ...] = ()
    """The containers that it has; all of them where it is empty."""

    def tensors(self, one: PlannedEntry) -> dict[str, StoredTensor]:
        """The tensors of an entry, by the keys of `SUFFIXES`."""
        shapes = self._shapes(one)
        name = one.entry.name
        return {
            key: StoredTensor(name if one.container is None else self.name(name, key), shape, dtype)
            for key, (shape, dtype) in shapes.items()
        }

    def _shapes(self, one: PlannedEntry) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        return stored_shapes(one, one.entry.source.tensor.dtype)

    def name(self, weight: str, key: str) -> str:
        """What a part of a packed weight is called."""
        return weight + self.suffixes[key]

    def store(self, one: PlannedEntry, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that a file gets of a packed weight, by name.

        Args:
            one: the entry.
            stored: by the keys of `SUFFIXES`.
        """
        return {self.name(one.entry.name, key): value for key, value in stored.items()}

    def note_dense(self, name: str) -> None:
        """Take notice of a dense tensor."""

    def decode(
        self, one: PlannedEntry, container: Container, read: Callable[[str], torch.Tensor]
    ) -> Iterable[torch.Tensor]:
        """What a file says of a packed weight, in float32, some rows at a time.

        Args:
            one: the entry.
            container: which holds it.
            read: reads a tensor of the file by name.
        """
        stored = {key: read(self.name(one.entry.name, key)) for key in self._shapes(one)}
        return decode_rows(stored, container, one.group, one.entry.shape)

    def metadata(self) -> dict[str, str]:
        """What the header of the next file says, of what has been stored since the last one."""
        return {"format": "pt"}


class SglangLayout(Layout):
    """That of SGLang's MXFP8, whose scales have another name."""

    suffixes = MappingProxyType({**SUFFIXES, "scale": "_scale_inv"})
