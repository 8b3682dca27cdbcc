"""What was rewritten and what was not: `Report`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from math import prod

from tabulate import tabulate


@dataclass(frozen=True)
class WeightRecord:
    """One weight in the report.

    Attributes:
        name: qualified name, relative to the compiled module.
        shape: the weight's.
        dtype: the weight's, such as ``"float32"``.
        op: the operation that reads it (``"linear"``); several are joined by ``", "``; empty if none does.
        rewritten: whether its reads see the cast weight.
        reason: why it was left alone; empty when rewritten.
        fmt: the format it is cast to; empty when left alone.
        bits: the bit width b of its noise; None when left alone or cast without noise.
        noise: ``"rounded_normal"``, ``"uniform"``, or ``"none"`` for a cast without noise (frozen weights, and graphs
            traced with gradients disabled); empty when left alone.
        location: ``file:line`` of the first read in the user's code.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    op: str
    rewritten: bool
    reason: str
    fmt: str
    bits: float | None
    noise: str
    location: str


@dataclass(frozen=True)
class BitsSummary:
    """What learned bit widths stand for.

    Attributes:
        average: bit width, over all elements.
        share: format -> share of the elements that are cast to it in noise-free calls.
        stored_bytes: of the cast weights, with a byte for each block's scale where the format is scaled.
        by_weight: the same for each weight; empty in a weight's own summary.
    """

    average: float
    share: dict[str, float]
    stored_bytes: int
    by_weight: dict[str, BitsSummary]


class Report:
    """The weights that a backend has seen, over all graphs compiled so far, and those of their models in no graph.

    ``print(report)`` shows a table. A weight that several graphs treat alike stands there once; one that is sampled in
    training and cast in evaluation stands there as sampled.

    Attributes:
        records: the weights.
        bits: what learned bit widths stand for now; None while widths are fixed, or before any is known.
    """

    def __init__(self, records: Iterable[WeightRecord], bits: BitsSummary | None = None) -> None:
        merged: dict[tuple[object, ...], WeightRecord] = {}
        for record in records:
            key = (record.name, record.shape, record.rewritten, record.reason)
            known = merged.get(key)
            if known is None or (known.noise == "none" and record.noise not in ("", "none")):
                merged[key] = record
        self.records = tuple(merged.values())
        self.bits = bits

    @property
    def rewritten(self) -> tuple[WeightRecord, ...]:
        """The weights whose reads see the cast weight."""
        return tuple(r for r in self.records if r.rewritten)

    @property
    def skipped(self) -> tuple[WeightRecord, ...]:
        """The weights left alone; ``reason`` says why."""
        return tuple(r for r in self.records if not r.rewritten)

    def __iter__(self) -> Iterator[WeightRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def to_json(self) -> str:
        """The records as a JSON array of objects, keyed as `WeightRecord`; learned bit widths are in `bits`."""
        return json.dumps([asdict(r) for r in self.records], indent=2)

    def __str__(self) -> str:
        if not self.records:
            return "gws_compile: no weights seen yet (nothing has been compiled)"
        rows = [
            (
                r.name,
                " x ".join(map(str, r.shape)),
                r.op,
                r.fmt,
                "" if r.bits is None else f"{r.bits:g}",
                r.noise if r.rewritten else f"left alone: {r.reason}",
            )
            for r in self.records
        ]
        table = tabulate(
            rows,
            headers=("weight", "shape", "read by", "format", "bits", "noise"),
            colalign=("left", "right", "left", "left", "right", "left"),
            maxcolwidths=[None, None, None, None, None, 60],
            disable_numparse=True,
        )
        parameters = sum(prod(r.shape) for r in self.rewritten)
        total = sum(prod(r.shape) for r in self.records)
        text = f"{table}\n{len(self.rewritten)} of {len(self)} weights rewritten, {parameters:,} of {total:,} elements"
        return text if self.bits is None else f"{text}\n\n{self._bits_table(self.bits)}"

    def _bits_table(self, bits: BitsSummary) -> str:
        formats = list(bits.share)
        rows = [
            (name, f"{s.average:.2f}", *(f"{100 * s.share[f]:.1f} %" for f in formats), f"{s.stored_bytes / 1024:,.1f}")
            for name, s in [*bits.by_weight.items(), ("all", bits)]
        ]
        return tabulate(
            rows,
            headers=("learned bit widths", "average", *formats, "KiB"),
            colalign=("left", *["right"] * (len(formats) + 2)),
            disable_numparse=True,
        )

    __repr__ = __str__
