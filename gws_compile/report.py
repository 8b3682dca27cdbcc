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


class Report:
    """The weights that a backend has seen, over all graphs compiled so far.

    ``print(report)`` shows a table. A weight that several graphs treat alike stands there once; one that is sampled in
    training and cast in evaluation stands there as sampled.
    """

    def __init__(self, records: Iterable[WeightRecord]) -> None:
        merged: dict[tuple[object, ...], WeightRecord] = {}
        for record in records:
            key = (record.name, record.shape, record.rewritten, record.reason)
            known = merged.get(key)
            if known is None or (known.noise == "none" and record.noise not in ("", "none")):
                merged[key] = record
        self.records = tuple(merged.values())

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
        """The records as a JSON array of objects, keyed as `WeightRecord`."""
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
        return f"{table}\n{len(self.rewritten)} of {len(self)} weights rewritten, {parameters:,} of {total:,} elements"

    __repr__ = __str__
