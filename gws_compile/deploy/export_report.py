"""What an export wrote: `ExportReport`, as a table, as data and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate


@dataclass(frozen=True)
class ExportedWeight:
    """A weight of two or more dims in an export.

    Attributes:
        name: its name in the model.
        shape: the whole weight's.
        trained: format, or preset, block and sparsity that it was trained in; empty for one that is not cast.
        container: what holds it: a name that `Backend.export` takes, or ``"dense"``.
        bits: of an element, with its share of the scales.
        stored_bytes: of it in the files, scales included.
        reason: why it stays dense; empty where it is packed.
        note: what else is to be said of it; empty where there is nothing.
        sparsity: what of it is zero, such as ``"2:4"``, in whatever container; empty for a dense one.
    """

    name: str
    shape: tuple[int, ...]
    trained: str
    container: str
    bits: float
    stored_bytes: int
    reason: str = ""
    note: str = ""
    sparsity: str = ""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote; ``print(report)`` shows a table.

    Attributes:
        path: of the folder or file.
        format: the container of all packed weights, ``"mixed"`` where there are several, ``"dense"`` where there are
            none; or ``"torchao"``, ``"gguf"``, ``"mxfp8_sglang"``.
        weights: every weight of two or more dims.
        rest_bytes: of the tensors with fewer dims, and of buffers.
        model_bytes: of all tensors, as the model holds them.
        files: what the folder has, or the file's own name.
        load: Python, or a command, that loads it.
        notes: what its reader should know; one sentence each.
    """

    path: str
    format: str
    weights: tuple[ExportedWeight, ...]
    rest_bytes: int
    model_bytes: int
    files: tuple[str, ...]
    load: str
    notes: tuple[str, ...] = ()

    @property
    def packed(self) -> tuple[ExportedWeight, ...]:
        """The weights that are packed."""
        return tuple(weight for weight in self.weights if weight.container != "dense")

    @property
    def stored_bytes(self) -> int:
        """Of all tensors in the files."""
        return self.rest_bytes + sum(weight.stored_bytes for weight in self.weights)

    @property
    def compression(self) -> float:
        """``model_bytes / stored_bytes``."""
        return self.model_bytes / max(self.stored_bytes, 1)

    @property
    def average_bits(self) -> float:
        """Of an element of the packed weights, scales included; NaN where there are none."""
        elements = sum(math.prod(weight.shape) for weight in self.packed)
        return 8 * sum(weight.stored_bytes for weight in self.packed) / elements if elements else math.nan

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, with totals."""
        totals = {"stored_bytes": self.stored_bytes, "compression": self.compression}
        return {**asdict(self), **totals, "average_bits": self.average_bits if self.packed else None}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        rows = [
            (
                weight.name,
                " x ".join(map(str, weight.shape)),
                weight.trained or "-",
                weight.container,
                f"{weight.bits:.2f}",
                f"{weight.stored_bytes:,}",
                "; ".join(filter(None, (weight.reason, weight.note))),
            )
            for weight in self.weights
        ]
        table = tabulate(
            rows,
            headers=("weight", "shape", "trained in", "container", "bits", "bytes", "why dense"),
            colalign=("left", "right", "left", "left", "right", "right", "left"),
            maxcolwidths=[None] * 6 + [60],
            disable_numparse=True,
        )
        packed = f", {self.average_bits:.2f} bits an element" if self.packed else ""
        lines = [
            table,
            f"{len(self.packed)} of {len(self.weights)} weights packed{packed}; {self.rest_bytes:,} bytes of norms, "
            "biases and buffers",
            f"{self.path}: {self.stored_bytes:,} bytes, {self.compression:.2f} times smaller than the model's "
            f"{self.model_bytes:,}",
            f"load: {self.load}",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    __repr__ = __str__
