"""A recipe: how every operand of a layer's three products is rounded, as one setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .attention import AttentionLike
from .operands import OperandLike
from .rules import KEYS, RuleLike


@dataclass(frozen=True)
class Recipe:
    """What `gws_compile.backend` takes as ``recipe``: the values of other arguments, which win where they are given.

    Attributes:
        weights: ``fmt``, ``noise``, ``bits``, ``block``, ``scale`` and ``sparsity`` of the weights, those that the
            recipe says; or a format alone. Blocks with fewer rows than columns, or more, run along what each product
            sums over, and are rounded anew for dgrad.
        activations, gradients, attention: as the arguments.
        rules: behind those that are given.

    Raises:
        ValueError: ``weights`` has another key.
    """

    weights: str | Mapping[str, Any] | None = None
    activations: OperandLike = None
    gradients: OperandLike = None
    attention: AttentionLike = None
    rules: tuple[RuleLike, ...] = ()

    def __post_init__(self) -> None:
        given = {"fmt": self.weights} if isinstance(self.weights, str) else dict(self.weights or {})
        for key in given:
            if key not in KEYS:
                raise ValueError(f"Recipe.weights: unknown key {key!r}; accepted: {', '.join(KEYS)}")
        object.__setattr__(self, "weights", tuple(given.items()))
        object.__setattr__(self, "rules", tuple(self.rules))

    @property
    def of_weights(self) -> dict[str, Any]:
        """What it says of the weights, by the arguments' names."""
        return dict(self.weights or ())  # type: ignore[arg-type]
