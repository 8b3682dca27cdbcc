"""What a message says of a name that is none."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, accepted: Iterable[str]) -> str:
    """The hint of a message: the accepted name that is nearest to a wrong one, or all of them."""
    accepted = list(accepted)
    close = get_close_matches(name, accepted, n=1)
    return f"did you mean {close[0]!r}?" if close else f"accepted: {', '.join(accepted)}"
