"""Which steps of several optimizers make one training step: `StepRounds`."""

from __future__ import annotations

import weakref


class StepRounds:
    """Tells the training steps apart in which several optimizers step, each once.

    One optimizer for matrices and another for vectors, or one for each parameter, which steps inside backward as soon
    as it has its gradient: the next training step has begun when one of them steps again.
    """

    def __init__(self) -> None:
        self._stepped: weakref.WeakSet[object] = weakref.WeakSet()

    def begins_with(self, optimizer: object) -> bool:
        """Take in the step of an optimizer, and say whether it is the first of a training step."""
        first = not self._stepped or optimizer in self._stepped
        if first:
            self._stepped = weakref.WeakSet()
        self._stepped.add(optimizer)
        return first
