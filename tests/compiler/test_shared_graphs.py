"""One graph that serves many layers, or several models: each weight under its own name, and by its own settings."""

import copy
import gc

import pytest
import torch
from support.small_models import Product
from torch import nn

import gws_compile

FMT = "fp4_e2m1"


pytestmark = pytest.mark.usefixtures("reset")


class Stack(nn.Module):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            setattr(self, name, Product(8))

    def forward(self, x):
        for _, layer in self.named_children():
            torch._dynamo.graph_break()
            x = layer(x)
        return x


def reference(model, x, sampled):
    """The model with the sampled weights in their places, by their names there: output, and the weights it took."""
    values = {
        name: (gws_compile.sample(p.detach(), FMT, name=name) if name in sampled else p.detach().clone())
        for name, p in model.named_parameters()
    }
    values = {name: value.requires_grad_() for name, value in values.items()}
    out = x
    for name in values:
        out = out @ values[name].t()
    return out, values


@pytest.mark.filterwarnings("ignore:.* so far:gws_compile.GwsWarning")  # of the first layer's graph
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize(
    ("settings", "sampled"),
    [
        ({}, ["first.weight", "second.weight"]),
        ({"include": ["second.*"]}, ["second.weight"]),
        ({"exclude": ["first.*"]}, ["second.weight", "lm_head.weight"]),
    ],
    ids=["default", "include", "exclude"],
)
def test_layers_of_one_graph_are_chosen_by_their_own_names(settings, sampled, inner):
    model = Stack("first", "second", "lm_head")
    backend = gws_compile.backend(FMT, inner=inner, **settings)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        x = torch.randn(4, 8, requires_grad=True)
        want, values = reference(model, x, sampled)
        out = compiled(x)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        want.square().sum().backward()
        x.grad = None
        model.zero_grad()
        out.square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, values[name].grad, rtol=1e-5, atol=1e-4)
    report = backend.report()
    assert [r.name for r in report] == ["first.weight", "second.weight", "lm_head.weight"]
    assert [r.name for r in report.rewritten] == sampled
    assert [name for name, _ in backend.state_dict()["weights"]] == sampled
    assert [(r.name, r.rewritten) for r in gws_compile.explain(copy.deepcopy(model), x, backend=backend)] == [
        (r.name, r.rewritten) for r in report
    ]


@pytest.mark.parametrize("gone", [False, True])
def test_two_models_of_one_shape_are_listed_each(gone):
    def net():
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    backend = gws_compile.backend(FMT, inner="eager", exclude=["2.*"])
    models = [net(), net()]
    for model in models:
        torch.compile(model, backend=backend)(torch.randn(4, 8)).sum().backward()
    if gone:
        del model, models
        torch._dynamo.reset()
        gc.collect()
    report = backend.report()
    assert [(r.name, r.rewritten) for r in report] == [
        ("0.weight", True), ("2.weight", False), ("0.weight#1", True), ("2.weight#1", False)
    ]  # fmt: skip
    assert "2 of 4 weights rewritten" in str(report)


def test_blocks_that_are_compiled_one_by_one_are_counted_each():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Product(8) for _ in range(30))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, backend = Blocks(), gws_compile.backend(FMT, inner="eager")
    for layer in model.layers:
        layer.compile(backend=backend)
    model(torch.randn(2, 8, requires_grad=True))
    assert len(backend.graphs) == 1
    report = backend.report()
    assert [r.name for r in report.rewritten] == [f"layers.{i}.weight" for i in range(30)]
    assert [name for name, _ in backend.state_dict()["weights"]] == [f"layers.{i}.weight" for i in range(30)]
    assert list(backend.metrics()) == [f"layers.{i}.weight" for i in range(30)]
