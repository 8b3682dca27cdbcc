"""Presets: one word for an element format with its block and its scale, as checkpoints and hardware have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .blocks import Block
from .elements import ElementFormat, parse_element
from .formats import FORMATS
from .integers import IntFormat
from .scales import POWERS_OF_TWO, Scale


@dataclass(frozen=True)
class Preset:
    """An element format with the block and scale that make it a format of the field.

    Attributes:
        name: the word for it.
        element: format of an element.
        block: rows and columns that share a scale, in training.
        scale: rule of the block scale.
        group: rows and columns that share a scale in a file, or in hardware; None for all. Where it is a part of
            ``block``, blocks that hold whole groups have the same scale in each.
        scales: the rules that leave the preset what it is.
        scale_bits: of a stored scale.
    """

    name: str
    element: ElementFormat
    block: Block
    scale: Scale
    group: Block
    scales: tuple[Scale, ...]
    scale_bits: int

    def check(self, block: Block, scale: Scale) -> None:
        """Hold an explicit block and scale to the name.

        Raises:
            ValueError: with them it would be another format.
        """
        if scale not in self.scales:
            raise ValueError(
                f"scale={scale!r} contradicts fmt={self.name!r}, whose scale is {' or '.join(map(repr, self.scales))}: "
                f"write fmt={self.element.name!r} with this scale"
            )
        if not self._fits(block):
            raise ValueError(
                f"block={block!r} contradicts fmt={self.name!r}, of which {self._group} a scale: "
                f"write fmt={self.element.name!r} with this block and scale={scale!r}"
            )

    def stored_group(self, block: Block) -> Block:
        """Rows and columns that share a stored scale, of a weight that is trained in these blocks."""
        return block if self.group == self.block else self.group

    def _fits(self, block: Block) -> bool:
        if None in self.group or self.name == "fp8_block":
            return block == self.group
        if self.name == "int4_group":  # groups of any length, in a row
            return block[0] == 1 and block[1] is not None
        return all(side is None or side % (size or 1) == 0 for side, size in zip(block, self.group, strict=True))

    @property
    def _group(self) -> str:
        if self.name == "int4_group":
            return "a part of a row, (1, n), has"
        rows, cols = self.group
        if rows is None:
            return "the whole matrix, (None, None), has"
        if cols is None:
            return "each row, (1, None), has"
        return f"each {rows} x {cols} elements have"


_ANY: tuple[Scale, ...] = ("amax", *POWERS_OF_TWO)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        one.name: one
        for one in (
            Preset("mxfp8", FORMATS["fp8_e4m3"], (32, 32), "floor", (1, 32), POWERS_OF_TWO, 8),
            Preset("mxfp6", FORMATS["fp6_e2m3"], (32, 32), "floor", (1, 32), POWERS_OF_TWO, 8),
            Preset("mxfp4", FORMATS["fp4_e2m1"], (32, 32), "floor", (1, 32), POWERS_OF_TWO, 8),
            Preset("nvfp4", FORMATS["fp4_e2m1"], (16, 16), "nvfp4", (1, 16), ("nvfp4",), 8),
            Preset("fp8_block", FORMATS["fp8_e4m3"], (128, 128), "amax", (128, 128), _ANY, 32),
            Preset("fp8_channel", FORMATS["fp8_e4m3"], (1, None), "amax", (1, None), _ANY, 32),
            Preset("fp8_tensor", FORMATS["fp8_e4m3"], (None, None), "amax", (None, None), _ANY, 32),
            Preset("int4_group", IntFormat(4), (1, 128), "amax", (1, 128), _ANY, 32),
            Preset("int8_channel", IntFormat(8), (1, None), "amax", (1, None), _ANY, 32),
        )
    }
)
"""The presets by name."""


def read_format(fmt: str | ElementFormat) -> tuple[ElementFormat, Preset | None]:
    """The element format that ``fmt`` stands for, and the preset, if it is the name of one.

    Raises:
        ValueError: it is neither; the message says what is accepted.
    """
    preset = PRESETS.get(fmt) if isinstance(fmt, str) else None
    if preset is not None:
        return preset.element, preset
    try:
        return parse_element(fmt), None
    except ValueError as error:
        raise ValueError(f"{error}; or 'int2' to 'int8'; or a preset: {', '.join(PRESETS)}") from None
