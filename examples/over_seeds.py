"""Means over seeds for the tables of the examples."""

from __future__ import annotations

from collections.abc import Sequence

import gws_compile


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval."""
    found = gws_compile.Interval.of(values)
    if found is None:
        raise ValueError("there are no values")
    return found.mean, found.half
