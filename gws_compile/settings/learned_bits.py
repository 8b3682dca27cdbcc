"""Settings of learned bit widths: `LearnedBits`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..numerics.elements import ElementFormat, parse_element
from ..numerics.widths import WidthRule

Granularity = Literal["block", "weight"]

DEFAULT_FORMATS = ("fp4_e2m1", "fp6_e3m2", "fp8_e4m3", "fp12_e4m7", "bf16")


@dataclass(frozen=True)
class LearnedBits:
    """Bit widths that are trained along with the weights (arXiv 2505.11170, section 3).

    The width of a block (or weight) is ``b = target + b_i * (init - target)``, kept within ``min`` and ``max``; the
    float32 ``b_i``, 1 at the start, is what an optimizer moves: give it `Backend.parameters`.

    Args:
        init: width at the start.
        target: width at ``b_i = 0``: what weight decay on ``b_i``, and `Backend.bit_loss`, pull towards.
        granularity: ``"block"``, a width for each block, or ``"weight"``.
        min: smallest width.
        max: largest width.
        average: the average width, over all elements, that training is to end with. `Backend.bit_loss` is then an
            augmented Lagrangian of this constraint, to be added to the loss as it is.
        formats: what widths stand for in noise-free calls: the first format whose mantissa bits + 2 reach the width, or
            else the last. Ascending in mantissa bits.

    Raises:
        ValueError: a bad value; the message names it and what is accepted.
    """

    init: float = 6.0
    target: float = 4.0
    granularity: Granularity = "block"
    min: float = 2.0
    max: float = 10.0
    average: float | None = None
    formats: tuple[str | ElementFormat, ...] = DEFAULT_FORMATS

    def __post_init__(self) -> None:
        for name in ("min", "max", "init", "target"):
            check_bits(f"LearnedBits.{name}", getattr(self, name))
        if not self.min < self.max:
            raise ValueError(f"LearnedBits.min must be below max, got min={self.min:g}, max={self.max:g}")
        for name in ("init", "target", "average"):
            value = getattr(self, name)
            if value is not None and not (check_bits(f"LearnedBits.{name}", value) and self.min <= value <= self.max):
                raise ValueError(
                    f"LearnedBits.{name} must lie within min={self.min:g} and max={self.max:g}, got {value:g}"
                )
        if self.init == self.target:
            raise ValueError(
                f"LearnedBits.init and target must differ, got {self.init:g} for both: widths move between them as "
                "target + b_i * (init - target)"
            )
        if self.granularity not in ("block", "weight"):
            raise ValueError(f"LearnedBits.granularity must be 'block' or 'weight', got {self.granularity!r}")
        if isinstance(self.formats, str) or not self.formats:
            raise ValueError(f"LearnedBits.formats must be a list of formats, got {self.formats!r}")
        formats = tuple(parse_element(fmt) for fmt in self.formats)
        object.__setattr__(self, "formats", formats)
        mantissas = [fmt.mantissa_bits for fmt in formats]
        if mantissas != sorted(mantissas) or len(set(formats)) != len(formats) or mantissas[-1] > 22:
            raise ValueError(
                "LearnedBits.formats must be different and ascend in mantissa bits, at most 22, got "
                + ", ".join(f"{fmt.name} ({fmt.mantissa_bits})" for fmt in formats)
            )

    @property
    def widest(self) -> ElementFormat:
        """The format of the largest widths."""
        fmt = self.formats[-1]
        assert not isinstance(fmt, str)
        return fmt

    @property
    def rule(self) -> WidthRule:
        """What a width parameter means to the operator."""
        formats = tuple(parse_element(fmt) for fmt in self.formats)
        return WidthRule(float(self.init), float(self.target), float(self.min), float(self.max), formats)


def check_bits(name: str, value: object) -> float:
    """A bit width as a float.

    Raises:
        ValueError: no number from 2 to 24.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 2 <= value <= 24
        or not math.isfinite(value)
    ):
        raise ValueError(f"{name} must be a number from 2 to 24, got {value!r}")
    return float(value)
