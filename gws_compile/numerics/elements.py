"""Element formats, floating-point or integer: what one element of a block is stored in."""

from __future__ import annotations

from .formats import FloatFormat
from .integers import IntFormat

ElementFormat = FloatFormat | IntFormat
"""What a weight's elements are cast to; both kinds have the attributes that the cast and the scales ask for."""


def parse_element(text: str | ElementFormat) -> ElementFormat:
    """Read an element format.

    Args:
        text: ``"int2"`` to ``"int8"``, or whatever `FloatFormat.parse` reads; a format is returned as it is.

    Raises:
        ValueError: anything else; the message says what is accepted.
    """
    if isinstance(text, IntFormat):
        return text
    if isinstance(text, str) and IntFormat.reads(text):
        return IntFormat.parse(text)
    return FloatFormat.parse(text)
