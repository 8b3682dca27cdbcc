"""Hugging Face's Trainer: a callback that logs `gws_compile.Backend.metrics`. Importing this imports transformers."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..command_line.named_backend import named_backends
from ..compiler.backend import Backend
from ..warning import GwsWarning


class MetricsCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Logs what the cast and the noise do to the weights, through ``Trainer.log``, to wherever the Trainer reports.

    ``trainer.add_callback(MetricsCallback(trainer, every=100))``, before ``trainer.train()``. The names, and what
    they mean, are those of `gws_compile.Metrics.scalars`, with ``gws/`` in front.

    Args:
        trainer: the one whose ``log`` is called.
        backend: whose metrics; None for the backend behind the name ``"gws"``, of several the last one.
        every: optimizer steps between two logs, 1 or more.
        per_weight: log each weight's metrics too.

    Raises:
        ValueError: ``every`` is no positive int.
    """

    def __init__(
        self, trainer: Trainer, backend: Backend | None = None, *, every: int = 100, per_weight: bool = False
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be a number of steps, 1 or more, got {every!r}")
        self._trainer = trainer
        self._backend = backend
        self._every = every
        self._per_weight = per_weight
        self._warned = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log, if it is time. Every rank computes: sharded weights are gathered by all."""
        if state.global_step % self._every:
            return
        backend = self._backend or next(reversed(named_backends()), None)
        scalars = {} if backend is None else backend.metrics().scalars(per_weight=self._per_weight)
        if scalars:
            should_log = control.should_log
            self._trainer.log(scalars)
            control.should_log = should_log  # `Trainer.log` clears it, and the step's own loss would not be logged
        elif not self._warned:
            self._warned = True
            warnings.warn(
                "MetricsCallback has nothing to log: its backend has sampled no weight yet. Give it the backend that "
                "the model is compiled with: MetricsCallback(trainer, backend)",
                GwsWarning,
                stacklevel=2,
            )
