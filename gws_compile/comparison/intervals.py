"""Means over seeds with 95 % intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Quantile 0.975 of Student's t for 1, 2, ... degrees of freedom.
_T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
_NORMAL_975 = 1.95996


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval.

    Attributes:
        mean: over the values.
        half: half of the interval's width, Student's t; NaN for a single value, which has none.
        count: how many values.
    """

    mean: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval | None:
        """The interval of some values; None where there are none."""
        if not values:
            return None
        mean, count = statistics.fmean(values), len(values)
        if count < 2:
            return cls(mean, math.nan, count)
        return cls(mean, t_975(count - 1) * statistics.stdev(values) / math.sqrt(count), count)

    @property
    def is_clear(self) -> bool:
        """Whether zero lies outside."""
        return abs(self.mean) > self.half

    def text(self, digits: int = 4, *, sign: bool = False) -> str:
        """``"2.6651 ± 0.0540"``; of a single value that alone."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if math.isnan(self.half) else f"{mean} ± {self.half:.{digits}f}"


def t_975(freedom: int) -> float:
    """Quantile 0.975 of Student's t, to 4 digits.

    Beyond the table by the first terms of its expansion in 1 / ``freedom`` (Abramowitz and Stegun, 26.7.5).
    """
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    z = _NORMAL_975
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
