"""Tracing a model without compiling it: for `gws_compile.explain` and `Backend.prepare`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call

from ..config import Config
from ..learned_bits.learned_widths import LearnedWidths
from ..learned_levels.learned_levels import LearnedLevels
from ..passes import Weight
from ..passes.bodies import copy_with_bodies
from ..report.records import GraphBreak
from ..report.report import Report
from ..runtime.clock import Clock
from ..runtime.weight_slots import Slot, WeightSlots
from ..torch_internals.compilers import unwrapped
from ..torch_internals.dynamo import not_traced
from ..torch_internals.fake_tensors import fake_mode, map_tensors
from .diagnostics import Diagnostics
from .reporting import Reporting
from .rewriting import Rewriting


class Tracer:
    """A ``torch.compile`` backend that rewrites graphs for the record, and runs the model's own.

    Args:
        config: the settings.

    Attributes:
        slots: the weights that came in, and those of the modules that were called.
        found: those that are sampled, with what the first graph that does so knows of them.
    """

    __name__ = "gws"

    def __init__(self, config: Config) -> None:
        self.slots = WeightSlots()
        self.found: dict[Slot, Weight] = {}
        self._rewriting = Rewriting(config, Diagnostics(config, self.slots))
        learned = None if config.learned is None else LearnedWidths(config.learned)
        levels = LearnedLevels() if config.tables else None
        self._reporting = Reporting(config, self._rewriting, self.slots, Clock(config.schedule), learned, levels)
        self._left: list[GraphBreak] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Rewrite the graph and give back the model's own."""
        rewritten, _ = self._rewriting(gm, example_inputs)
        weights, gradients, kept = rewritten.weights, rewritten.gradients, copy_with_bodies(gm)

        def forward(*args: Any) -> Any:
            # One graph may serve several blocks, each with weights of its own.
            tensors = [args[weight.position] for weight in weights]
            slots = self.slots.find(tensors, [weight.name for weight in weights])
            names = self._rewriting.form_of(weights, tensors)
            here = rewritten if names is None else self._rewriting.again(kept, weights, names, gradients=gradients)
            for weight, slot in zip(here.weights, slots, strict=True):
                slot.add(weight)
                if weight.reason is None:
                    self.found.setdefault(slot, weight)
            return gm.forward(*args)

        return forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Tracer:
        """The tracer itself: what deep-copies a compiled model is not to copy the record."""
        return self

    def run(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call the model, traced, as it is; keep what Dynamo left."""
        before = not_traced()
        with torch.random.fork_rng(), self.instead_of_others():
            torch.compile(model, backend=self)(*args, **kwargs)
        left = (GraphBreak(cause, "") for cause, count in not_traced().items() if count > before.get(cause, 0))
        self._left = list({one.cause: one for one in left}.values())

    def instead_of_others(self) -> AbstractContextManager[Any]:
        """Takes the place of the backends with which the model, or parts of it, were compiled already.

        They would be asked wherever Dynamo does not trace through: ``model.compile()`` at the top, blocks behind a
        graph break.
        """
        stance: AbstractContextManager[Any] = torch.compiler.set_stance(force_backend=self)
        return stance

    def report(self) -> Report:
        """The report, with every weight of a module under its own name, those that no graph has too."""
        report = self._reporting.report()
        return Report(
            report.records,
            report.bits,
            graphs=report.graphs,
            products=report.products,
            breaks=[*report.breaks, *self._left],
            settings=report.settings,
            histograms=self._reporting.histograms,
        )


def explained(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], config: Config) -> Report:
    """The report of one call, with every weight of the model; see `gws_compile.explain`."""
    tracer = Tracer(config)
    if isinstance(model, nn.Module):
        tracer.slots.add_root(unwrapped(model))
    tracer.run(model, args, kwargs)
    return tracer.report()


def weights_to_sample(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: Config, slots: WeightSlots
) -> list[tuple[torch.Tensor, Slot, Weight]]:
    """The weights of a model that are sampled: Parameter, place, and what a graph knows of it.

    The model is traced on fake tensors: nothing is computed and nothing changes. Graph breaks are followed.

    Args:
        model: wrapped and compiled as it may be.
        args: the call's positional arguments.
        kwargs: its keyword arguments.
        config: what is rewritten.
        slots: takes the places.
    """
    model = unwrapped(model)
    mode = fake_mode()

    def fake(value: torch.Tensor) -> Any:
        return mode.from_tensor(value, static_shapes=True)

    tracer = Tracer(config)
    compiled: Any = torch.compile(model, backend=tracer)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
    made: dict[int, Any] = {}  # tied ones stay tied
    fakes = {}
    for name, value in state.items():
        if id(value) not in made:
            made[id(value)] = fake(value)
        fakes[f"_orig_mod.{name}"] = made[id(value)]
    fake_args, fake_kwargs = map_tensors(fake, (args, kwargs))
    with torch.random.fork_rng(), torch.enable_grad(), tracer.instead_of_others(), mode:
        functional_call(compiled, fakes, fake_args, fake_kwargs)
    found = {slot.place(): weight for slot, weight in tracer.found.items()}
    prepared = []
    for slot in slots.of_module(model):
        weight = slot.tensor()
        if weight is not None and slot.place() in found:
            prepared.append((weight, slot, found[slot.place()]))
    return prepared
