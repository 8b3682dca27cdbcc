"""Tracing a model without compiling it: for `gws_compile.explain` and `Backend.prepare`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from . import torch_internals
from .compiler import Backend
from .config import Config
from .names import clean
from .passes import is_noisy, weights_of
from .report import GraphBreak, Report, WeightRecord


class Tracer(Backend):
    """A backend that rewrites graphs for the record, and runs the model's own."""

    def __init__(self, config: Config) -> None:
        super().__init__(replace(config, inner="eager"))
        self._shown = config

        self._seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._left: list[GraphBreak] = []
        self._unseen: list[WeightRecord] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
        """Rewrite the graph and give back the model's own."""
        super().__call__(gm, example_inputs)
        weights = weights_of(self.graphs[-1])
        for weight in weights:
            self._seen[example_inputs[weight.position]] = True
        chosen = [w for w in weights if w.reason is None]
        tensors = [example_inputs[w.position] for w in chosen]
        self._sampled.note(tensors, chosen, [is_noisy(w, self.config) for w in chosen])
        return gm.forward

    def run(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call the model, traced, as it is; keep what Dynamo left, and the weights that no graph has."""
        before = torch_internals.not_traced()
        with torch.random.fork_rng():
            torch.compile(model, backend=self)(*args, **kwargs)
        now = torch_internals.not_traced()
        left = (GraphBreak(cause, "") for cause, count in now.items() if count > before.get(cause, 0))
        self._left = list({one.cause: one for one in left}.values())
        if isinstance(model, nn.Module):
            self._unseen = [_unseen(name, p) for name, p in self._other_weights(model)]

    def _other_weights(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        known = {record.name for record in self._records}
        for name, parameter in torch_internals.unwrapped(model).named_parameters():
            if parameter.ndim < 2 or not parameter.is_floating_point() or clean(name) in known:
                continue
            if self._seen.get(parameter) is None:  # type: ignore[no-untyped-call]
                yield clean(name), parameter

    def report(self) -> Report:
        """What was rewritten, and what lies outside of every graph."""
        report = super().report()
        return Report(
            [*report.records, *self._unseen],
            report.bits,
            graphs=report.graphs,
            breaks=[*report.breaks, *self._left],
            settings=self._shown.texts(),
            histograms=self._histograms,
        )


def _unseen(name: str, parameter: nn.Parameter) -> WeightRecord:
    return WeightRecord(
        name=name,
        shape=tuple(parameter.shape),
        dtype=str(parameter.dtype).removeprefix("torch."),
        op="",
        rewritten=False,
        reason="in no traced graph: code that Dynamo left uses it, or none did in this call",
        fmt="",
        bits=None,
        noise="",
        location="",
    )


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
