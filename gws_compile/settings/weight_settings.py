"""How one weight is sampled: `WeightSettings`, made and checked from what a user has given."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..numerics.blocks import Block, block_counts, check_block
from ..numerics.elements import ElementFormat
from ..numerics.formats import FloatFormat
from ..numerics.integers import IntFormat
from ..numerics.noise import NOISES, Noise
from ..numerics.nvfp4 import ELEMENT as NVFP4_ELEMENT
from ..numerics.presets import PRESETS, read_format
from ..numerics.scales import SCALES, Scale
from ..numerics.spec import SampleSpec
from .learned_bits import LearnedBits, check_bits
from .levels import Levels
from .sparsity import Sparsity, SparsityLike, as_sparsity

DEFAULT_FORMAT = "fp8_e4m3"
DEFAULT_BLOCK = (32, 32)

ScaleSetting = Scale | Literal["auto"]
"""A rule of the block scale, or ``"auto"``: the preset's, ``"amax"`` for integers, ``"floor"`` for other formats."""


@dataclass(frozen=True)
class GivenSettings:
    """What a user has given of a weight's settings; what is left out follows from the format.

    Attributes:
        fmt: a name, a format, or `Levels`; None for the default.
        noise: law of R; None for the format's own: that of the method, or none with `Levels`.
        bits: a number, `LearnedBits`, or None for the format's own width.
        block: None for the preset's, or 32 x 32.
        scale: `ScaleSetting`.
        sparsity: ``"N:M"``, `PrunedGroups`, or None.
    """

    fmt: str | ElementFormat | Levels | None
    noise: Noise | None
    bits: float | LearnedBits | None
    block: Block | None
    scale: ScaleSetting
    sparsity: SparsityLike = None


