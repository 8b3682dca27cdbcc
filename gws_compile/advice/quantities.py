"""Numbers of parameters, tokens and operations as text, and blocks."""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal

Block = int | Literal["channel"]
"""Elements that share a scale, along one dimension; ``"channel"`` for a whole row or column of the matrix."""

_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def positive(name: str, value: Any) -> float:
    """Check a number of something.

    Raises:
        ValueError: it is not a finite number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name} is {value!r}; accepted: a finite number above 0, such as 1e9")
    return float(value)


def parse_quantity(name: str, text: str) -> float:
    """Read a number with or without a unit: ``"1e9"``, ``"1.3B"``, ``"100T"``.

    Raises:
        ValueError: it is none.
    """
    unit = text.strip()[-1:].upper()
    number = text.strip()[:-1] if unit in _UNITS else text
    try:
        return positive(name, float(number) * _UNITS.get(unit, 1.0))
    except ValueError:
        raise ValueError(
            f"{name} is {text!r}; accepted: a number above 0, such as 1e9, or with a unit, such as 350M, 1.3B or 15T"
        ) from None


def quantity(value: float) -> str:
    """A number with its unit, in three digits: ``"1.3B"``, ``"1,730T"``, and as it is below 10,000."""
    if value < 1e4:
        return f"{value:,.6g}"
    value = float(f"{value:.3g}")
    if value >= 1e16:
        return f"{value:.3g}"
    unit = max((unit for unit in _UNITS if _UNITS[unit] <= value), key=_UNITS.__getitem__)
    scaled = float(f"{value / _UNITS[unit]:.3g}")
    return f"{scaled:,.0f}{unit}" if scaled >= 1000 else f"{scaled:.3g}{unit}"


def check_block(block: Any) -> Block:
    """Check a block.

    Raises:
        ValueError: it is neither a whole number from 2 on nor ``"channel"``.
    """
    if block == "channel":
        return "channel"
    if block == "tensor":
        raise ValueError(
            "block is 'tensor', for which no log2(B) is known here; accepted: a whole number from 2 on, or 'channel'"
        )
    if isinstance(block, bool) or not isinstance(block, int) or block < 2:
        raise ValueError(
            f"block is {block!r}; accepted: a whole number from 2 on, the elements that share a scale along one "
            "dimension, or 'channel'"
        )
    return block
