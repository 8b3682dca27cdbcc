"""Tracing a model without compiling it: for `gws_compile.explain` and `Backend.prepare`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call

from ..config import Config
from ..learned_bits.learned_widths import LearnedWidths
from ..report.records import GraphBreak, WeightRecord
from ..report.report import Report
from ..report.untraced import untraced_records
from ..runtime.clock import Clock
from ..runtime.sampled_weights import SampledWeights
from ..runtime.weight_registry import WeightRegistry
from ..torch_internals.compilers import unwrapped
from ..torch_internals.dynamo import not_traced
from ..torch_internals.fake_tensors import fake_mode, map_tensors
from ..weight_names import clean
from .diagnostics import Diagnostics
from .reporting import Reporting
from .rewriting import Rewriting


class Tracer:
    """A ``torch.compile`` backend that rewrites graphs for the record, and runs the model's own.

    Args:
        config: the settings.

    Attributes:
        met: the weights that came in, each with its record, in the order of the calls.
        found: the weights that get noise: name and `gws_compile.numerics.blocks.matrix_shape`'s ``batch_dims``.
    """

    __name__ = "gws"

    def __init__(self, config: Config) -> None:
        self.met: list[tuple[torch.Tensor, WeightRecord]] = []
        self.found: dict[str, int] = {}
        self._config = config
        registry = WeightRegistry()
        self._sampled = SampledWeights(registry)
        self._rewriting = Rewriting(config, Diagnostics(config, registry))
        learned = None if config.learned is None else LearnedWidths(config.learned, config.block)
        self._reporting = Reporting(config, self._rewriting, registry, self._sampled, Clock(), learned)
        self._left: list[GraphBreak] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Rewrite the graph and give back the model's own."""
        rewritten, records = self._rewriting(gm, example_inputs)
        chosen = rewritten.selected
        for weight in chosen:
            if weight.trainable:
                self.found.setdefault(weight.name, weight.reads[0].batch_dims)
        positions = [(weight.position, record) for weight, record in zip(rewritten.weights, records, strict=True)]

        def forward(*args: Any) -> Any:
            # One graph may serve several blocks, each with weights of its own.
            self.met += [(args[position], record) for position, record in positions]
            self._sampled.record([args[weight.position] for weight in chosen], chosen)
            return gm.forward(*args)

        return forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Tracer:
        """The tracer itself: what deep-copies a compiled model is not to copy the record."""
        return self

    def run(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call the model, traced, as it is; keep what Dynamo left."""
        before = not_traced()
        with torch.random.fork_rng():
            torch.compile(model, backend=self)(*args, **kwargs)
        left = (GraphBreak(cause, "") for cause, count in not_traced().items() if count > before.get(cause, 0))
        self._left = list({one.cause: one for one in left}.values())

    def report_of(self, model: Callable[..., Any]) -> Report:
        """The report, with every weight of a module under its own name, those that no graph has too."""
        report = self._reporting.report()
        records = list(report.records)
        if isinstance(model, nn.Module):
            root = unwrapped(model)
            names = {id(parameter): clean(name) for name, parameter in root.named_parameters()}
            met = {id(weight) for weight, _ in self.met}
            records = [replace(record, name=names.get(id(weight), record.name)) for weight, record in self.met]
            records += untraced_records(root, self._config, lambda _, weight: id(weight) in met)
            self.met = []  # the report keeps this tracer, for histograms, but no weight
        return Report(
            records,
            report.bits,
            graphs=report.graphs,
            breaks=[*report.breaks, *self._left],
            settings=report.settings,
            histograms=self._reporting.histograms,
        )


def explained(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], config: Config) -> Report:
    """The report of one call, with every weight of the model; see `gws_compile.explain`."""
    tracer = Tracer(config)
    tracer.run(model, args, kwargs)
    return tracer.report_of(model)


def trainable_weights(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: Config
) -> list[tuple[str, nn.Parameter, int]]:
    """The weights of a model that get noise: name, parameter, and ``batch_dims`` of `numerics.blocks.matrix_shape`.

    The model is traced on fake tensors: nothing is computed and nothing changes. Graph breaks are followed.

    Args:
        model: wrapped and compiled as it may be.
        args: the call's positional arguments.
        kwargs: its keyword arguments.
        config: what is rewritten.
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
    with torch.random.fork_rng(), torch.enable_grad(), mode:
        functional_call(compiled, fakes, fake_args, fake_kwargs)
    by_name: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        by_name.setdefault(clean(name), parameter)
    return [(name, by_name[name], dims) for name, dims in tracer.found.items() if name in by_name]
