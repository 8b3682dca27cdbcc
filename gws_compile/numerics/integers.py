"""Integer element formats: symmetric signed integers of N bits."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SPEC = re.compile(r"int(\d+)")


@dataclass(frozen=True)
class IntFormat:
    """A symmetric signed integer format: the levels ``-(2**(N-1) - 1) .. 2**(N-1) - 1``, rounded half to even.

    The code ``-2**(N-1)`` is not used, so that the grid is its own mirror image; `int2` is ternary. Beside the float
    formats an ``intN`` is the evenly spaced part of one with ``N - 2`` mantissa bits: what is said of such a format by
    its exponents and mantissa bits (block scales, the bit width of noise) holds of it.

    Attributes:
        bits: N, 2 to 8.

    Raises:
        ValueError: another N.
    """

    bits: int

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 8:
            raise ValueError(f"an integer format has 2 to 8 bits, got {self.bits!r}; e.g. 'int4'")

    @staticmethod
    def reads(text: str) -> bool:
        """Whether a text is the name of an integer format, of whatever width."""
        return _SPEC.fullmatch(text) is not None

    @staticmethod
    def parse(text: str) -> IntFormat:
        """Read ``"intN"``.

        Raises:
            ValueError: N is not 2 to 8.
        """
        match = _SPEC.fullmatch(text)
        assert match is not None
        return IntFormat(int(match[1]))

    @property
    def name(self) -> str:
        """``"intN"``."""
        return f"int{self.bits}"

    @property
    def spec(self) -> str:
        """The same: `parse_element` reads it back into an equal format."""
        return self.name

    @property
    def max(self) -> float:
        """Largest level, ``2**(N-1) - 1``."""
        return float(2 ** (self.bits - 1) - 1)

    @property
    def mantissa_bits(self) -> int:
        """``N - 2``: bits behind the leading one of the largest level."""
        return self.bits - 2

    @property
    def emax(self) -> int:
        """Exponent of the largest level, ``N - 2``."""
        return self.bits - 2

    @property
    def emin(self) -> int:
        """The same: there is one binade of "normal" levels, and the rest lies as close as they do."""
        return self.emax

    @property
    def min_normal(self) -> float:
        """``2**emin``."""
        return 2.0**self.emin

    @property
    def min_subnormal(self) -> float:
        """Smallest positive level, 1."""
        return 1.0

    @property
    def noise_bits(self) -> float:
        """The bit width ``b = N`` that the format stands for.

        With the scale ``"amax"`` neighbouring levels lie ``a / (2**(N-1) - 1)`` apart, ``a`` the block maximum. Noise
        of ``R = 1`` at width b is ``a * 2**(1-b)``; it reaches half of that distance, so that it can move the largest
        weights to another level, where ``2**(1-b) >= 1 / (2**N - 2)``. The largest whole b of which this is so is N.
        For the power-of-two scales, whose levels lie ``2**(floor(log2 a) - (N-2))`` apart, it is N too, as it is
        ``M + 2`` for a float format.
        """
        return float(self.bits)

    @property
    def storage_bits(self) -> int:
        """Bits of one stored element, its sign included: N."""
        return self.bits

    @property
    def scaled(self) -> bool:
        """An integer needs a block scale."""
        return True

    def __str__(self) -> str:
        return self.name