@dataclass(frozen=True)
class WeightSettings:
    """How a weight is sampled.

    Attributes:
        fmt: element format of the cast; with learned widths, that of training; with levels float32, which they are
            stored in.
        noise: law of R.
        bits: bit width b of the noise; with learned widths, or where a schedule moves it, the width that the format
            stands for, which has no meaning.
        learned: the learned widths; None for a fixed one.
        scheduled: a schedule moves the width.
        block: rows and columns that share a maximum and a scale.
        scale: rule of the block scale.
        preset: the name that stood for format, block and scale; empty where none did.
        levels: the table of levels that are trained, in place of a format; None for a format.
        sparsity: which elements are zero; None for a dense weight.
    """

    fmt: ElementFormat
    noise: Noise
    bits: float
    learned: LearnedBits | None
    scheduled: bool
    block: Block
    scale: Scale
    preset: str = ""
    levels: Levels | None = None
    sparsity: Sparsity | None = None

    @staticmethod
    def make(given: GivenSettings, *, scheduled: bool = False) -> WeightSettings:
        """Check what was given, and fill in the rest.

        Args:
            given: what was given.
            scheduled: a schedule moves the width.

        Raises:
            ValueError: a bad value, or values that contradict one another; the message names them.
        """
        if given.noise is not None:
            check_choice("noise", given.noise, NOISES)
        if isinstance(given.fmt, Levels):
            return _of_levels(given, given.fmt)
        noise: Noise = "rounded_normal" if given.noise is None else given.noise
        learned = given.bits if isinstance(given.bits, LearnedBits) else None
        text = given.fmt
        if text is None:
            text = DEFAULT_FORMAT if learned is None else learned.widest
        fmt, preset = read_format(text)
        check_choice("scale", given.scale, (*SCALES, "auto"))
        scale: Any = given.scale
        if scale == "auto":
            scale = preset.scale if preset is not None else "amax" if isinstance(fmt, IntFormat) else "floor"
        block: Any = given.block
        if block is None:
            block = DEFAULT_BLOCK if preset is None else preset.block
        block = check_block(block)
        if preset is not None:
            preset.check(block, scale)
        _check_scale(scale, fmt)
        if learned is not None:
            _check_learned(learned, fmt, noise, scale)
        bits = fmt.noise_bits if given.bits is None or isinstance(given.bits, LearnedBits) else given.bits
        bits = check_bits("bits", bits)
        check_bits_of(fmt, "bits", bits)
        return WeightSettings(
            fmt=fmt,
            noise=noise,
            bits=bits,
            learned=learned,
            scheduled=scheduled and learned is None,
            block=block,
            scale=scale,
            preset="" if preset is None else preset.name,
            sparsity=as_sparsity(given.sparsity),
        )

    @property
    def name(self) -> str:
        """The preset, or the element format, as reports call it."""
        return self.preset or (self.fmt.name if self.levels is None else self.levels.name)

    @property
    def spec(self) -> str:
        """The element format, or the table of levels, as a saved state names it."""
        return self.fmt.spec if self.levels is None else self.levels.spec

    @property
    def trains_otherwise(self) -> bool:
        """Whether a weight that is trained enters its graph in another way than a frozen one: with noise, or levels."""
        return self.noise != "none" or self.levels is not None

    @property
    def block_text(self) -> str:
        """``"32 x 32"``; ``"row"`` and ``"all"`` for sides as long as the matrix."""
        rows, cols = self.block
        if cols is None:
            return {None: "matrix", 1: "row"}.get(rows, f"{rows} x all")
        return f"{rows or 'all'} x {cols}"

    @property
    def grid_text(self) -> str:
        """Format, block, scale and sparsity, as a saved state names them; of a dense weight the first three."""
        rows, cols = self.block
        sparse = "" if self.sparsity is None else f" {self.sparsity}"
        return f"{self.spec} {rows or 'all'}x{cols or 'all'} {self.scale or 'none'}{sparse}"

    def stored_bytes(self, matrices: int, rows: int, cols: int) -> int:
        """Bytes of the cast weight with its scales, as a file has them: a preset's file may repeat a block's scale.

        Without a preset that says it, a power-of-two scale takes a byte (e8m0) and any other 4 bytes (float32). NVFP4
        has 4 bytes more for each matrix, a table of levels as many for each level. Without meaning for learned widths.

        Args:
            matrices, rows, cols: see `gws_compile.numerics.blocks.matrix_shape`.
        """
        if self.levels is not None:
            codes = -(-matrices * rows * cols * self.levels.storage_bits // 8)
            blocks = 0 if self.scale is None else matrices * math.prod(block_counts(self.block, rows, cols))
            return codes + 4 * blocks + 4 * len(self.levels.table)
        elements = -(-matrices * rows * cols * self.fmt.storage_bits // 8)
        if self.scale is None or not self.fmt.scaled:
            return elements
        preset = PRESETS.get(self.preset)
        group, scale_bytes = self.block, 4 if self.scale == "amax" else 1
        if preset is not None:
            group, scale_bytes = preset.stored_group(self.block), preset.scale_bits // 8
        scales = matrices * math.prod(block_counts(group, rows, cols))
        return elements + scales * scale_bytes + (4 * matrices if self.scale == "nvfp4" else 0)

    def sample_spec(self, dtype: torch.dtype) -> SampleSpec:
        """How a weight of this dtype is sampled in training.

        Raises:
            ValueError: it is cast to levels.
        """
        if self.levels is not None:
            raise ValueError("fmt=Levels(...) is no format: its levels are trained, and differ from weight to weight")
        rule = None if self.learned is None else self.learned.rule
        bits = None if self.scheduled or self.learned is not None else self.bits
        return SampleSpec(self.fmt, self.noise, bits, self.scale, rule, dtype)


def _of_levels(given: GivenSettings, levels: Levels) -> WeightSettings:
    """The settings of weights that are cast to levels.

    Raises:
        ValueError: a setting that has no meaning with them.
    """
    if given.noise not in (None, "none"):
        raise ValueError(
            "fmt=Levels(...) trains its levels by their gradients, without noise: noise must be 'none' or left out, "
            f"got {given.noise!r}"
        )
    if given.bits is not None:
        raise ValueError(
            f"fmt=Levels(...) has no noise, and so no bit width: bits must be left out, got {given.bits!r}"
        )
    if given.sparsity is not None:
        raise ValueError(
            f"with fmt=Levels(...) weights are dense: sparsity must be None, got {str(given.sparsity)!r}; a rule for "
            'their weights can say {"fmt": Levels(...), "sparsity": None}'
        )
    scale: Any = "amax" if given.scale == "auto" else given.scale
    check_choice("scale", scale, (*SCALES, "auto"))
    if scale not in ("amax", None):
        raise ValueError(f"with fmt=Levels(...) scale must be 'amax', 'auto' or None, got {scale!r}")
    return WeightSettings(
        fmt=FloatFormat.make(8, 23),
        noise="none",
        bits=float(levels.storage_bits),
        learned=None,
        scheduled=False,
        block=check_block(DEFAULT_BLOCK if given.block is None else given.block),
        scale=scale,
        levels=levels,
    )


def check_bits_of(fmt: ElementFormat, name: str, bits: float) -> None:
    """Hold a bit width to an integer format, whose noise would not reach another level.

    Raises:
        ValueError: it is above the format's bits.
    """
    if isinstance(fmt, IntFormat) and bits > fmt.bits:
        raise ValueError(
            f"with {fmt.name} {name} must be from 2 to {fmt.bits}, got {bits:g}: less noise reaches no other level"
        )


def _check_scale(scale: Scale, fmt: ElementFormat) -> None:
    if scale == "nvfp4" and fmt != NVFP4_ELEMENT:
        raise ValueError(f"scale='nvfp4' is that of {NVFP4_ELEMENT.name} elements, got fmt={fmt.name!r}")
    if scale is None and isinstance(fmt, IntFormat):
        raise ValueError(f"{fmt.name} needs a block scale: scale must be 'amax', 'floor' or 'ceil', got None")


def _check_learned(learned: LearnedBits, fmt: ElementFormat, noise: Noise, scale: Scale) -> None:
    if noise == "none":
        raise ValueError("bits=LearnedBits(...) learns from the noise: noise must not be 'none'")
    if fmt.mantissa_bits > 22:
        raise ValueError(f"with bits=LearnedBits(...) fmt has at most 22 mantissa bits, got {fmt.name}")
    if scale == "nvfp4":
        raise ValueError("scale='nvfp4' is of one format: with bits=LearnedBits(...) use 'floor', 'ceil' or 'amax'")
    integers = [one.name for one in learned.rule.formats if isinstance(one, IntFormat)]
    if scale is None and integers:
        raise ValueError(f"LearnedBits.formats has {', '.join(integers)}, which needs a block scale, got scale=None")
    check_bits_of(fmt, "LearnedBits.max", learned.max)


def check_choice(name: str, value: object, accepted: Iterable[object]) -> None:
    """Hold a setting to the values that are accepted.

    Raises:
        ValueError: it is none of them.
    """
    choices = tuple(accepted)
    if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
