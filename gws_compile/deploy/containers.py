"""The containers of packed weights: what each holds, and whether a weight as it was trained fits inside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

from ..numerics.blocks import Block, clamped
from ..numerics.elements import ElementFormat
from ..numerics.formats import FORMATS
from ..numerics.integers import IntFormat
from ..numerics.scales import POWERS_OF_TWO, Scale
from .codecs import FLOAT8, INT4, INT8, NIBBLES, SIXES, Codec, values_of_codes

StoredScale = Literal["e8m0", "e4m3", "float32"]
"""``"e8m0"``: an exponent, as uint8; ``"e4m3"``: that of NVFP4, with a float32 divisor for the weight."""


_SHIFTS = tuple(sorted(range(-16, 17), key=abs))


@dataclass(frozen=True)
class Container:
    """A way in which checkpoints hold a packed weight.

    Attributes:
        name: what `Backend.export` calls it.
        element: what a code stands for.
        group: rows and columns that share a stored scale; None for a whole side.
        scale: how scales are stored.
        codec: how codes lie in bytes.
        format: compressed-tensors' name of it.
        free_group: a group may have any number of columns; ``group`` is the usual one.
    """

    name: str
    element: ElementFormat
    group: Block
    scale: StoredScale
    codec: Codec
    format: str
    free_group: bool = False

    def group_of(self, block: Block, rows: int, cols: int) -> Block:
        """The group in which a weight is stored that was trained in these blocks, None for a whole side."""
        if not self.free_group:
            return self.group
        side = block[1]
        return 1, None if side is None or side > cols else side

    def shift(self, formats: Sequence[ElementFormat], scale: Scale) -> int | None:
        """The number s for which every level of the formats, times 2**s, is one of the container's.

        Args:
            formats: what the weight's blocks were cast to.
            scale: rule of their scale; the stored scale is X / 2**s.

        Returns:
            The one nearest to 0; None where there is none, or where the scale cannot be stored.
        """
        powers = scale in (*POWERS_OF_TWO, None)
        if (self.scale == "e8m0" and not powers) or (self.scale != "e4m3" and scale == "nvfp4"):
            return None
        if self.scale == "e4m3" and not powers and scale != "nvfp4":
            return None
        if not all(fmt.scaled for fmt in formats):
            return None
        shifts = (0,) if scale == "nvfp4" else _SHIFTS
        return next((s for s in shifts if all(_holds(self.element, fmt, s) for fmt in formats)), None)

    def cannot_hold(self, formats: Sequence[ElementFormat], scale: Scale) -> str:
        """Why `shift` is None."""
        held = {"e8m0": "powers of two", "e4m3": "powers of two or those of scale='nvfp4'", "float32": "float32"}
        wide = [fmt.name for fmt in formats if not any(_holds(self.element, fmt, s) for s in _SHIFTS)]
        if wide:
            return f"{self.name} has codes of {self.element.name}, which do not hold {', '.join(wide)}"
        return f"{self.name} has scales that are {held[self.scale]}, and these are of scale={scale!r}"

    def misfit(self, block: Block, rows: int, cols: int) -> str | None:
        """What of a weight's shape or blocks is in the way; None where it fits."""
        group = self.group_of(block, rows, cols)
        if self.scale != "float32" and group[1] is not None and cols % group[1]:
            return f"{self.name} needs a multiple of {group[1]} columns, and it has {cols}"
        if self.free_group and group[1] is not None and cols % group[1]:
            return f"{self.name} needs a number of columns that its groups of {group[1]} divide, and it has {cols}"
        if cols % self.codec.multiple:
            return f"{self.name} needs a multiple of {self.codec.multiple} columns, and it has {cols}"
        sizes, sides = clamped(group, rows, cols), clamped(block, rows, cols)
        # A group that ends where the weight does lies inside a block that does.
        inside = [
            side >= length or (size <= side and side % size == 0)
            for size, side, length in zip(sizes, sides, (rows, cols), strict=True)
        ]
        if not all(inside):
            return f"a group of {self.name}, {_text(group)}, does not lie inside a block of training, {_text(block)}"
        return None

    def bits(self, block: Block, rows: int, cols: int) -> float:
        """Bits of an element, with its share of the scales; without what a weight has once."""
        size = {"e8m0": 8, "e4m3": 8, "float32": 32}[self.scale]
        group = clamped(self.group_of(block, rows, cols), rows, cols)
        return self.element.storage_bits + size / math.prod(group)


def _text(block: Block) -> str:
    rows, cols = block
    return f"{rows or 'all'} x {cols or 'all'}"


@lru_cache(maxsize=1024)
def _holds(container: ElementFormat, fmt: ElementFormat, shift: int) -> bool:
    """Whether every positive level of a format, times 2**shift, is one of another."""
    factor = 2.0**shift
    return _levels(fmt) is not None and all(
        level * factor in (_levels(container) or ()) for level in _levels(fmt) or ()
    )


@lru_cache(maxsize=256)
def _levels(fmt: ElementFormat) -> frozenset[float] | None:
    """The positive levels; None of a format with more bits than any container has."""
    if isinstance(fmt, IntFormat):
        return frozenset(float(level) for level in range(1, int(fmt.max) + 1))
    if fmt.storage_bits > 8 or not fmt.scaled:
        return None
    return frozenset(level for level in values_of_codes(fmt) if 0 < level <= fmt.max)


CONTAINERS: Mapping[str, Container] = MappingProxyType(
    {
        one.name: one
        for one in (
            Container("mxfp4", FORMATS["fp4_e2m1"], (1, 32), "e8m0", NIBBLES, "mxfp4-pack-quantized"),
            Container("nvfp4", FORMATS["fp4_e2m1"], (1, 16), "e4m3", NIBBLES, "nvfp4-pack-quantized"),
            Container("int4", IntFormat(4), (1, 128), "float32", INT4, "pack-quantized", free_group=True),
            Container("mxfp6", FORMATS["fp6_e2m3"], (1, 32), "e8m0", SIXES, "mxfp6-pack-quantized"),
            Container("fp8_tensor", FORMATS["fp8_e4m3"], (None, None), "float32", FLOAT8, "naive-quantized"),
            Container("fp8_block", FORMATS["fp8_e4m3"], (128, 128), "float32", FLOAT8, "naive-quantized"),
            Container("fp8_channel", FORMATS["fp8_e4m3"], (1, None), "float32", FLOAT8, "naive-quantized"),
            Container("mxfp8", FORMATS["fp8_e4m3"], (1, 32), "e8m0", FLOAT8, "mxfp8-quantized"),
            Container("int8", IntFormat(8), (1, None), "float32", INT8, "pack-quantized", free_group=True),
        )
    }
)
"""The containers by name."""

OF_PRESET: Mapping[str, str] = MappingProxyType(
    {name: name for name in ("mxfp8", "mxfp6", "mxfp4", "nvfp4", "fp8_block", "fp8_channel", "fp8_tensor")}
    | {"int4_group": "int4", "int8_channel": "int8"}
)
"""The container that a preset stands for."""


def names(containers: Iterable[Container]) -> str:
    """Their names, for a message."""
    return ", ".join(one.name for one in containers)
