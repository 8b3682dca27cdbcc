"""A weight has the name that the module that holds it gives it, whatever way Dynamo reaches it."""

import warnings

import pytest
import torch
from support.small_models import OneLayer
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import gws_compile

FMT = "fp4_e2m1"


pytestmark = pytest.mark.usefixtures("reset")


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 8)

    def forward(self, x):
        return self.lm_head(self.second(self.first(x)))


class OwnGetattr(Base):
    def __getattr__(self, name):
        return super().__getattr__(name)


class SetsAttribute(Base):
    mask = None

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones(1)
        return super().forward(x)


class ReadsDict(Base):
    def forward(self, x):
        for name in ("first", "second", "lm_head"):
            x = self.__dict__["_modules"][name](x)
        return x


class ThroughLists(Base):
    """Reached through plain containers that are no modules."""

    def __init__(self):
        super().__init__()
        self.plain = {"parts": [self.first, (self.second, self.lm_head)]}

    def forward(self, x):
        first, (second, head) = self.plain["parts"]
        return head(second(first(x)))


class Broken(Base):
    """The rest of the frame is resumed, with what is on its stack."""

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        x = self.second(x)
        torch._dynamo.graph_break()
        return self.lm_head(x)


class BrokenInside(Base):
    """Each layer is a frame of its own, whose source has no component of the layer."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            torch._dynamo.graph_break()
            return x @ self.weight.t()

    def __init__(self):
        super().__init__()
        self.first, self.second, self.lm_head = (BrokenInside.Layer() for _ in range(3))


MODELS = [Base, OwnGetattr, SetsAttribute, ReadsDict, ThroughLists, Broken, BrokenInside]


@pytest.mark.parametrize("compiled", ["module", "function", "in place"])
@pytest.mark.parametrize("kind", MODELS)
def test_names(kind, compiled):
    """Report, default exclusion of output heads, ``include``, and the names that are drawn by."""
    for settings, sampled in (({}, ["first.weight", "second.weight"]), ({"include": ["second.*"]}, ["second.weight"])):
        torch._dynamo.reset()
        model, backend = kind(), gws_compile.backend(FMT, inner="eager", **settings)
        if compiled == "in place":
            model.compile(backend=backend)
            call = model
        else:
            call = torch.compile(model if compiled == "module" else lambda x: model(x), backend=backend)  # noqa: B023
        with warnings.catch_warnings():
            if settings and kind in (Broken, BrokenInside):  # graphs come one by one
                warnings.simplefilter("ignore", gws_compile.GwsWarning)
            call(torch.randn(4, 8, requires_grad=True)).sum().backward()
        report = backend.report()
        assert sorted(r.name for r in report) == ["first.weight", "lm_head.weight", "second.weight"]
        assert sorted(r.name for r in report.rewritten) == sampled
        assert sorted(name for name, _ in backend.state_dict()["weights"]) == sampled


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.fc(x)


def test_a_child_that_is_called_module():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.fc = Inner(), nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.fc(self.module(x))

    backend = gws_compile.backend(FMT, inner="eager", include=["module.*"])
    model = Outer()
    out = torch.compile(model, backend=backend)(torch.eye(8))
    sampled = gws_compile.sample(model.module.fc.weight.detach(), FMT, name="module.fc.weight")
    assert torch.equal(out, F.linear(F.linear(torch.eye(8), sampled), model.fc.weight))
    assert {r.name: r.rewritten for r in backend.report()} == {"module.fc.weight": True, "fc.weight": False}
    assert list(backend.metrics()) == ["module.fc.weight"]


def test_a_wrapper_puts_nothing_into_a_name():
    backend = gws_compile.backend(FMT, inner="eager")
    torch.compile(nn.DataParallel(Inner()), backend=backend)(torch.eye(8))
    torch._dynamo.reset()
    torch.compile(AveragedModel(Inner()), backend=backend)(torch.eye(8))
    assert [r.name for r in backend.report()] == ["fc.weight", "fc.weight#1"]


@pytest.mark.parametrize("name", ["it's", 'say "w"', "a[0]", "x['y']", "m_parameters['z']", "#1"])
def test_odd_names(name):
    model = nn.ModuleDict({name: nn.Linear(8, 8, bias=False)})
    backend = gws_compile.backend(FMT, inner="eager")
    out = torch.compile(lambda x: model[name](x), backend=backend)(torch.eye(8))
    assert torch.equal(out.detach().t(), gws_compile.sample(model[name].weight.detach(), FMT, name=f"{name}.weight"))
    assert [r.name for r in backend.report()] == [f"{name}.weight"]


def test_weights_that_end_alike_are_told_apart():
    """One that no graph has is named, although a graph knows one whose whole name is the end of its name."""

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)

        def forward(self, x):
            return x @ self.weight.t()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.middle = Frozen(), nn.Linear(8, 8)

        def forward(self, x):
            return self.middle(self.base(x))

    model, backend = Model(), gws_compile.backend(FMT, inner="eager")
    model.base.compile(backend=backend)
    optimizer = torch.optim.SGD(model.middle.parameters(), lr=0.1)
    model(torch.randn(4, 8)).sum().backward()
    with pytest.warns(gws_compile.GwsWarning, match=r"since no compiled graph has them: middle\.weight\."):
        optimizer.step()
    assert [r.name for r in backend.report()] == ["base.weight", "middle.weight"]


class Blocks(nn.Module):
    """Two layers without a bias, each of which can be compiled by itself."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([OneLayer(12, 12, bias=False) for _ in range(2)])

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


