"""A row of a comparison: `ComparedRow`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .intervals import Interval

UNCAST = "uncast"
"""The column of the weights as they are."""


@dataclass(frozen=True)
class ComparedRow:
    """A setting over its seeds. Losses are means with 95 % intervals; differences are taken seed by seed.

    Attributes:
        name: of the setting.
        method: its method, see `ComparedSetting`.
        grid: label of what its weights are cast to; empty where that is no fixed grid.
        trained: loss with the noise of training; None where it was not measured.
        deployed: loss of the weights as they are deployed: cast, without noise.
        minus_plain: ``deployed`` less that of plain training (with the same further training arguments, where there is
            such a row).
        minus_cast: ``deployed`` less that of plain training whose weights are cast to the same grid afterwards.
        casts: losses of these weights cast to other grids, by label; ``"uncast"`` for the weights as they are.
        distances: how far the weights lie from grids, see `Grids.cast_to`.
        average_bits: bit width over the elements of the weights that are cast; None for plain training.
        bytes: of these weights; None where unknown.
        figures: further numbers of the training function.
        seeds: how many runs the losses are of.
        diverged: how many more ended with a loss that is no number.
        failed: messages of runs that raised.
    """

    name: str
    method: str
    grid: str
    trained: Interval | None
    deployed: Interval | None
    minus_plain: Interval | None
    minus_cast: Interval | None
    casts: Mapping[str, Interval]
    distances: Mapping[str, Interval]
    average_bits: float | None
    bytes: float | None
    figures: Mapping[str, Interval]
    seeds: int
    diverged: int = 0
    failed: tuple[str, ...] = ()
