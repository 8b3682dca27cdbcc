"""What goes on in the weights and gradients of a training run: `TrainingFigures`, for ``compare_models.py``."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from text_data import Text

import gws_compile
from gws_compile.ops.eager import levels_eager

LOOKED_AT = 20
DRAWS = 8


class TrainingFigures:
    """Watches the second half of a run: how many weights go to another level in a step, at some steps of it.

    Args:
        model: what is trained.
        backend: what its weights are cast by; of learned widths and plain training nothing is told.
        steps: of the run.
    """

    def __init__(self, model: torch.nn.Module, backend: gws_compile.Backend, steps: int) -> None:
        self._model = model
        self._backend = backend
        self._watched = set(torch.linspace(steps // 2, steps - 1, LOOKED_AT).long().tolist()) if steps > 1 else set()
        self._names: set[str] = set()
        self._before: dict[str, torch.Tensor] = {}
        self._changed: list[float] = []

    def before_step(self, step: int) -> None:
        """Note the levels before an optimizer step."""
        if step in self._watched and self._backend.config.learned is None:
            self._before = self._levels()

    def after_step(self, step: int) -> None:
        """Count those that are others behind it."""
        if self._before:
            now = self._levels()
            changed = sum(int((now[name] != levels).sum()) for name, levels in self._before.items())
            self._changed.append(changed / sum(levels.numel() for levels in now.values()))
            self._before = {}

    def numbers(self) -> dict[str, float]:
        """``changed_levels``: share of the weights that an optimizer step takes to another level."""
        return {"changed_levels": statistics.fmean(self._changed)} if self._changed else {}

    def gradient_noise(
        self, loss_of: Callable[[torch.Tensor], torch.Tensor], text: Text, batch: int, seq: int, seed: int
    ) -> dict[str, float]:
        """How much gradients scatter at the end of training, over batches and, at one batch, over draws of the noise.

        Returns:
            ``scatter_batches`` and ``scatter_draws``: sum of the variances of all elements, over the squared norm of
            the mean gradient over the batches. The first has a draw for each batch.
        """

        def gradient(number: int) -> torch.Tensor:
            self._model.zero_grad()
            loss_of(text.batch_of_step(number, batch, seq, seed=seed + 1).to(device)).backward()
            self._backend.step()
            return torch.cat([p.grad.flatten().double() for p in self._model.parameters() if p.grad is not None])

        device = next(self._model.parameters()).device
        over_batches = torch.stack([gradient(number) for number in range(DRAWS)])
        over_draws = torch.stack([gradient(0) for _ in range(DRAWS)])
        self._model.zero_grad()
        size = over_batches.mean(0).square().sum()
        return {
            "scatter_batches": float(over_batches.var(0).sum() / size),
            "scatter_draws": float(over_draws.var(0).sum() / size),
        }

    def _levels(self) -> dict[str, torch.Tensor]:
        """Every cast weight in numbers of its block's scale, so that a scale that moves a little counts for nothing."""
        config = self._backend.config
        if not self._names:
            self._names = {record.name for record in self._backend.report().rewritten}
        found = {}
        for name, p in self._model.named_parameters():
            settings = config.settings_of(name)
            if name in self._names and settings is not None:
                spec = replace(settings.sample_spec(p.dtype), noise="none")
                found[name] = levels_eager(p.detach().unsqueeze(0), spec, settings.block)[1]
        return found
