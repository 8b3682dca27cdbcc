"""Tracing a model without compiling it: for `gws_compile.explain` and `Backend.prepare`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from . import torch_internals
from .compiler import Backend
from .config import Config
from .names import clean
from .passes import is_noisy, weights_of
from .report import GraphBreak, Report, WeightRecord
from .unseen import unseen_weights


class Tracer(Backend):
    """A backend that rewrites graphs for the record, and runs the model's own.

    Attributes:
        met: the weights that came in, each with its record, in the order of the calls.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(replace(config, inner="eager"))
        self._shown = config
        self.met: list[tuple[torch.Tensor, WeightRecord]] = []
        self._left: list[GraphBreak] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
        """Rewrite the graph and give back the model's own."""
        before = len(self._records)
        super().__call__(gm, example_inputs)
        weights = weights_of(self.graphs[-1])
        chosen = [w for w in weights if w.reason is None]
        noisy = [is_noisy(w, self.config) for w in chosen]
        found = zip(weights, self._records[before:], strict=True)
        positions = [(weight.position, record) for weight, record in found]

        def forward(*args: Any) -> Any:
            # One graph may serve several blocks, each with weights of its own.
            self.met += [(args[position], record) for position, record in positions]
            self._sampled.note([args[w.position] for w in chosen], chosen, noisy)
            return gm.forward(*args)

        return forward

    def run(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call the model, traced, as it is; keep what Dynamo left."""
        before = torch_internals.not_traced()
        with torch.random.fork_rng():
            torch.compile(model, backend=self)(*args, **kwargs)
        now = torch_internals.not_traced()
        left = (GraphBreak(cause, "") for cause, count in now.items() if count > before.get(cause, 0))
        self._left = list({one.cause: one for one in left}.values())

    def report_of(self, model: Callable[..., Any]) -> Report:
        """The report, with every weight of a module under its own name, those that no graph has too."""
        report = self.report()
        records = list(report.records)
        if isinstance(model, nn.Module):
            root = torch_internals.unwrapped(model)
            names = {id(parameter): clean(name) for name, parameter in root.named_parameters()}
            met = {id(weight) for weight, _ in self.met}
            records = [replace(record, name=names.get(id(weight), record.name)) for weight, record in self.met]
            records += unseen_weights(root, self.config, lambda _, weight: id(weight) in met)
            self.met = []  # the report keeps this tracer, for histograms, but no weight
        return Report(
            records,
            report.bits,
            graphs=report.graphs,
            breaks=[*report.breaks, *self._left],
            settings=self._shown.texts(),
            histograms=self._histograms,
        )


def explained(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], config: Config) -> Report:
    """The report of one call, with every weight of the model; see `gws_compile.explain`."""
    tracer = Tracer(config)
    tracer.run(model, args, kwargs)
    return tracer.report_of(model)


def trainable_weights(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: Config
) -> list[tuple[str, nn.Parameter, int]]:
    """The weights of a model that get noise: name, parameter and `gws_compile.sampling.matrix_shape`'s ``batch_dims``.

    The model is traced on fake tensors: nothing is computed and nothing changes. Graph breaks are followed.

    Args:
        model: wrapped and compiled as it may be.
        args: the call's positional arguments.
        kwargs: its keyword arguments.
        config: what is rewritten.
    """
    model = torch_internals.unwrapped(model)
    mode = torch_internals.fake_mode()

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
    fake_args, fake_kwargs = tree_map_only(torch.Tensor, fake, (args, kwargs))
    with torch.random.fork_rng(), torch.enable_grad(), mode:
        functional_call(compiled, fakes, fake_args, fake_kwargs)
    by_name: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        by_name.setdefault(clean(name), parameter)
    found: dict[str, tuple[str, nn.Parameter, int]] = {}
    for weight in (weight for graph in tracer.graphs for weight in weights_of(graph)):
        if weight.reason is None and weight.trainable and weight.name in by_name:
            found.setdefault(weight.name, (weight.name, by_name[weight.name], weight.reads[0].batch_dims))
    return list(found.values())