def _looks_at_the_report(model, backend, x):
    assert [record.name for record in backend.report()] == ["fc.weight", "fc.weight#1"]


def _another_optimizer_steps(model, backend, x):
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()


def _evaluates_a_block(model, backend, x):
    with torch.no_grad():
        model.blocks[0](x)


def _prepares_a_block(model, backend, x):
    backend.prepare(model.blocks[1], x)


@pytest.mark.parametrize("by", ["torch.compile", "Module.compile"])
@pytest.mark.parametrize(
    "before", [_looks_at_the_report, _another_optimizer_steps, _evaluates_a_block, _prepares_a_block]
)
def test_names_are_those_of_the_model_whatever_comes_before_the_first_draw(before, by):
    """A block that is compiled by itself is outermost as long as the model around it has not been called."""
    model, x, backend = Blocks(), torch.eye(12), gws_compile.backend(FMT, inner="eager")
    first, second = (gws_compile.sample(b.fc.weight.detach(), FMT, name=f"blocks.{i}.fc.weight")
                     for i, b in enumerate(model.blocks))  # fmt: skip
    for i, block in enumerate(model.blocks):
        if by == "torch.compile":
            model.blocks[i] = torch.compile(block, backend=backend)
        else:
            block.compile(backend=backend)
    before(model, backend, x)
    y = model(x)
    y.sum().backward()
    assert torch.equal(y, (x @ first.t()) @ second.t())
    assert [name for name, _ in backend.state_dict()["weights"]] == ["blocks.0.fc.weight", "blocks.1.fc.weight"]
    assert {record.name for record in backend.report().rewritten} == {"blocks.0.fc.weight", "blocks.1.fc.weight"}


@pytest.mark.parametrize("before", ["a report", "evaluations of the blocks"])
def test_a_weight_that_blocks_share_is_one_whatever_comes_before_the_first_draw(before):
    """No block by itself shows the tie."""
    model, x, backend = Blocks(), torch.eye(12), gws_compile.backend(FMT, inner="eager")
    model.blocks[1].fc.weight = model.blocks[0].fc.weight
    sample = gws_compile.sample(model.blocks[0].fc.weight.detach(), FMT, name="blocks.0.fc.weight")
    for block in model.blocks:
        block.compile(backend=backend)
    if before == "a report":
        assert len(backend.report()) == 2
    else:
        with torch.no_grad():
            [block(x) for block in model.blocks]
    y = model(x)
    y.sum().backward()
    assert torch.equal(y, (x @ sample.t()) @ sample.t())
    assert [name for name, _ in backend.state_dict()["weights"]] == ["blocks.0.fc.weight"]
    assert {record.name for record in backend.report()} == {"blocks.0.fc.weight"}
