"""Deciding, before anything is written, what becomes of each tensor: an `Entry` for each name in the file."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..numerics.blocks import Block
from ..warning import GwsWarning
from .collect import DeployedTensor, DeployedWeight
from .containers import CONTAINERS, OF_PRESET, Container, names


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor of the model as a checkpoint names it, before it is known how it is stored.

    Attributes:
        name: in the checkpoint.
        source: the tensor of the model.
        rows: int64, which of the source's rows it has, among those of all its matrices; None for the source as it is.
        shape: of it.
        is_linear: an engine takes it as the weight of a linear layer, (out, in), or as one of an expert's.
        raw: the model uses it as it is here, although it casts the same tensor elsewhere.
        dense_because: why it cannot be packed, whatever the format; None where it can.
    """

    name: str
    source: DeployedTensor
    rows: torch.Tensor | None
    shape: tuple[int, ...]
    is_linear: bool
    raw: bool = False
    dense_because: str | None = None

    @property
    def weight(self) -> DeployedWeight | None:
        """How it is cast; None for what stays as it is."""
        return None if self.raw else self.source.weight


@dataclass(frozen=True, eq=False)
class PlannedEntry:
    """An entry with its container.

    Attributes:
        entry: the entry.
        container: which holds it; None where it stays dense.
        shift: of `Container.shift`.
        reason: why it stays dense, of a weight that is cast; empty otherwise.
    """

    entry: Entry
    container: Container | None = None
    shift: int = 0
    reason: str = ""

    @property
    def group(self) -> Block:
        """Rows and columns that share a stored scale, None for a whole side; of one that is packed."""
        weight, container = self.entry.weight, self.container
        assert weight is not None
        assert container is not None
        return container.group_of(weight.settings.block, *weight.shape[1:])


def plan(entries: Sequence[Entry], fmt: str | None, among: Sequence[str] = ()) -> list[PlannedEntry]:
    """Choose a container for each entry.

    Args:
        entries: of the checkpoint.
        fmt: a name in `CONTAINERS`; ``"dense"``; or None for the one that each weight was trained for.
        among: the containers that there are; all when empty.

    Raises:
        ValueError: a weight does not fit into the container that was asked for, or none can be packed.
    """
    planned = [_planned(entry, fmt, among or tuple(CONTAINERS)) for entry in entries]
    if fmt != "dense" and not any(one.container for one in planned):
        reasons = list(dict.fromkeys(f"{one.entry.name}: {one.reason}" for one in planned if one.reason))
        text = f"no weight can be packed, so nothing low-bit comes out: {'; '.join(reasons[:4])}"
        if fmt is not None or among:
            raise ValueError(f'{text}. format="dense" writes the cast weights in their own dtype')
        warnings.warn(f"{text}. The cast weights are written in their own dtype", GwsWarning, stacklevel=4)
    return planned


def _planned(entry: Entry, fmt: str | None, among: Sequence[str]) -> PlannedEntry:
    weight = entry.weight
    if weight is None:
        return PlannedEntry(entry)
    if fmt == "dense":
        return PlannedEntry(entry, reason='format="dense"')
    if entry.dense_because is not None:
        return PlannedEntry(entry, reason=entry.dense_because)
    if weight.settings.levels is not None:
        reason = "no file that engines load has a codebook of its own for each weight"
        if fmt is not None:
            raise ValueError(f'{entry.name}, trained in {_trained(weight)}: {reason}. Export with format="dense"')
        return PlannedEntry(entry, reason=reason)
    if fmt is not None:
        container = CONTAINERS[fmt]
        problem = _problem(entry, weight, container)
        if problem is not None:
            raise ValueError(f"{entry.name}, trained in {_trained(weight)}: {problem}. {_remedy(entry, weight, fmt)}")
        return _in(entry, weight, container)
    wanted = OF_PRESET.get(weight.settings.preset) if weight.settings.learned is None else None
    candidates = [CONTAINERS[name] for name in ((wanted,) if wanted is not None and wanted in among else among)]
    fitting = [one for one in candidates if _problem(entry, weight, one) is None]
    if not fitting:
        return PlannedEntry(entry, reason=_why_none(entry, weight, candidates))
    return _in(entry, weight, min(fitting, key=lambda one: one.bits(weight.settings.block, *weight.shape[1:])))


def _in(entry: Entry, weight: DeployedWeight, container: Container) -> PlannedEntry:
    shift = container.shift(weight.formats, weight.settings.scale)
    assert shift is not None
    return PlannedEntry(entry, container, shift)


