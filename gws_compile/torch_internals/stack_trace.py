"""Where in the user's code a graph's node comes from."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

_FRAME = re.compile(r'^  File "([^"]+)", line (\d+), in (.+)\n(?:    (.*))?', re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """A place in the code.

    Attributes:
        stack: the callers, outermost first, as ``file:line in function``; the last is the place itself.
        code: its line.
    """

    stack: tuple[str, ...] = ()
    code: str = ""

    @property
    def location(self) -> str:
        """``file:line in function``; empty where unknown."""
        return self.stack[-1] if self.stack else ""

    @property
    def place(self) -> str:
        """``file:line``; empty where unknown."""
        return self.location.rpartition(" in ")[0]


def source_of(node: fx.Node) -> Source:
    """Where Dynamo met a node; torch's own frames are not in the stack that it records.

    Relies on ``meta["stack_trace"]``, a text as the `traceback` module writes it. Checked on torch 2.11 to 2.15.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    stack = tuple(f"{file}:{line} in {function}" for file, line, function, _ in frames)
    return Source(stack, frames[-1][3].strip() if frames else "")


def without_wrappers(stack: Sequence[str]) -> Sequence[str]:
    """The callers that are no decorators' wrappers; all of them where there are no others."""
    return [line for line in stack if not line.endswith(" in wrapper")] or stack


def location_of(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost frame of a stack as ``file:line in function``; empty where there is none."""
    return f"{stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name}" if stack else ""
