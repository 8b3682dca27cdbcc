"""The arguments of ``gws::cast_to_levels`` by name, in the order of its schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import fx

LEVELS_VERSION = 2
"""Part of every call's arguments, as compile caches do not see the source: raise it with any change of arithmetic."""


@dataclass(frozen=True)
class LevelsArguments:
    """Those of ``gws::cast_to_levels``, see `gws_compile.levels.operators.cast_to_levels`.

    Tensors are tensors, or nodes of a graph, by where the call is.
    """

    w: Any
    levels: Any
    table: Sequence[float]
    batch_dims: int
    block: Sequence[int]
    scale: str
    out_dtype: torch.dtype | None = None
    keep: bool = True
    version: int = field(default_factory=lambda: LEVELS_VERSION)

    def call(self) -> tuple[Any, ...]:
        """The arguments by position."""
        return tuple(getattr(self, one.name) for one in fields(self))

    @staticmethod
    def of(node: fx.Node) -> LevelsArguments:
        """Those of a graph's node."""
        args: tuple[Any, ...] = node.args
        kwargs: dict[str, Any] = dict(node.kwargs)
        return LevelsArguments(*args, **kwargs)

    def write(self, node: fx.Node, **changes: Any) -> None:
        """Give a graph's node these arguments, with changes."""
        node.args, node.kwargs = replace(self, **changes).call(), {}

    @property
    def largest(self) -> float:
        """The largest magnitude of the table."""
        return max(map(abs, self.table))

    def check_version(self) -> None:
        """Hold a call to the arithmetic that is here.

        Raises:
            RuntimeError: the graph was made for another version.
        """
        if self.version != LEVELS_VERSION:
            raise RuntimeError(
                f"gws_compile's levels are at version {LEVELS_VERSION}, the graph was made for {self.version}"
            )
