"""What changes in the course of training: `Schedule`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..numerics.float32 import float32_bits
from .operands import PRODUCTS, SWITCHES


@dataclass(frozen=True)
class Schedule:
    """From when to when there is noise, how wide it is, and which products are rounded, in draws: optimizer steps.

    The step is that of the clock, so it goes on where a resumed run stood; with ``resample="forward"`` a draw is a
    forward. Nothing is compiled again: the graphs take what the schedule says as a tensor.

    Args:
        start: first draw that has noise; before it weights are cast alone.
        stop: first draw that has none any more; None for never.
        bits: points ``(step, b)``, such as ``((0, 8.0), (1000, 5.0))``: the bit width is linear between two of them,
            and constant before the first and behind the last. It is that of the backend's own format: weights to which
            a rule gives a format or a width keep theirs. With `LearnedBits`, what `Backend.bit_loss` leads to: its
            ``average`` where it has one, else its ``target``. None, (), for widths that do not move.
        forward, dgrad, wgrad, attention: ``(first, last)``, such as ``(0, 9000)``: the operands of these products are
            rounded from draw ``first`` on and up to ``last``, which is the first that is not; None for ever. At other
            draws they are in high precision, weights too, without cast and noise. Evaluation follows ``forward`` and
            ``attention``, as the next training forward does.

    Raises:
        ValueError: a bad value, or steps that do not ascend.
    """

    start: int = 0
    stop: int | None = None
    bits: tuple[tuple[int, float], ...] = ()
    forward: tuple[int, int | None] = (0, None)
    dgrad: tuple[int, int | None] = (0, None)
    wgrad: tuple[int, int | None] = (0, None)
    attention: tuple[int, int | None] = (0, None)

    def __post_init__(self) -> None:
        for product in PRODUCTS:
            object.__setattr__(self, product, _window(product, getattr(self, product)))
        if not _is_step(self.start):
            raise ValueError(f"Schedule.start must be an int, 0 or more, got {self.start!r}")
        if self.stop is not None and not (_is_step(self.stop) and self.stop > self.start):
            raise ValueError(
                f"Schedule.stop must be an int above start={self.start}, or None for never, got {self.stop!r}"
            )
        object.__setattr__(self, "bits", tuple(map(_point, self.bits if _is_list(self.bits) else (self.bits,))))
        for before, after in pairwise(self.bits):
            if before[0] >= after[0]:
                raise ValueError(
                    f"Schedule.bits must have ascending steps, got step {after[0]} behind step {before[0]}"
                )

    def draws(self, step: int) -> bool:
        """Whether there is noise at a step."""
        return self.start <= step and (self.stop is None or step < self.stop)

    def width(self, step: int) -> float | None:
        """The bit width at a step; None where there are no points."""
        if not self.bits:
            return None
        if step <= self.bits[0][0]:
            return self.bits[0][1]
        for (first, low), (last, high) in pairwise(self.bits):
            if step <= last:
                return low + (high - low) * (step - first) / (last - first)
        return self.bits[-1][1]

    def factor_bits(self, step: int) -> int:
        """The bits of the float32 ``2**(1 - b)`` for the clock; 0 where widths do not move."""
        width = self.width(step)
        return 0 if width is None else float32_bits(2.0 ** (1.0 - width))

    def unrounded(self, step: int) -> int:
        """The bits of the products that are in high precision at a step, for the clock."""
        windows = {product: getattr(self, product) for product in PRODUCTS}
        return sum(
            SWITCHES[product]
            for product, (first, last) in windows.items()
            if step < first or (last is not None and step >= last)
        )

    @property
    def moves_products(self) -> bool:
        """Whether products that read weights are in high precision at times."""
        return any(getattr(self, product) != (0, None) for product in PRODUCTS if product != "attention")

    @property
    def draws_from_to(self) -> bool:
        """Whether noise begins or ends."""
        return self.start > 0 or self.stop is not None

    @property
    def changes_nothing(self) -> bool:
        """Whether training with it is what it is without."""
        moves = self.moves_products or self.attention != (0, None)
        return not (self.draws_from_to or self.bits or moves)

    def __str__(self) -> str:
        parts = []
        if self.start:
            parts.append(f"noise from step {self.start}")
        if self.stop is not None:
            parts.append(f"no noise from step {self.stop}")
        if self.bits:
            parts.append("b = " + ", ".join(f"{width:g} at step {step}" for step, width in self.bits))
        for product in PRODUCTS:
            first, last = getattr(self, product)
            if (first, last) != (0, None):
                parts.append(f"{product} rounded from step {first}" + ("" if last is None else f" to {last}"))
        return "; ".join(parts) or "constant"


def _window(name: str, value: Any) -> tuple[int, int | None]:
    if _is_list(value) and len(value) == 2:
        first, last = value
        if _is_step(first) and (last is None or (_is_step(last) and last >= first)):
            return first, last
    raise ValueError(
        f"Schedule.{name} takes (first, last), the step from which the product is rounded and the first at which it is "
        f"not any more, or None, such as (0, 9000), got {value!r}"
    )


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list(value: object) -> bool:
    return isinstance(value, (tuple, list))


def _point(value: Any) -> tuple[int, float]:
    if _is_list(value) and len(value) == 2:
        step, width = value
        number = isinstance(width, (int, float)) and not isinstance(width, bool) and math.isfinite(width)
        if _is_step(step) and number and 2 <= width <= 24:
            return step, float(width)
    raise ValueError(
        "Schedule.bits takes points (step, bit width), a step of 0 or more and a width from 2 to 24, such as "
        f"((0, 8.0), (1000, 5.0)), got {value!r}"
    )
