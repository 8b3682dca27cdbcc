"""Which optimizer steps had a sampled training forward before them: `TrainingWatch`, for ``gws run``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..compiler.backend import Backend
from ..runtime.held_weights import held_weights
from ..runtime.optimizer_hooks import after_each_step
from ..runtime.weight_slots import Slot
from ..torch_internals.modules import modules_alive
from ..warning import GwsWarning

MANY_PLAIN_STEPS = 50
"""Steps one after another, with no sampled forward before them, that are worth a word while the script runs."""

_SHOWN = 4


@dataclass(frozen=True, eq=False)
class PlainWeight:
    """A weight that was moved with no sampled forward before.

    Attributes:
        name: in its model.
        slots: its places, as far as the backends know it.
    """

    name: str
    slots: tuple[Slot, ...]

    @property
    def is_left_alone(self) -> bool:
        """Whether every report lists it as left alone, with a reason of its own."""
        return bool(self.slots) and all(weight.reason is not None for slot in self.slots for weight in slot.graphs)


@dataclass(eq=False)
class OptimizerRecord:
    """What has been seen of one optimizer.

    Attributes:
        kind: its class.
        draws: where each backend stood behind its last step.
        steps: how often it has stepped.
        plain: the steps before which nothing was sampled.
        in_a_row: the plain ones since the last step that was none.
        weights: what it moved in its first plain step that another followed.
        warned: it has been told of while the script runs.
    """

    kind: str
    draws: dict[Backend, int]
    steps: int = 0
    plain: int = 0
    in_a_row: int = 0
    weights: list[PlainWeight] = field(default_factory=list)
    warned: bool = False

    def names(self) -> list[str]:
        """Its weights without those that a report accounts for."""
        return list(dict.fromkeys(weight.name for weight in self.weights if not weight.is_left_alone))


class TrainingWatch:
    """Looks, behind every step of every optimizer, whether anything has been sampled since its last one.

    A script may train through something else than what is compiled: ``model.forward(...)``, ``ddp.module(...)``, a part
    of the model. As soon as the compiled model is called once, to predict, its report says that weights are rewritten.

    A step counts as sampled if any backend has begun a draw since the step before: an optimizer may hold copies of the
    weights (mixed precision with masters), which no compiled graph ever sees.

    Args:
        backends: those to ask.
        expects_noise: whether anything is compiled, or is going to be; a warning waits for that.
    """

    def __init__(self, backends: Callable[[], Sequence[Backend]], expects_noise: Callable[[], bool]) -> None:
        self._backends = backends
        self._expects_noise = expects_noise
        self._begin()
        after_each_step(self, TrainingWatch.optimizer_stepped)

    def _begin(self) -> None:
        self._records: list[OptimizerRecord] = []
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # optimizer -> OptimizerRecord
        self._draws = self._draws_now()

    def begin_process(self) -> None:
        """Forget, in a process that has been forked, what came before."""
        self._begin()

    def _draws_now(self) -> dict[Backend, int]:
        """The draw of each backend: one behind every step before which there was a training forward."""
        return {backend: backend.draw for backend in self._backends() if backend.config.draws_noise}

    def optimizer_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Count a step."""
        record: OptimizerRecord | None = self._known.get(optimizer)  # type: ignore[no-untyped-call]
        if record is None:
            record = self._known[optimizer] = OptimizerRecord(type(optimizer).__name__, self._draws)
            self._records.append(record)
        draws = self._draws_now()
        sampled = not draws or draws != record.draws
        record.draws = draws
        record.steps += 1
        if sampled:
            record.in_a_row = 0
        elif weights := self._meant_for_noise(optimizer):
            record.plain += 1
            record.in_a_row += 1
            if record.plain == 2:  # one alone is never told of, and names may be in the process's objects alone
                record.weights = self._named(weights)
            if record.in_a_row == MANY_PLAIN_STEPS and not record.warned and record.names() and self._expects_noise():
                self._warn_of(record)

    def _warn_of(self, record: OptimizerRecord) -> None:
        """Warn, in one message of all that are as far: there may be an optimizer for each parameter."""
        alike = [
            one
            for one in self._records
            if one.kind == record.kind and one.in_a_row >= MANY_PLAIN_STEPS - 1 and not one.warned
        ]
        for one in alike:
            one.warned = True
        _warn(record.kind, [name for one in alike for name in one.names()])

    def told(self) -> list[str]:
        """A sentence for the optimizers of one kind whose steps had no sampled forward before them, alike in number.

        A single step is passed over: ``torch.distributed.checkpoint`` takes it to fill an optimizer's state.
        """
        alike: dict[tuple[str, int, int], list[str]] = {}
        for record in self._records:
            if names := record.names():
                alike.setdefault((record.kind, record.plain, record.steps), []).extend(names)
        return [
            f"{plain} of {steps} optimizer steps ({kind} of {_listed(names)}) had no sampled training forward before "
            "them: they trained without noise. What is called as a module is compiled: call model(...), not "
            "model.forward(...) or a part of the model"
            for (kind, plain, steps), names in alike.items()
        ]

    def _meant_for_noise(self, optimizer: torch.optim.Optimizer) -> list[tuple[nn.Parameter, tuple[Slot, ...]]]:
        """The weights that an optimizer has moved, each with its places, but for those that graphs leave alone."""
        weights = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if isinstance(parameter, nn.Parameter) and _is_trained(parameter)
        ]
        known = [(backend, backend.slots_of(weights)) for backend in self._backends()]
        found = []
        for i, weight in enumerate(weights):
            places = [(backend, slot) for backend, slots in known if (slot := slots[i]) is not None]
            if not any(_has_no_noise(backend, slot) for backend, slot in places):
                found.append((weight, tuple(slot for _, slot in places)))
        return found

    def _named(self, weights: Sequence[tuple[nn.Parameter, tuple[Slot, ...]]]) -> list[PlainWeight]:
        names = _names_of([weight for weight, slots in weights if not slots])
        return [PlainWeight(slots[0].known_as if slots else names[id(weight)], slots) for weight, slots in weights]


def _is_trained(parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and parameter.grad is not None and parameter.is_floating_point()


def _has_no_noise(backend: Backend, slot: Slot) -> bool:
    """Whether graphs have a weight, and it gets no noise in them for a reason of its own, or by the settings."""
    sampled = [weight for weight in slot.graphs if weight.reason is None]
    return bool(slot.graphs) and all(weight.sampled_as.noise == "none" for weight in sampled)


def _names_of(weights: Sequence[torch.Tensor]) -> dict[int, str]:
    """Names by the weights' ids, in the outermost module that is alive and has them; the shape for one in none.

    Looks at every object of the process: some 50 ms.
    """
    names = {id(weight): "a weight of " + " x ".join(map(str, weight.shape)) for weight in weights}
    if names:
        modules = list(modules_alive())
        inner = {id(child) for module in modules for child in module.children()}
        for module in reversed([m for m in modules if id(m) not in inner]):
            names.update({id(held.tensor): held.name for held in held_weights(module) if id(held.tensor) in names})
    return names


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _warn(kind: str, names: Sequence[str]) -> None:
    warnings.warn(
        f"{MANY_PLAIN_STEPS} optimizer steps ({kind} of {_listed(names)}) one after another had no "
        "sampled training forward before them: these weights train without noise. gws run compiles what is called as a "
        "module: call model(...), not model.forward(...) or a part of the model",
        GwsWarning,
        stacklevel=2,
    )
