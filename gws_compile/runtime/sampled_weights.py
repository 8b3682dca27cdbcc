"""The weights that compiled graphs sample: what `Backend.metrics` and the histograms of a report are read from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..ops.masks import WeightMask
from ..passes import Weight
from ..settings.weight_settings import WeightSettings
from ..weight_names import first_free
from .weight_slots import Slot


@dataclass(frozen=True)
class SampledWeight:
    """A weight that graphs sample.

    Attributes:
        name: its unique name; where it draws noise, the name that it draws by.
        slot: its place.
        value: the weight as the model holds it now, a plain tensor or a DTensor, outside autograd.
        dtype: the one in which graphs read it (under FSDP2's mixed precision not the model's).
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        settings: how it is sampled.
        noisy: whether it gets noise in training.
        mask: how it is known what of it is zero; None for a dense one.
    """

    name: str
    slot: Slot
    value: torch.Tensor
    dtype: torch.dtype
    batch_dims: int
    settings: WeightSettings
    noisy: bool
    mask: WeightMask | None = None


def unique_names(slots: Iterable[Slot]) -> dict[Slot, str]:
    """A name for each of the slots: the one that it draws by, else its path, numbered where another has that."""
    slots = list(slots)
    names = {slot: slot.name for slot in slots if slot.name is not None}
    taken = set(names.values())
    for slot in slots:
        if slot not in names:
            names[slot] = first_free(slot.path, taken)
            taken.add(names[slot])
    return names


def sampling_of(slot: Slot) -> Weight | None:
    """What a graph that samples a weight knows of it: one that trains it, if there is one; None where none does."""
    sampled = [weight for weight in slot.graphs if weight.reason is None]
    if not sampled:
        return slot.prepared
    # In evaluation there is no noise; what a weight is, its training says.
    return next((one for one in reversed(sampled) if one.noisy), sampled[-1])


def sampled_weights(slots: Iterable[Slot]) -> Iterator[SampledWeight]:
    """Every sampled weight that is alive and that a graph was called with, once, in the order of the slots."""
    alive = [slot for slot in slots if slot.is_alive() and any(weight.reason is None for weight in slot.graphs)]
    names = unique_names(alive)
    for slot in alive:
        value, weight = slot.tensor(), sampling_of(slot)
        if value is None or value.is_meta or weight is None:
            continue
        dims = weight.reads[0].batch_dims
        yield SampledWeight(
            names[slot], slot, value.detach(), weight.dtype, dims, weight.sampled_as, weight.noisy, weight.mask
        )
