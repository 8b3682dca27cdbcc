"""Training without master weights: behind each optimizer step the sampled parameters are written onto their grids."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch

from ..config import Config
from ..numerics.spec import CLOCK_WORDS, SampleSpec
from ..ops.write_grid import write_to_grid
from ..torch_internals.compilers import compiled_function
from ..torch_internals.distributed import shard_range, whole_tensor
from .clock import Clock, StepWords
from .keys import key_tensors
from .sampled_weights import sampling_of
from .weight_registry import WeightRegistry
from .weight_slots import Slot, WeightSlots

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""What a weight becomes, from it, its key and the words of the clock."""


class GridWriter:
    """Writes the sampled weights that an optimizer has updated onto their grids; see `write_to_grid`.

    The words are those of the weight's name and of the draw that comes, so that every rank writes the same, and a
    resumed run what the whole one would have written. Optimizers that step one behind another with no forward between
    are of one draw.

    Args:
        config: seed and inner compiler.
        slots: the weights.
        registry: names them.
        clock: numbers the draws.
    """

    def __init__(self, config: Config, slots: WeightSlots, registry: WeightRegistry, clock: Clock) -> None:
        self._config = config
        self._slots = slots
        self._registry = registry
        self._clock = clock
        self._compiled: dict[tuple[object, ...], Write] = {}
        self._keys: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._words = StepWords()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the weights of an optimizer that has stepped.

        Behind a step with no training forward before it nothing has been trained: ``torch.distributed.checkpoint``
        takes such steps to fill an optimizer's state.
        """
        if not self._clock.drawn:
            return
        self.write({id(parameter) for group in optimizer.param_groups for parameter in group["params"]})

    def write(self, held: Collection[int] | None = None) -> None:
        """Write the weights that are sampled and trained, or those of them with these ids."""
        for slot in self._slots:
            weight = slot.tensor() if slot.is_alive() else None
            if weight is not None and weight.requires_grad and (held is None or id(weight) in held):
                self._write_slot(slot, weight)

    def _write_slot(self, slot: Slot, weight: torch.Tensor) -> None:
        sampled = sampling_of(slot)
        if sampled is None or weight.is_meta:
            return
        self._registry.register([slot])
        settings, batch_dims = sampled.sampled_as, sampled.reads[0].batch_dims
        # As graphs read it: under FSDP2's mixed precision in another dtype than the optimizer's.
        spec = replace(settings.sample_spec(sampled.dtype), noise="none", bits=None)
        with torch.no_grad():
            whole = whole_tensor(weight)
            write = self._function(whole, spec, batch_dims, settings.block)
            clock = self._words.tensor(whole.device, self._clock.upcoming)
            written = write(whole, self._key(slot.name or "", whole.device), clock)
            _copy(weight, written)

    def _key(self, name: str, device: torch.device) -> torch.Tensor:
        if (name, device) not in self._keys:
            (self._keys[name, device],) = key_tensors(self._config.seed, [name], device)
        return self._keys[name, device]

    def _function(
        self, weight: torch.Tensor, spec: SampleSpec, batch_dims: int, block: tuple[int | None, int | None]
    ) -> Write:
        """The writing of a weight like this one, compiled where graphs are compiled by Inductor."""

        def write(w: torch.Tensor, key: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
            return write_to_grid(w, spec, batch_dims, block, key, clock)

        if self._config.inner != "inductor":
            return write
        known = tuple(weight.shape), weight.stride(), weight.dtype, weight.device, spec, batch_dims, block
        if known not in self._compiled:
            self._compiled[known] = _compile(write, weight)
        return self._compiled[known]


def _compile(write: Write, weight: torch.Tensor) -> Write:
    from ..codegen import lowering  # noqa: F401  (registers the operators' lowerings; imports Inductor)

    examples = (
        torch.empty_like(weight).detach(),
        torch.zeros(2, dtype=torch.int32, device=weight.device),
        torch.zeros(CLOCK_WORDS, dtype=torch.int32, device=weight.device),
    )
    compiled = compiled_function(write, examples)
    return lambda w, key, clock: compiled(w.detach(), key, clock)


def _copy(weight: torch.Tensor, written: torch.Tensor) -> None:
    """Give a weight new values, where it is a DTensor this rank's part of them."""
    found = shard_range(weight)
    if found is None:
        weight.copy_(written)
        return
    shape, offset, _ = found
    part = written[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    local: torch.Tensor = weight.to_local()  # type: ignore[attr-defined]
    local.copy_(part)
