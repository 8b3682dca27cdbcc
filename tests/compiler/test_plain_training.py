"""Weights that are trained without noise are said, at the latest with the first optimizer step."""

import gc
import warnings

import pytest
import torch
from support.small_models import traces_own_modules
from torch import nn

import gws_compile
from gws_compile.compiler.diagnostics import MANY_STEPS, Diagnostics, GivenModules
from gws_compile.config import Config
from gws_compile.runtime.weight_slots import WeightSlots

FMT = "fp4_e2m1"


pytestmark = pytest.mark.usefixtures("reset")


def said_by_training(model, call, x, steps=1):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            call(x).square().sum().backward()
            optimizer.step()
    return [str(w.message) for w in caught if issubclass(w.category, gws_compile.GwsWarning)]


class Recurrent(nn.Module):
    """torch leaves its frame; nothing else of it is traced, either."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


@pytest.mark.parametrize("how", ["torch.compile", "Module.compile"])
def test_a_model_of_which_nothing_is_sampled(how):
    model, backend = Recurrent(), gws_compile.backend(FMT, inner="eager")
    call = torch.compile(model, backend=backend)
    if how == "Module.compile":
        model.compile(backend=backend)
        call = model
    x = torch.randn(3, 2, 8)
    said = said_by_training(model, call, x)
    assert any("trained without noise" in text and "rnn.weight_ih_l0, rnn.weight_hh_l0" in text for text in said)
    reasons = {r.name: r.reason for r in backend.report()}
    assert list(reasons) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "out.weight"]
    assert "torch does not trace LSTM unless" in reasons["rnn.weight_ih_l0"]
    assert said_by_training(model, call, x, steps=60) == []  # once
    del model, call
    torch._dynamo.reset()
    gc.collect()
    assert {r.name: r.reason for r in backend.report()} == reasons  # when the model has gone


def test_a_backend_without_a_step_lists_the_model_too():
    backend = gws_compile.backend(FMT, inner="eager")
    model = Recurrent()
    compiled = torch.compile(model, backend=backend)
    compiled(torch.randn(3, 2, 8))
    assert [r.name for r in backend.report()] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "out.weight"]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Linear(8, 8), "Linear"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), "Sequential"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), "TransformerEncoderLayer"),
    ],
    ids=["a leaf", "a container", "a layer"],
)
def test_modules_of_torch_that_are_compiled_in_place(make, name):
    module, backend = make(), gws_compile.backend(FMT, inner="eager")
    module.compile(backend=backend)
    said = said_by_training(module, module, torch.randn(2, 3, 8))
    if traces_own_modules():
        assert said == []
        assert backend.report().rewritten
        return
    assert len(said) == 1
    assert f"torch traces no frame of its own modules, and {name} had module.compile(backend=...) called" in said[0]
    torch._dynamo.reset()
    other = gws_compile.backend(FMT, inner="eager")
    again = make()
    assert said_by_training(again, torch.compile(again, backend=other), torch.randn(2, 3, 8)) == []  # the remedy
    assert other.report().rewritten


class Foreign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


@torch.library.custom_op("gws_test_plain::product", mutates_args=())
def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.t()


product.register_fake(lambda x, w: x @ w.t())
product.register_autograd(
    lambda ctx, grad: (grad @ ctx.saved[1], grad.t() @ ctx.saved[0]),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "saved", inputs),
)


READS = {
    "autograd.Function": lambda x, w: Foreign.apply(x, w),
    "custom operator": lambda x, w: product(x, w),
    "computed": lambda x, w: x @ (w * w.abs()).t(),
}


class Reads(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.first, self.big, self.how = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8)), how

    def forward(self, x):
        return READS[self.how](self.first(x), self.big)


@pytest.mark.parametrize("how", READS)
def test_a_weight_that_a_graph_reads_in_another_way(how):
    model, backend = Reads(how), gws_compile.backend(FMT, inner="aot_eager")
    said = said_by_training(model, torch.compile(model, backend=backend), torch.randn(4, 8), steps=2)
    assert len(said) == 1
    assert "trained without noise, though a compiled graph may multiply by them: big: " in said[0]
    torch._dynamo.reset()
    strict = gws_compile.backend(FMT, inner="aot_eager", strict=True, include=["*"])
    with pytest.raises(Exception, match="big"):
        torch.compile(Reads(how), backend=strict)(torch.randn(4, 8))
    torch._dynamo.reset()
    backend = gws_compile.backend(FMT, inner="aot_eager", exclude=["big"])
    model = Reads(how)
    assert said_by_training(model, torch.compile(model, backend=backend), torch.randn(4, 8)) == []


def test_what_is_no_read_is_not_said():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.pos, self.table = nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8)), nn.Embedding(4, 8)

        def forward(self, x):
            return self.fc(x + self.pos + self.table(torch.arange(4)))

    model, backend = Model(), gws_compile.backend(FMT, inner="eager")
    assert said_by_training(model, torch.compile(model, backend=backend), torch.randn(4, 8)) == []


class Partly(nn.Module):
    """Two layers that run eagerly, before and behind a compiled one."""

    def __init__(self):
        super().__init__()
        self.before, self.body, self.behind = nn.Linear(8, 8), Reads("autograd.Function"), nn.Linear(8, 8)

    def forward(self, x):
        return self.behind(self.body(self.before(x)))


@pytest.mark.parametrize("strict", [False, True])
def test_optimizers_that_step_inside_backward_and_drop_the_gradients(strict):
    """No optimizer's step sees more gradients than its own: what they have seen is said together, behind backward."""
    model = Partly()
    settings = {"strict": True, "include": ["*.weight"]} if strict else {}
    model.body.compile(backend=gws_compile.backend(FMT, inner="aot_eager", **settings))
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    if strict:
        with pytest.raises(ValueError, match=r"strict=True: .* graph has them: before.weight, behind.weight"):
            model(torch.randn(4, 8)).square().mean().backward()
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(torch.randn(4, 8)).square().mean().backward()
    said = [str(w.message) for w in caught if issubclass(w.category, gws_compile.GwsWarning)]
    assert len(said) == 2
    assert "no compiled graph has them: before.weight, behind.weight. Part of" in said[0]
    assert "though a compiled graph may multiply by them: body.big: " in said[1]


def test_steps_of_several_optimizers_are_counted_as_one():
    """With sixty optimizers a first training step is no fifty steps."""
    backend = gws_compile.backend("e3m5", inner="eager")
    waiting = torch.compile(Reads("computed"), backend=backend)
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(60)]
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in parameters]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*this backend \(fp9_e3m5\)")
        for _ in range(MANY_STEPS - 1):
            for optimizer in optimizers:
                optimizer.step()
    with pytest.warns(gws_compile.GwsWarning, match=rf"{MANY_STEPS} optimizer steps, .* \(fp9_e3m5\) has"):
        optimizers[0].step()
    assert waiting is not None


def test_a_backend_that_nothing_goes_through_looks_ever_less_often():
    """At all objects of the process, for models that were given to it: under gws run it may stand by for good."""
    looks, optimizer = [], torch.optim.SGD([torch.zeros(1)])
    diagnostics = Diagnostics(Config.make(FMT), WeightSlots(), lambda: looks.append(step) or GivenModules())
    for step in range(1000):  # noqa: B007  (the function above reads it)
        diagnostics.optimizer_stepped(optimizer)
    assert looks == [0, 50, 100, 200, 400, 800]
