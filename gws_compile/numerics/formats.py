"""Floating-point element formats: a sign, E exponent bits, M mantissa bits."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import lru_cache

_SPEC = re.compile(r"(?:fp(?P<width>\d+)_)?e(?P<e>\d+)m(?P<m>\d+)(?:b(?P<bias>-?\d+))?(?:x(?P<max>[\d.e+-]+))?")
_ALIASES = {"bf16": "e8m7", "bfloat16": "e8m7"}

# The two OCP formats that spend codes on NaN or Inf; every other ExMy uses all of them for numbers.
# (OCP 8-bit Floating Point Specification, OFP8, revision 1.0, table 1.)
_OCP_MAX = {(4, 3): 448.0, (5, 2): 57344.0}


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point element format.

    The values are ``+-2**(e - bias) * (1 + f / 2**M)`` for exponent codes ``e > 0`` and
    ``+-2**(1 - bias) * f / 2**M`` for ``e == 0`` (subnormals), up to ``+-max``. Build one with `parse` or `make`,
    which fill in the standard bias and maximum.

    Attributes:
        exponent_bits: 1 to 8.
        mantissa_bits: explicit mantissa bits, 1 to 23.
        bias: exponent bias.
        max: largest finite value.
        name: what the format is called in reports; two formats of the same values compare equal whatever their names.

    Raises:
        ValueError: a width out of range, or a bias or maximum that the widths do not allow.

    Source: OCP Microscaling Formats (MX) Specification v1.0, section 5.3; OFP8 revision 1.0.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    name: str = field(compare=False)

    def __post_init__(self) -> None:
        _check_widths(self.exponent_bits, self.mantissa_bits)
        if not isinstance(self.bias, int):
            raise ValueError(f"an exponent bias is an int, got {self.bias!r}")
        if self.exponent_bits == 8:
            if self.bias != 127:
                raise ValueError(f"a format with 8 exponent bits is held in float32 and has bias 127, got {self.bias}")
        elif not (self.emin - self.mantissa_bits >= -85 and self.emax <= 64):
            # The cast works on w / X in float32: the whole grid has to lie well inside float32's range.
            raise ValueError(
                f"bias {self.bias} puts the values of {self.name} outside 2**-85 .. 2**65, which is what is accepted"
            )
        largest = _largest(self.exponent_bits, self.mantissa_bits, self.bias)
        if not self.min_normal <= self.max <= largest or math.fmod(self.max, 2.0 ** (self.emax - self.mantissa_bits)):
            raise ValueError(
                f"max {self.max!r} is not a normal value of e{self.exponent_bits}m{self.mantissa_bits} with bias "
                f"{self.bias}; the largest is {largest!r}"
            )

    @staticmethod
    def make(
        exponent_bits: int,
        mantissa_bits: int,
        *,
        bias: int | None = None,
        max: float | None = None,
        name: str | None = None,
    ) -> FloatFormat:
        """Build a format, with the standard ``bias`` (``2**(E-1) - 1``) and ``max`` where they are left out.

        The standard maximum is 448 for e4m3 and 57344 for e5m2 (OFP8), the largest code for every other format, and
        with 8 exponent bits the largest code below the reserved top exponent, as in bfloat16.

        Raises:
            ValueError: see `FloatFormat`.
        """
        _check_widths(exponent_bits, mantissa_bits)
        bias = 2 ** (exponent_bits - 1) - 1 if bias is None else bias
        maximum = _standard_max(exponent_bits, mantissa_bits, bias) if max is None else float(max)
        spec = _spec(exponent_bits, mantissa_bits, bias, maximum)
        name = name or f"fp{1 + exponent_bits + mantissa_bits}_{spec}"
        return FloatFormat(exponent_bits, mantissa_bits, bias, maximum, name)

    @staticmethod
    def parse(text: str | FloatFormat) -> FloatFormat:
        """Read a format from its name.

        Args:
            text: a name in `FORMATS` (``"fp8_e4m3"``), ``"bf16"``, or any ``"eXmY"`` with 1 to 8 exponent and 1 to 23
                mantissa bits; an ``fpN_`` may stand in front (N is then 1 + X + Y), and ``bB`` (bias) and ``xMAX``
                (largest value) behind: ``"e4m3b8x240"``. A `FloatFormat` is returned as it is.

        Raises:
            ValueError: anything else; the message says what is accepted.
        """
        if isinstance(text, FloatFormat):
            return text
        if not isinstance(text, str):
            raise ValueError(f"unknown format {text!r}; {_accepted()}")
        return _parse(text)

    @property
    def emax(self) -> int:
        """Exponent of the largest value."""
        return math.frexp(self.max)[1] - 1

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal value."""
        return 1 - self.bias

    @property
    def min_normal(self) -> float:
        """Smallest positive normal value, ``2**emin``."""
        return 2.0**self.emin

    @property
    def min_subnormal(self) -> float:
        """Smallest positive value, ``2**(emin - M)``."""
        return 2.0 ** (self.emin - self.mantissa_bits)

    @property
    def noise_bits(self) -> float:
        """The bit width ``b = M + 2`` that the format stands for, from the half-ulp rule ``M >= b - 2``; at most 24."""
        return float(min(self.mantissa_bits + 2, 24))

    @property
    def storage_bits(self) -> int:
        """Bits of one stored element, its sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def scaled(self) -> bool:
        """Whether a block scale can matter: with 8 exponent bits an element already spans float32's range."""
        return self.exponent_bits < 8

    @property
    def spec(self) -> str:
        """The shortest text that `parse` reads back into an equal format: ``"e4m3"``, ``"e4m3b8x240"``."""
        return _spec(self.exponent_bits, self.mantissa_bits, self.bias, self.max)

    def __str__(self) -> str:
        return self.name


