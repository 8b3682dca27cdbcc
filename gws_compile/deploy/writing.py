"""Writing planned entries: sources gathered one by one, encoded, stored, and decoded again from what was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .collect import DeployedTensor, DeployedWeight
from .containers import Container
from .encode import Digest, EncodedWeight, block_scales, cast_weight, digest, encode_weight, stored_tensors
from .folder import write_shards
from .layouts import Layout
from .plan import PlannedEntry

SHARD_BYTES = 2 * 2**30
"""Of a file, at most, unless one tensor has more; about what a writing rank holds beside the model."""

_NVFP4_SPAN = 17
"""How many binades scales stored in e4m3 span, 2**-9 .. 2**8."""


@dataclass(frozen=True, eq=False)
class Group:
    """The entries that come from one tensor of the model.

    Attributes:
        source: that tensor.
        entries: in the order of the file.
    """

    source: DeployedTensor
    entries: tuple[PlannedEntry, ...]

    @property
    def container(self) -> Container | None:
        """The one of its packed entries; None where all are dense."""
        return next((one.container for one in self.entries if one.container is not None), None)


def groups_of(planned: Sequence[PlannedEntry]) -> list[Group]:
    """The entries by their sources, in the order of the first of each."""
    by_source: dict[int, list[PlannedEntry]] = {}
    for one in planned:
        by_source.setdefault(id(one.entry.source.tensor), []).append(one)
    return [Group(entries[0].entry.source, tuple(entries)) for entries in by_source.values()]


class Writer:
    """Writes groups of entries into files of safetensors, and decodes them again.

    Args:
        planned: the entries.
        layout: what tensors are called.
        beside: tensors that are gathered behind all others, for what is written beside the files.
        family_of: entries of equal families share NVFP4's divisor, where the model as a whole cannot have one.
        shard_bytes: see `SHARD_BYTES`.
    """

    def __init__(
        self,
        planned: Sequence[PlannedEntry],
        layout: Layout,
        family_of: Callable[[str], str],
        beside: Sequence[torch.Tensor] = (),
        *,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self._groups = groups_of(planned)
        self._layout = layout
        self._family_of = family_of
        self._beside = beside
        self._shard_bytes = shard_bytes
        self._digests: dict[str, int] = {}
        self._divisors: dict[str, float] = {}

    def gathers(self) -> list[torch.Tensor]:
        """The tensors that ranks gather together, in their order."""
        return [*(group.source.tensor for group in (*self._divided(), *self._groups)), *self._beside]

    def _divided(self) -> list[Group]:
        """The groups whose scales NVFP4's container has yet to divide: powers of two."""
        return [
            group
            for group in self._groups
            if group.container is not None
            and group.container.scale == "e4m3"
            and group.source.weight is not None
            and not group.source.weight.spec.needs_matrix_maximum
        ]

    def write(self, folder: Path, values: Iterator[torch.Tensor]) -> tuple[str, ...]:
        """Write all files.

        Args:
            folder: to write into.
            values: the tensors of `gathers`; those of what is written beside the files are left.

        Raises:
            ValueError: a weight has a NaN or an Inf; NVFP4's exponents are too far apart; or what was written is not
                what the compiled model uses.

        Returns:
            Their names.
        """
        self._find_divisors(values)
        return write_shards(
            folder,
            [
                [one for entry in group.entries for one in self._layout.tensors(entry).values()]
                for group in self._groups
            ],
            (self._made(group, next(values)) for group in self._groups),
            self._check,
            self._layout.metadata,
            largest=self._shard_bytes,
        )

    def _find_divisors(self, values: Iterator[torch.Tensor]) -> None:
        """NVFP4's divisors: engines take one for fused layers, so that it is one for the model, or for a family."""
        spans: dict[str, tuple[int, int]] = {}
        for group in self._divided():
            weight, entry = group.source.weight, group.entries[0]
            assert weight is not None
            found = _exponents(_finite(next(values), group.source), weight)
            if found is not None:
                spans[entry.entry.name] = found[0] - entry.shift, found[1] - entry.shift
        divided = [one.entry.name for group in self._divided() for one in group.entries if one.container]
        families = {"": spans}
        if spans and _span(spans) > _NVFP4_SPAN:
            families = {}
            for name, span in spans.items():
                families.setdefault(self._family_of(name), {})[name] = span
        for family, members in families.items():
            if members and _span(members) > _NVFP4_SPAN:
                raise ValueError(_too_far(members, family))
            top = max((high for _, high in members.values()), default=0)
            for name in divided:
                if family in ("", self._family_of(name)):
                    self._divisors[name] = 2.0 ** (8 - top)
        for name in divided:  # of a family whose weights are all 0
            self._divisors.setdefault(name, 1.0)

    def _made(self, group: Group, value: torch.Tensor) -> Mapping[str, torch.Tensor]:
        source, weight = group.source, group.source.weight
        if source.is_parameter and value.is_floating_point() and not _tells_broken_blocks(group):
            _finite(value, source)
        made: dict[str, torch.Tensor] = {}
        encoded: dict[tuple[str, int], EncodedWeight] = {}
        cast: torch.Tensor | None = None
        for one in group.entries:
            entry = one.entry
            if one.container is None or weight is None:
                dense = value
                if entry.weight is not None:
                    cast = cast_weight(value, entry.weight).to(value.dtype) if cast is None else cast
                    dense = cast
                if entry.rows is not None:
                    dense = (dense if dense.ndim < 2 else dense.reshape(-1, dense.shape[-1]))[entry.rows]
                dense = dense.reshape(entry.shape).contiguous()
                # A tensor of the file is no view of another, nor of the model.
                made[entry.name] = dense.clone() if dense.data_ptr() == value.data_ptr() else dense
                self._digests[entry.name] = digest(dense)
                self._layout.note_dense(entry.name)
                continue
            key = (one.container.name, one.shift)
            if key not in encoded:
                apart = any(of_group.entry.rows is not None for of_group in group.entries)
                encoded[key] = encode_weight(value, weight, one.container, one.shift, keep_cast=apart)
                _finite_scales(encoded[key], value, source)
            stored = stored_tensors(encoded[key], weight, one.container, entry.rows, self._divisors.get(entry.name))
            self._digests[entry.name] = encoded[key].digest
            if entry.rows is not None:
                kept = encoded[key].cast
                assert kept is not None
                self._digests[entry.name] = digest(kept[entry.rows], signed_zero=one.container.codec.signed_zero)
            made.update(self._layout.store(one, stored))
        return made

    def _check(self, number: int, read: Callable[[str], torch.Tensor]) -> None:
        """Decode what was written, and hold it to what the compiled model uses."""
        for one in self._groups[number].entries:
            entry, container = one.entry, one.container
            if container is None or entry.weight is None:
                same = digest(read(entry.name)) == self._digests.pop(entry.name)
            else:
                found = Digest(entry.weight.spec.dtype, signed_zero=container.codec.signed_zero)
                for rows in self._layout.decode(one, container, read):
                    found.update(rows)
                same = found.value() == self._digests.pop(entry.name)
            if not same:
                raise ValueError(
                    f"{entry.name}: what was written as {'dense' if container is None else container.name} does not "
                    "decode to what the compiled model uses. Nothing was exported; please report this, with the "
                    "settings of the weight"
                )


