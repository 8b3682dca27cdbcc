"""Leading the average bit width to a target: an augmented Lagrangian whose scale is measured, not chosen."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..torch_internals.modes import plain_tensors


class AverageConstraint:
    """The multiplier of the constraint ``average width = target``.

    The loss term is ``s * (m * c + rho / 2 * c**2)`` with ``c = average - target``: an augmented Lagrangian (Hestenes
    1969, Powell 1969) in units of ``s``, the running mean of ``sum |dL/db|`` of the task's own gradient. A step of Adam
    or of sign descent does not see the size of a gradient, only what part of it each term has; in these units the term
    has a fixed part of it, for any task, model and batch. After each optimizer step ``m`` grows by ``rate * rho * c``,
    at most ``rate`` at once, so that it does not wind up on the way.

    Attributes:
        target: the average width to arrive at.
    """

    RHO = 20.0
    RATE = 0.02
    MEMORY = 0.98

    def __init__(self, target: float) -> None:
        self.target = target
        with plain_tensors():
            self._multiplier = torch.zeros((), dtype=torch.float32, device="cpu")
            self._scale = torch.zeros_like(self._multiplier)  # 0 until a gradient has been seen
        self._violation: torch.Tensor | None = None

    def loss(self, average: torch.Tensor) -> torch.Tensor:
        """The term for the current average width, a scalar with a gradient."""
        self._move(average.device)
        violation = average - self.target
        self._violation = violation.detach()
        return self._scale * (self._multiplier * violation + self.RHO / 2 * violation * violation)

    def update(self, average: torch.Tensor, gradients: torch.Tensor, shares: torch.Tensor) -> None:
        """Move the multiplier behind an optimizer step, on the device alone.

        Args:
            average: the average width behind the step.
            gradients: dL/db of all widths, this term's own part included.
            shares: each width's share in the average.
        """
        if self._violation is None:
            return  # the loss has no such term
        self._move(average.device)
        own = self._scale * (self._multiplier + self.RHO * self._violation) * shares
        size = (gradients - own).abs().sum()
        fresh = self._scale == 0
        self._scale = torch.where(fresh, size, self.MEMORY * self._scale + (1 - self.MEMORY) * size)
        self._multiplier = self._multiplier + self.RATE * (self.RHO * (average - self.target)).clamp(-1, 1)

    def _move(self, device: torch.device) -> None:
        self._multiplier, self._scale = self._multiplier.to(device), self._scale.to(device)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """``"multiplier"`` and ``"scale"``, float32 scalars; the scale is not negative."""
        with plain_tensors():
            return {"multiplier": self._multiplier.clone(), "scale": self._scale.clone()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state_dict`; as in a new process, the next loss comes before the next `update`."""
        self._multiplier, self._scale, self._violation = state["multiplier"], state["scale"], None