def _check_widths(exponent_bits: int, mantissa_bits: int) -> None:
    for label, value, limit in (("exponent", exponent_bits, 8), ("mantissa", mantissa_bits, 23)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise ValueError(f"a float format has 1 to {limit} {label} bits, got {value!r}; e.g. 'e3m2' has 3 and 2")


def _largest(exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    top = 2**exponent_bits - (2 if exponent_bits == 8 else 1)
    return math.ldexp(2 - 2.0**-mantissa_bits, top - bias)


def _standard_max(exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    if bias == 2 ** (exponent_bits - 1) - 1 and (exponent_bits, mantissa_bits) in _OCP_MAX:
        return _OCP_MAX[exponent_bits, mantissa_bits]
    return _largest(exponent_bits, mantissa_bits, bias)


def _spec(exponent_bits: int, mantissa_bits: int, bias: int, maximum: float) -> str:
    text = f"e{exponent_bits}m{mantissa_bits}"
    if bias != 2 ** (exponent_bits - 1) - 1:
        text += f"b{bias}"
    if maximum != _standard_max(exponent_bits, mantissa_bits, bias):
        text += f"x{maximum:.17g}"
    return text


def _accepted() -> str:
    return (
        f"accepted: {', '.join(FORMATS)}, or any 'eXmY' with 1 to 8 exponent and 1 to 23 mantissa bits, such as 'e5m6'"
    )


@lru_cache(maxsize=256)
def _parse(text: str) -> FloatFormat:
    match = _SPEC.fullmatch(_ALIASES.get(text, text))
    if match is None:
        raise ValueError(f"unknown format {text!r}; {_accepted()}")
    e, m = int(match["e"]), int(match["m"])
    if match["width"] is not None and int(match["width"]) != 1 + e + m:
        raise ValueError(f"format {text!r} says {match['width']} bits, but e{e}m{m} has 1 + {e} + {m} = {1 + e + m}")
    try:
        maximum = None if match["max"] is None else float(match["max"])
        bias = None if match["bias"] is None else int(match["bias"])
        return FloatFormat.make(e, m, bias=bias, max=maximum, name="bf16" if (e, m) == (8, 7) else None)
    except ValueError as error:
        raise ValueError(f"unknown format {text!r}: {error}; {_accepted()}") from None


FORMATS: dict[str, FloatFormat] = {
    fmt.name: fmt
    for fmt in (
        FloatFormat.make(2, 1),
        FloatFormat.make(2, 3),
        FloatFormat.make(3, 2),
        FloatFormat.make(4, 3),
        FloatFormat.make(5, 2),
        FloatFormat.make(4, 7),
        FloatFormat.make(8, 7, name="bf16"),
    )
}
"""The named formats: fp4_e2m1, fp6_e2m3, fp6_e3m2, fp8_e4m3, fp8_e5m2, fp12_e4m7, bf16."""
