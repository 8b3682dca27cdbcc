"""How learned bit widths moved: a histogram every so many steps."""

from __future__ import annotations

import torch

BINS = 48
MOST = 64


class WidthHistory:
    """Histograms of the widths over training; as training goes on they lie further apart, so that few are kept.

    Attributes:
        steps: the optimizer steps of the snapshots.
    """

    def __init__(self, smallest: float, largest: float) -> None:
        self.steps: list[int] = []
        self._range = (smallest, largest)
        self._snapshots: list[torch.Tensor] = []
        self._every = 1
        self._step = 0

    def due(self) -> bool:
        """Count a step, and say whether to `record` it."""
        self._step += 1
        return self._step % self._every == 0

    def record(self, widths: torch.Tensor, shares: torch.Tensor) -> None:
        """Keep a histogram of the widths by their share of all elements; on the device, without synchronization."""
        smallest, largest = self._range
        place = ((widths - smallest) * (BINS / (largest - smallest))).long().clamp(0, BINS - 1)
        self._snapshots.append(
            torch.zeros(BINS, dtype=torch.float32, device=widths.device).scatter_add_(0, place, shares.float())
        )
        self.steps.append(self._step)
        if len(self.steps) > MOST:
            self._every *= 2
            kept = [i for i, step in enumerate(self.steps) if step % self._every == 0]
            self.steps = [self.steps[i] for i in kept]
            self._snapshots = [self._snapshots[i] for i in kept]

    def histograms(self) -> torch.Tensor:
        """float32, (snapshots, bins): the share of all elements in each bin from the smallest width to the largest."""
        return (
            torch.stack([s.cpu() for s in self._snapshots])
            if self._snapshots
            else torch.zeros(0, BINS, dtype=torch.float32, device="cpu")
        )
