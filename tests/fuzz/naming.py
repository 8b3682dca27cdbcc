"""By which name and number a weight draws, counted as the documentation says."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from torch import nn


@dataclass
class Draws:
    """The number of the draw, counted as the documentation says.

    An optimizer step asks for a new draw, if there was a training forward since the run began; it begins with the next
    training forward. With ``anew`` each training forward draws.
    """

    anew: bool
    step: int = 0
    pending: bool = False
    drawn: bool = False

    def forward(self) -> None:
        self.step += self.pending or self.anew
        self.pending, self.drawn = False, True

    def optimizer_stepped(self) -> None:
        self.pending |= self.drawn and not self.anew

    def resume(self) -> None:
        self.step, self.pending, self.drawn = self.step + self.pending, False, False


@dataclass
class UniqueNames:
    """The names by which weights draw: of copies, the first to be used has the qualified name, others a number.

    Behind a loaded state names are given in the same order again.
    """

    given: dict[tuple[int, str], str] = field(default_factory=dict)
    saved: dict[str, list[str]] = field(default_factory=dict)

    def of(self, owner: int, name: str) -> str:
        """The unique name of a model's weight, at its first use or later; models have numbers, 0 is trained."""
        if (owner, name) not in self.given:
            saved = self.saved.get(name, [])
            count = sum(known == name for _, known in self.given)
            numbers = (name if i == 0 else f"{name}#{i}" for i in itertools.count())
            taken = {*saved, *self.given.values()}
            self.given[owner, name] = saved[count] if count < len(saved) else next(n for n in numbers if n not in taken)
        return self.given[owner, name]

    def resume(self) -> None:
        """Go on in a new process, with the model that is trained."""
        self.saved = {name: [unique] for (owner, name), unique in self.given.items() if owner == 0}
        self.given = {}


def names_of(root: nn.Module, prefix: str = "") -> dict[int, str]:
    """The names of a module's parameters by their ids: of a shared one the first."""
    found: dict[int, str] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        parts = [part for part in name.removeprefix(prefix).split(".") if part != "_orig_mod"]
        found.setdefault(id(parameter), ".".join(parts))
    return found
