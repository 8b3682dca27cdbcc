"""A format that is given as a table of levels, which are trained: `Levels`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

from ..numerics.float32 import nearest_float32

FEWEST, MOST = 2, 256
SMALLEST, LARGEST = 2.0**-32, 2.0**32
"""What the largest magnitude of a table lies within, so that scales and their reciprocals are normal float32 values."""


@dataclass(frozen=True)
class Levels:
    """A format given by the values that its elements can have, and these values are trained (arXiv 1802.05668).

    The values of a quantizer are its levels, since Lloyd and Max; the paper calls them quantization points, files of
    weights a codebook. With a scale s for each block, the levels p and the level q(x) nearest to x, weights become

        w_hat = s * p[q(w / s)]    dL/dw = dL/dw_hat    dL/dp_j = sum over the elements with q = j of s * dL/dw_hat

    which is section 4 of Polino, Pascanu, Alistarh, "Model compression via distillation and quantization". Each weight
    has levels of its own, which begin as ``table`` and are what an optimizer moves: give it `Backend.parameters`. There
    is no noise.

    The scale ``"amax"`` maps a block's largest magnitude to the largest of ``table``: ``s = max|w| / max|table|``. It
    stays so while the levels move, and is a constant to autograd. With ``scale=None`` s is 1.

    Args:
        table: 2 to 256 different numbers in ascending order, as float32 values.

    Raises:
        ValueError: a bad table; the message says what is wrong with it.
    """

    table: tuple[float, ...]

    def __post_init__(self) -> None:
        if isinstance(self.table, (str, bytes)) or not isinstance(self.table, Iterable):
            raise ValueError(f"Levels takes a table of numbers, such as (-1, 0, 1), got {self.table!r}")
        table = tuple(self.table)
        if not FEWEST <= len(table) <= MOST:
            raise ValueError(f"Levels takes {FEWEST} to {MOST} numbers, got {len(table)}")
        for place, level in enumerate(table):
            if isinstance(level, bool) or not isinstance(level, (int, float)) or not math.isfinite(level):
                raise ValueError(f"Levels takes finite numbers, got {level!r} at place {place}")
        if max(map(abs, table)) > LARGEST or max(map(abs, table)) < SMALLEST:
            raise ValueError(
                f"the largest magnitude of Levels must lie within 2**-32 and 2**32, got {max(map(abs, table)):g}"
            )
        table = tuple(nearest_float32(float(level)) for level in table)
        for place, (below, above) in enumerate(pairwise(table), 1):
            if not below < above:
                raise ValueError(
                    f"Levels must ascend, and be different as float32 values, got {above:.9g} at place {place}, behind "
                    f"{below:.9g}"
                )
        object.__setattr__(self, "table", table)

    @staticmethod
    def uniform(bits: int) -> Levels:
        """``2**bits`` levels, evenly spaced from -1 to 1.

        Args:
            bits: 1 to 8.

        Raises:
            ValueError: another number.
        """
        count = 2 ** _bits("uniform", bits, 1)
        return Levels(tuple(2 * place / (count - 1) - 1 for place in range(count)))

    @staticmethod
    def normal(bits: int) -> Levels:
        """``2**bits`` quantiles of N(0, 1) over their largest, with an exact 0: for 4 bits those of NF4.

        Dettmers, Pagnoni, Holtzman, Zettlemoyer, "QLoRA" (arXiv 2305.14314), appendix E, of any number of bits: half of
        the levels are positive, and one less than half negative.

        Args:
            bits: 2 to 8.

        Raises:
            ValueError: another number.
        """
        half = 2 ** _bits("normal", bits, 2) // 2
        # Between half a step below 1 of the quantiles of one sign, and of those of the other.
        outermost = 1 - (1 / (2 * half) + 1 / (2 * half - 1)) / 4
        positive, negative = _quantiles(outermost, half), _quantiles(outermost, half - 1)
        return Levels((*(-level for level in reversed(negative)), 0.0, *positive))

    @property
    def name(self) -> str:
        """``"levels16"``, by the number of levels, as reports call it."""
        return f"levels{len(self.table)}"

    @property
    def spec(self) -> str:
        """The table as text, as a saved state names it."""
        return f"levels({', '.join(f'{level:.9g}' for level in self.table)})"

    @property
    def storage_bits(self) -> int:
        """Bits of the number of a level."""
        return (len(self.table) - 1).bit_length()

    @property
    def largest(self) -> float:
        """The largest magnitude of the table."""
        return max(map(abs, self.table))

    def __str__(self) -> str:
        return self.name


def _bits(function: str, bits: object, fewest: int) -> int:
    if not isinstance(bits, int) or isinstance(bits, bool) or not fewest <= bits <= 8:
        raise ValueError(f"Levels.{function} takes {fewest} to 8 bits, got {bits!r}")
    return bits


def _quantiles(outermost: float, count: int) -> list[float]:
    """So many quantiles of N(0, 1), evenly spaced in probability from above 1/2 to ``outermost``, over the largest."""
    step = (outermost - 0.5) / count
    found = [NormalDist().inv_cdf(0.5 + place * step) for place in range(1, count + 1)]
    return [level / found[-1] for level in found]
