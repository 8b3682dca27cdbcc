"""When new noise is drawn: the number of the draw, as a tensor that every graph takes as an input."""

from __future__ import annotations

import threading

import torch

from ..numerics.primitives import wrap_int32


class Clock:
    """Counts draws.

    An optimizer step (or `tick`) asks for a new draw; it begins with the next training forward. So several optimizers
    stepping one after another make one new draw, and forwards that activation checkpointing runs again inside backward
    see the draw of their first run.

    The tensors are never changed in place: a graph that saved one for backward still computes with its own draw after
    the next has begun.

    Attributes:
        step: number of the current draw, from 0.
        enabled: False while noise is switched off.
        pending: a new draw has been asked for.
        frozen: learned widths are fixed.
        drawn: a training forward has seen the current draw.
    """

    def __init__(self) -> None:
        self.step = 0
        self.enabled = True
        self.pending = False
        self.frozen = False
        self.drawn = False
        self._tensors: dict[torch.device, tuple[tuple[int, bool, bool], torch.Tensor]] = {}
        self._lock = threading.Lock()

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

    def tensor(self, device: torch.device) -> torch.Tensor:
        """int32 (3,): the draw's number; -1 to draw or 0 to leave the weights as they are; -1 for frozen widths."""
        now = (self.step, self.enabled, self.frozen)
        made, tensor = self._tensors.get(device, (None, None))
        if tensor is None or made != now:
            # Filled by kernels whose scalars are launch arguments: no copy from the host, so no synchronization.
            tensor = torch.full((3,), wrap_int32(self.step), dtype=torch.int32, device=device)
            tensor[1].fill_(-int(self.enabled))
            tensor[2].fill_(-int(self.frozen))
            self._tensors[device] = (now, tensor)
        return tensor