def _problem(entry: Entry, weight: DeployedWeight, container: Container) -> str | None:
    """Why a weight does not fit into a container; None where it does."""
    if container.shift(weight.formats, weight.settings.scale) is None:
        return container.cannot_hold(weight.formats, weight.settings.scale)
    misfit = container.misfit(weight.settings.block, *weight.shape[1:])
    if misfit is not None:
        return misfit
    rows, side = entry.rows, container.group_of(weight.settings.block, *weight.shape[1:])[0]
    if rows is None or side == 1:
        return None
    # Some rows of a weight: they have to be whole groups, in their order.
    height = weight.shape[1]
    consecutive = bool((rows.diff() == 1).all()) and int(rows[0]) // height == int(rows[-1]) // height
    first, last = int(rows[0]) % height, int(rows[-1]) % height + 1
    if not consecutive or (side is not None and (first % side or (last % side and last != height))):
        return f"its rows are only a part of a group of {container.name} in {weight.name}, where it is stored apart"
    return None


def _trained(weight: DeployedWeight) -> str:
    return f"{weight.text} with scale={weight.settings.scale!r}"


def _remedy(entry: Entry, weight: DeployedWeight, fmt: str) -> str:
    others = [one for one in CONTAINERS.values() if one.name != fmt and _problem(entry, weight, one) is None]
    if others:
        return f"It fits into: {names(others)}. Export with one of these, or train with fmt={_preset_of(fmt)!r}"
    return f'Train with fmt={_preset_of(fmt)!r}, leave the weight alone by a rule, or export with format="dense"'


def _preset_of(fmt: str) -> str:
    return next(preset for preset, container in OF_PRESET.items() if container == fmt)


def _why_none(entry: Entry, weight: DeployedWeight, candidates: Sequence[Container]) -> str:
    """Why no container holds a weight, shortly."""
    holding = [one for one in candidates if one.shift(weight.formats, weight.settings.scale) is not None]
    if not holding:
        if len(candidates) == 1:
            return candidates[0].cannot_hold(weight.formats, weight.settings.scale)
        text = "+".join(fmt.name for fmt in weight.formats)
        return f"no container holds {text} with scale={weight.settings.scale!r}"
    return "; ".join(dict.fromkeys(str(_problem(entry, weight, one)) for one in holding))


def check_siblings(planned: Iterable[PlannedEntry], groups: Iterable[Sequence[str]]) -> None:
    """Hold what engines fuse into one matrix to one container, with one group.

    Args:
        planned: the entries.
        groups: the names of weights that are fused.

    Raises:
        ValueError: siblings are stored in several ways.
    """
    by_name = {one.entry.name: one for one in planned}
    for group in groups:
        found = [by_name[name] for name in group if name in by_name]
        ways = {way_of(one) for one in found}
        if len(ways) > 1:
            listed = ", ".join(f"{one.entry.name} {'-'.join(map(str, way_of(one)))}" for one in found)
            raise ValueError(
                f"engines fuse these weights into one matrix, which has one format, and they are stored as: {listed}. "
                'Give them one rule, or export with a format that holds them all, or with format="dense"'
            )


def way_of(planned: PlannedEntry) -> tuple[object, ...]:
    """What weights in one group of a configuration have in common: container and group."""
    if planned.container is None or planned.entry.weight is None:
        return ("dense",)
    return (planned.container.name, *([] if not planned.container.free_group else [planned.group[1] or "row"]))


def stored_shapes(planned: PlannedEntry, dtype: torch.dtype) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what is stored of an entry, by the keys of `gws_compile.deploy.layouts.SUFFIXES`.

    Args:
        planned: the entry.
        dtype: of a dense tensor.
    """
    container, shape = planned.container, planned.entry.shape
    weight = planned.entry.weight
    if container is None or weight is None:
        return {"codes": (shape, dtype)}
    (rows, cols), matrices = shape[-2:], math.prod(shape[:-2])
    if container.format == "pack-quantized":
        words = -(-cols // (32 // container.element.storage_bits))
        codes = ((matrices * rows, words), torch.int32)
    elif container.codec.packed:
        codes = ((matrices * rows, cols * container.element.storage_bits // 8), torch.uint8)
    else:
        codes = ((matrices * rows, cols), torch.float8_e4m3fn)
    group = planned.group
    down = 1 if group[0] is None else -(-rows // min(group[0], weight.shape[1]))
    across = 1 if group[1] is None else -(-cols // min(group[1], cols))
    kind = {"e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn, "float32": torch.float32}[container.scale]
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "packed" if container.codec.packed else "codes": codes,
        "scale": ((matrices,) if group == (None, None) else (matrices * down, across), kind),
    }
    if container.scale == "e4m3":
        stored["global_scale"] = ((matrices,), torch.float32)
    if container.format == "pack-quantized":
        stored["shape"] = ((2,), torch.int64)
    return stored
