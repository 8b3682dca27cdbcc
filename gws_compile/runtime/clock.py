"""When new noise is drawn: the number of the draw, as a tensor that every graph takes as an input."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

from ..numerics.primitives import wrap_int32
from ..numerics.spec import CLOCK_WORDS
from ..settings.schedule import Schedule
from ..torch_internals.modes import plain_tensors


class DrawState(NamedTuple):
    """What a forward sees of the clock.

    Attributes:
        step: number of the draw, from 0.
        enabled: False where noise is switched off.
        frozen: learned widths are fixed.
    """

    step: int
    enabled: bool
    frozen: bool

    def without_noise(self) -> DrawState:
        """The same with noise switched off."""
        return self._replace(enabled=False)

    def with_noise(self) -> DrawState:
        """The same with noise switched on."""
        return self._replace(enabled=True)

    def with_trained_widths(self) -> DrawState:
        """The same with learned widths that are not fixed."""
        return self._replace(frozen=False)


def clock_words(state: DrawState, schedule: Schedule) -> tuple[int, int, int, int, int]:
    """The words of a clock.

    The draw's number; -1 to draw or 0 to leave the weights as they are; -1 for frozen widths, else 0; the bits of the
    float32 ``2**(1 - b)``, for a width b that the schedule moves; the bits of the products that it has in high
    precision.
    """
    draws = state.enabled and schedule.draws(state.step)
    step = state.step
    return wrap_int32(step), -int(draws), -int(state.frozen), schedule.factor_bits(step), schedule.unrounded(step)


class Clock:
    """Counts draws.

    An optimizer step (or `tick`) asks for a new draw; it begins with the next training forward. So several optimizers
    stepping one after another make one new draw.

    The tensors are never changed in place: a graph that saved one for backward still computes with its own draw after
    the next has begun.

    Args:
        schedule: says when there is noise, and how wide; None for always.

    Attributes:
        step: number of the current draw, from 0.
        pending: a new draw has been asked for.
        frozen: learned widths are fixed.
        drawn: a training forward has seen the current draw.
    """

    def __init__(self, schedule: Schedule | None = None) -> None:
        self._schedule = schedule or Schedule()
        self.step = 0
        self.pending = False
        self.frozen = False
        self.drawn = False
        self._switch = threading.local()
        self._tensors: dict[torch.device, dict[DrawState, torch.Tensor]] = {}
        self._lock = threading.Lock()

    @property
    def enabled(self) -> bool:
        """False while noise is switched off in this thread."""
        return getattr(self._switch, "enabled", True)

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._switch.enabled = enabled

    @property
    def upcoming(self) -> int:
        """Number of the draw that the next training forward sees, if no optimizer steps before it."""
        return self.step + self.pending

    @property
    def state(self) -> DrawState:
        """What a forward in this thread sees now."""
        return DrawState(self.step, self.enabled, self.frozen)

    def tick(self) -> None:
        """Ask for a new draw, beginning with the next training forward."""
        self.pending = True

    def optimizer_stepped(self, optimizer: object) -> None:
        """Ask for a new draw, if there has been a forward since this one began.

        A step without one trains nothing: ``torch.distributed.checkpoint`` takes such steps to fill an optimizer's
        state, and a resumed run must not count them.
        """
        if self.drawn:
            self.tick()

    def resume(self, step: int) -> None:
        """Go on with this draw."""
        self.step, self.pending, self.drawn = step, False, False

    def begin_forward(self) -> None:
        """Start the draw that was asked for, if any."""
        self.drawn = True
        if self.pending:
            with self._lock:
                self.step += self.pending
                self.pending = False

    def tensor(self, device: torch.device, state: DrawState) -> torch.Tensor:
        """int32 (5,), see `clock_words`."""
        made = self._tensors.get(device, {})
        tensor = made.get(state)
        if tensor is None:
            with plain_tensors():
                # Filled by kernels whose scalars are launch arguments: no copy from the host, so no synchronization.
                words = clock_words(state, self._schedule)
                tensor = torch.full((len(words),), words[0], dtype=torch.int32, device=device)
                for position, word in enumerate(words[1:], 1):
                    tensor[position].fill_(word)
            # Beside the current one those of forwards that are run again: few, and none older than the last two draws.
            kept = {known: one for known, one in list(made.items()) if known.step >= state.step - 1}
            self._tensors[device] = {**kept, state: tensor} if len(kept) < 8 else {state: tensor}
        return tensor


class StepWords:
    """The words of a clock of which the number alone is read: for roundings that are no sample of a weight."""

    def __init__(self) -> None:
        self._made: dict[torch.device, tuple[int, torch.Tensor]] = {}

    def tensor(self, device: torch.device, step: int) -> torch.Tensor:
        """int32 (5,): the number of a step; kept until another one is asked for."""
        known = self._made.get(device)
        if known is None or known[0] != step:
            with plain_tensors():
                # A launch argument of a kernel: no copy from the host, so no synchronization.
                words = torch.full((CLOCK_WORDS,), wrap_int32(step), dtype=torch.int32, device=device)
            known = self._made[device] = (step, words)
        return known[1]
