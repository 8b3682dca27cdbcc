"""Which elements of a weight are zero: `PrunedGroups`, and N of M."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

Groups = Literal["rows", "columns"]

MOST_OF = 64
"""The largest M of N of M: each element of a group is compared with all others of it."""


@dataclass(frozen=True)
class KeptElements:
    """N of M consecutive elements are kept, along the side of a weight that its product sums over.

    Attributes:
        kept, of: N and M.
    """

    kept: int
    of: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"


@dataclass(frozen=True)
class PrunedGroups:
    """Whole rows or columns of a weight are zero: those with the smallest L2 norms.

    Of each matrix exactly ``round(share * n)`` of its n rows or columns are pruned; among those whose norms are the
    same the last ones. Norms are taken of the weight as it is, also of what is pruned, which so can come back.

    Args:
        share: of the rows or columns, above 0 and below 1.
        groups: ``"rows"``, the outputs of the product, such as neurons and output channels; or ``"columns"``, its
            inputs. They are those of `torch.nn.Linear`'s weight, (out, in): of a weight that is stored the other way,
            as GPT-2's (in, out), a row is a column of what is stored. A column of a convolution's weight is one of its
            input channels.
        size: how many rows, or columns, that lie side by side are a group, which is pruned as a whole: the features of
            an attention head, say. n is then the number of groups.
        start, stop: draws, for gradual pruning (arXiv 1710.01878): nothing is pruned before draw ``start``, all of the
            share from draw ``stop`` on, and ``share * (1 - (1 - (t - start) / (stop - start)) ** 3)`` at a draw t in
            between. With ``stop=0`` all of it from the first draw on.

    Raises:
        ValueError: a bad value; the message names it and what is accepted.
    """

    share: float
    groups: Groups = "rows"
    size: int = 1
    start: int = 0
    stop: int = 0

    def __post_init__(self) -> None:
        share = self.share
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            raise ValueError(f"PrunedGroups.share must be a number above 0 and below 1, got {share!r}")
        if self.groups not in ("rows", "columns"):
            raise ValueError(f"PrunedGroups.groups must be 'rows' or 'columns', got {self.groups!r}")
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"PrunedGroups.size must be an int, 1 or more, got {self.size!r}")
        for name in ("start", "stop"):
            step = getattr(self, name)
            if isinstance(step, bool) or not isinstance(step, int) or step < 0:
                raise ValueError(f"PrunedGroups.{name} must be an int, 0 or more, got {step!r}")
        if self.start and self.start >= self.stop:
            raise ValueError(
                f"PrunedGroups.stop must be above start={self.start}, the draw from which all of the share is pruned, "
                f"got {self.stop}"
            )

    @property
    def gradual(self) -> bool:
        """Whether the share changes over draws."""
        return self.stop > 0

    def count(self, groups: int, step: int | torch.Tensor) -> int | torch.Tensor:
        """How many of so many groups are pruned at a draw.

        Args:
            groups: how many there are.
            step: number of the draw; a tensor of one int64 gives a tensor.
        """
        if not self.gradual:
            return round(self.share * groups)
        if not isinstance(step, torch.Tensor):
            left = 1 - min(max((step - self.start) / (self.stop - self.start), 0.0), 1.0)
            return round(self.share * (1 - left * left * left) * groups)
        passed = (step - self.start).to(torch.float64) / (self.stop - self.start)
        rest: torch.Tensor = 1 - passed.clamp(0.0, 1.0)
        count: torch.Tensor = self.share * (1 - rest * rest * rest) * groups
        return count.round().to(torch.int64)

    def __str__(self) -> str:
        steps = f":{self.start}-{self.stop}" if self.gradual else ""
        size = f"*{self.size}" if self.size > 1 else ""
        return f"{self.groups}{size}:{self.share}{steps}"


Sparsity = KeptElements | PrunedGroups

SparsityLike = Sparsity | str | None
"""``"2:4"`` or another ``"N:M"``, `PrunedGroups`, or None for a dense weight."""


def as_sparsity(value: object) -> Sparsity | None:
    """A sparsity that a user has given.

    Raises:
        ValueError: it is none; the message names it and what is accepted.
    """
    if value is None or isinstance(value, (KeptElements, PrunedGroups)):
        return value
    found = re.fullmatch(r"(\d+):(\d+)", value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(
            f"sparsity must be 'N:M', such as '2:4', PrunedGroups(share, groups), or None for dense weights, got "
            f"{value!r}"
        )
    kept, of = map(int, found.groups())
    if not 1 <= kept < of <= MOST_OF:
        raise ValueError(
            f"sparsity='N:M' keeps N of M consecutive elements, with N from 1 to M - 1 and M at most {MOST_OF}, got "
            f"{value!r}"
        )
    return KeptElements(kept, of)