def _finite(value: torch.Tensor, source: DeployedTensor) -> torch.Tensor:
    wide = value.float() if value.itemsize == 1 else value
    if not wide.isfinite().all():
        count = int((~wide.isfinite()).sum())
        raise ValueError(
            f"{source.name} has {count} element{'s' if count > 1 else ''} that {'are' if count > 1 else 'is'} NaN or "
            "Inf: no engine can use it. Export an earlier checkpoint"
        )
    return value


def _tells_broken_blocks(group: Group) -> bool:
    """Whether the scales of a weight are NaN where a block has a NaN or an Inf, which `_finite_scales` sees."""
    weight = group.source.weight
    if group.container is None or weight is None:
        return False
    return weight.settings.scale is not None and not weight.spec.needs_matrix_maximum


def _finite_scales(encoded: EncodedWeight, value: torch.Tensor, source: DeployedTensor) -> None:
    """Hold a weight to `_finite` where a block of it has been found to be broken."""
    if encoded.scales.isnan().any():
        _finite(value, source)


def _exponents(value: torch.Tensor, weight: DeployedWeight) -> tuple[int, int] | None:
    """The smallest and the largest exponent of the block scales, powers of two; None where all weights are 0."""
    scales = block_scales(value, weight)
    if not scales.numel():
        return None
    exponents = scales.log2()
    return int(exponents.min()), int(exponents.max())


def _span(spans: Mapping[str, tuple[int, int]]) -> int:
    return max(high for _, high in spans.values()) - min(low for low, _ in spans.values())


def _too_far(members: Mapping[str, tuple[int, int]], family: str) -> str:
    lowest = min(members, key=lambda name: members[name][0])
    highest = max(members, key=lambda name: members[name][1])
    return (
        f"the scales of nvfp4 blocks span {_span(members)} binades{f' in {family}' if family else ''}, from "
        f"2**{members[lowest][0]} in {lowest} to 2**{members[highest][1]} in {highest}; stored in e4m3 they can span "
        f"{_NVFP4_SPAN}. Train with fmt='nvfp4', whose scales have two levels, or export with format='mxfp4' or 'mxfp8'"
    )
