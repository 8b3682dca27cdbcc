"""A backend for plain training whose evaluation is cast: `CastAfterwards`, what others are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..config import Config
from .backend import Backend
from .compiled_graph import compile_graph


class CastAfterwards(Backend):
    """Leaves graphs of training as they are, and casts the weights of those that are compiled without gradients.

    What casting the weights of a model costs that was trained without any of this: post-training quantization by
    rounding to nearest.

    Args:
        config: the settings; noise, learned widths and operands that are rounded have no meaning.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._diagnostics.training_is_plain = True

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one traced graph: as it is while gradients are enabled, else as `Backend` does."""
        if torch.is_grad_enabled():
            return compile_graph(gm, example_inputs, self.config.inner, None, mode, options)
        return super().__call__(gm, example_inputs, mode=mode, options=options)
