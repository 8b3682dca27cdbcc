"""Functional code inside a model: functional_call, vmap, grad."""

import pytest
import torch
import torch.nn.functional as F
from support.eager import gradients
from support.oracle import sample
from torch import nn
from torch.func import functional_call, grad, vmap

import gws_compile
from gws_compile.numerics.keys import key_words


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return functional_call(self.inner, dict(self.inner.named_parameters()), (x,))


class Mapped(Functional):
    def forward(self, x):
        return vmap(self.inner)(x)


class GradientByInput(Functional):
    def forward(self, x):
        return grad(lambda x: self.inner(x).pow(3).sum())(x)


class GradientByWeights(Functional):
    """The weights inside and outside of the differentiated function are the same sample."""

    def forward(self, x):
        def loss(parameters):
            return functional_call(self.inner, parameters, (x,)).pow(3).sum()

        by_weight = grad(loss)(dict(self.inner.named_parameters()))
        return by_weight["weight"] + self.inner(x).sum()


class PerSampleGradients(Functional):
    def forward(self, x):
        def loss(weight, x):
            return F.linear(x, weight).pow(3).sum()

        return vmap(grad(loss), in_dims=(None, 0))(self.inner.weight, x) + self.inner.bias


class Ensemble(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x):
        return vmap(F.linear, in_dims=(None, 0))(x, self.weight)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Functional, ["inner.weight"]),
        (Mapped, ["inner.weight"]),
        (GradientByInput, ["inner.weight"]),
        (GradientByWeights, ["inner.weight"]),
        (PerSampleGradients, ["inner.weight"]),
        (Ensemble, ["weight"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_transforms(kind, names, inner):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 8)
    backend = gws_compile.backend("fp4_e2m1", inner=inner)
    loss = torch.compile(model, backend=backend, fullgraph=True)(x).square().sum()
    loss.backward()
    assert [r.name for r in backend.report().rewritten] == names
    # One sample for all: nothing reads the plain weight beside it.
    for node in backend.graphs[0].graph.find_nodes(op="placeholder"):
        if node.target.endswith("weight_"):
            assert [user.target for user in node.users] == [torch.ops.gws.sample_weight.default]
    expected, grads = gradients(model, lambda call: call(x).square().sum(), names, "fp4_e2m1", 0)
    torch.testing.assert_close(loss.item(), expected, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-5, atol=1e-5)


def test_each_convolution_of_an_ensemble_has_blocks_of_its_own():
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 2, 3))

        def forward(self, x):
            return vmap(F.conv1d)(x, self.weight)

    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Convolutions(), torch.randn(3, 5, 2, 8)
    compiled = torch.compile(model, backend=gws_compile.backend("fp4_e2m1", inner="eager"), fullgraph=True)
    members = model.weight.detach()
    sampled = sample(members.flatten(2), "fp4_e2m1", key=key_words(0, "weight"), batch_dims=1).view_as(members)
    assert torch.equal(compiled(x), vmap(F.conv1d)(x, sampled))


@pytest.mark.filterwarnings("ignore:no weight has been rewritten:gws_compile.GwsWarning")
def test_mapping_over_another_dim_is_said():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 8))

        def forward(self, x):
            return vmap(F.linear, in_dims=(None, 1))(x, self.weight)

    torch._dynamo.reset()
    backend = gws_compile.backend(inner="eager")
    torch.compile(Other(), backend=backend, fullgraph=True)(torch.randn(4, 8))
    (record,) = backend.report().skipped
    assert record.reason.startswith("computed with before linear reads it: _add_batch_dim at ")
