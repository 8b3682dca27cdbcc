"""Compiled optimizer steps: ``torch.compile(optimizer.step, backend=...)``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import fx

from ..passes.round_updates import GRIDS, parameters_of_update, round_updates
from ..runtime.clock import StepWords
from ..runtime.keys import key_tensors
from ..torch_internals.graphs import example_value
from ..warning import GwsWarning

log = logging.getLogger("gws_compile")

Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


class CompiledUpdates:
    """The optimizers whose steps one backend compiles: numbers them, and counts their steps.

    Args:
        seed: of the backend.

    Attributes:
        count: optimizer steps so far that ran compiled; the number of the words that the next one rounds with.
    """

    def __init__(self, seed: int) -> None:
        self.count = 0
        self._seed = seed
        self._ran = False
        self._optimizers: list[set[int]] = []  # ids: swap_tensors refuses tensors that are referred to, weakly too
        self._words = StepWords()
        self._warned = False

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Behind an optimizer's step: the next one has other words, if this one ran compiled."""
        self.count, self._ran = self.count + self._ran, False

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], compile: Compile, *, alone: bool
    ) -> Callable[..., Any] | None:
        """Rewrite and compile the graph of an optimizer's step.

        Args:
            gm: Dynamo's graph.
            example_inputs: its inputs.
            compile: compiles the rewritten graph.
            alone: the backend has had no other graphs, so that wide parameters are worth a word. A function that is a
                whole training step has them too.

        Returns:
            What takes the graph's inputs; None for a graph that is no optimizer's.
        """
        parameters = parameters_of_update(gm)
        if not parameters:
            return None
        if not any(parameter.dtype in GRIDS for parameter in parameters):
            if alone:
                self._notice_wide(parameters[0].dtype)
            return compile(gm, example_inputs)
        rewritten = round_updates(gm)
        # The same in every process and on every rank.
        name = f"optimizer {self._number(parameters)}"
        keys = [key_tensors(self._seed, [name], device)[0] for device in rewritten.devices]
        log.info("an optimizer's step: %d tensors of 16 bits are rounded stochastically", rewritten.written)
        added = rewritten.module.graph.find_nodes(op="placeholder")[len(example_inputs) :]
        compiled = compile(rewritten.module, [*example_inputs, *map(example_value, added)])

        def step(*args: Any) -> Any:
            self._ran = True
            clocks = [self._words.tensor(device, self.count) for device in rewritten.devices]
            return compiled(*args, *chain.from_iterable(zip(keys, clocks, strict=True)))

        return step

    def _number(self, parameters: Sequence[torch.Tensor]) -> int:
        """Which optimizer has these parameters, in the order in which they came: the same in every process."""
        ids = set(map(id, parameters))
        for number, known in enumerate(self._optimizers):
            if known & ids:
                known |= ids
                return number
        self._optimizers.append(ids)
        return len(self._optimizers) - 1

    def _notice_wide(self, dtype: torch.dtype) -> None:
        if not self._warned:
            self._warned = True
            kind = str(dtype).removeprefix("torch.")
            warnings.warn(
                f"torch.compile(optimizer.step) with this backend changes nothing: its parameters are {kind}; it "
                "rounds the updates of bfloat16 and float16 ones stochastically",
                GwsWarning,
                stacklevel=2,
            )
