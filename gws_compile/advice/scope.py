"""Where a law was fitted, and how far from there it is asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..numerics.formats import FloatFormat
from .quantities import Block, quantity

_NEAR = 1.05  # the ends of a range are given in round numbers

Range = tuple[float, float]


@dataclass(frozen=True)
class Scope:
    """What the runs were that a law is fitted to.

    Attributes:
        text: what was trained and what was rounded, as a sentence to print beside every figure.
        params: fewest and most parameters.
        tokens: fewest and most tokens.
        exponent_bits: fewest and most; None without quantized runs.
        mantissa_bits: likewise.
        block: smallest and largest block that is a number; None where there is none.
        channel: whether some had a scale a channel.
    """

    text: str
    params: Range
    tokens: Range
    exponent_bits: Range | None
    mantissa_bits: Range | None
    block: Range | None
    channel: bool

    def beyond(
        self, params: Iterable[float], tokens: Iterable[float], formats: Iterable[FloatFormat], block: Block
    ) -> tuple[str, ...]:
        """What lies outside, and by which factor; a value within 5 % of an end lies inside.

        Args:
            params: numbers of parameters that are asked for; of several the farthest is told.
            tokens: likewise.
            formats: the formats.
            block: elements to a scale.

        Returns:
            A text for each thing that is extrapolated.
        """
        found = [_farthest("params", params, self.params), _farthest("tokens", tokens, self.tokens)]
        if block == "channel":
            found.append(None if self.channel else "block channel: no run of the fit had a scale a channel")
        else:
            found.append(_farthest("block", [block], self.block))
        for fmt in formats:
            sides = [
                _farthest("exponent bits", [fmt.exponent_bits], self.exponent_bits),
                _farthest("mantissa bits", [fmt.mantissa_bits], self.mantissa_bits),
            ]
            told = [side for side in sides if side]
            found.append(f"{fmt.name}, {'; '.join(told)}" if told else None)
        return tuple(text for text in found if text)


def _farthest(name: str, values: Iterable[float], known: Range | None) -> str | None:
    if known is None:
        return next((f"{name} {quantity(value)}: the fit has none" for value in values), None)
    low, high = known
    above = max(((value / high, value) for value in values), default=(0.0, 0.0))
    below = max(((low / value, value) for value in values), default=(0.0, 0.0))
    if max(above, below)[0] <= _NEAR:
        return None
    if above >= below:
        return f"{name} {quantity(above[1])}: {_times(above[0])} times the most of the fit, {quantity(high)}"
    return f"{name} {quantity(below[1])}: the least of the fit, {quantity(low)}, is {_times(below[0])} times as much"


def _times(factor: float) -> str:
    return f"{factor:.3g}" if factor < 1000 else f"{float(f'{factor:.3g}'):,.0f}"


PAPER = Scope(
    text="Fitted to training in which W is rounded in forward, W in backward and x in wgrad, to nearest, with "
    "high-precision scales along one dimension; 41 to 679 M parameters without embeddings, 10 to 100 B tokens "
    "(arXiv 2501.02423). It is a law neither of weight-only quantization nor of 32 x 32 blocks with power-of-two "
    "scales.",
    params=(40_894_464, 679_477_248),
    tokens=(10_485_760_000, 104_857_600_000),
    exponent_bits=(1, 6),
    mantissa_bits=(1, 6),
    block=(32, 512),
    channel=True,
)
"""The published fit; the ranges are those of the paper's table of runs."""
