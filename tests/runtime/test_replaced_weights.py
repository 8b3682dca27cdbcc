"""Whatever comes to stand in the place of a weight is that weight: name, draw, learned width, place in checkpoints."""

import copy
import gc

import pytest
import torch
from support.small_models import OneLayer
from support.torch_version import TORCH
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

import gws_compile

FMT = "fp6_e3m2"
EYE = torch.eye(8)


pytestmark = pytest.mark.usefixtures("reset")


def net():
    return OneLayer(8, 8, bias=False)


def used(call, dtype=torch.float32):
    return call(EYE.to(dtype)).detach().t()


def sample(weight, step=0, name="fc.weight"):
    return gws_compile.sample(weight.detach(), FMT, name=name, step=step)


def assign(model):
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)


def new_parameter(model):
    model.fc.weight = nn.Parameter(torch.randn(8, 8))


def data(model):
    model.fc.weight.data = torch.randn(8, 8)


def swap(model):
    if TORCH >= (2, 14):
        pytest.skip("from torch 2.14 on a compiled model's parameters cannot be swapped, whatever the backend")
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def overwrite(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def to_empty(model):
    model.to("meta")
    model.to_empty(device="cpu")
    nn.init.normal_(model.fc.weight)


REPLACED = [assign, new_parameter, data, swap, overwrite, to_empty]


@pytest.mark.parametrize("replace", REPLACED, ids=lambda f: f.__name__)
def test_a_weight_keeps_its_name_and_a_resumed_run_draws_the_same(replace):
    model, backend = net(), gws_compile.backend(FMT, inner="eager")
    compiled = torch.compile(model, backend=backend)
    used(compiled)
    backend.step()
    model.zero_grad()
    replace(model)
    dtype = model.fc.weight.dtype
    assert torch.equal(used(compiled, dtype), sample(model.fc.weight, 1))
    state = backend.state_dict()
    assert state["weights"] == [["fc.weight", [8, 8]]]
    torch._dynamo.reset()
    resumed = gws_compile.backend(FMT, inner="eager")
    resumed.load_state_dict(state)
    assert torch.equal(used(torch.compile(copy.deepcopy(model), backend=resumed), dtype), sample(model.fc.weight, 1))


@pytest.mark.parametrize("how", ["module", "function"])
def test_functional_call_with_tensors_of_each_call(how):
    model, backend = net(), gws_compile.backend(FMT, inner="eager")
    compiled = torch.compile(model if how == "module" else lambda x: model(x), backend=backend)
    prefix = "_orig_mod." if how == "module" else ""
    target = compiled if how == "module" else model
    graphs = None
    for call in range(20):
        fast = {f"{prefix}fc.weight": torch.randn(8, 8, requires_grad=True)}
        if how == "module":
            got = functional_call(target, fast, (EYE,))
        else:
            with torch.nn.utils.stateless._reparametrize_module(model, fast):
                got = compiled(EYE)
        weight = fast[f"{prefix}fc.weight"]
        assert torch.equal(got.detach().t(), sample(weight))
        got.sum().backward()
        assert torch.equal(weight.grad, torch.ones(8, 8))
        graphs = graphs or len(backend.graphs)
        assert len(backend.graphs) == graphs
        with torch.no_grad():  # an average of weights, say
            assert torch.equal(
                functional_call(compiled, {f"{prefix}fc.weight": weight.detach()}, (EYE,)).t()
                if how == "module"
                else sample(weight) * 0 + gws_compile.quantize(weight.detach(), FMT),
                gws_compile.quantize(weight.detach(), FMT),
            )
        graphs = len(backend.graphs) if call == 0 else graphs
    assert backend.state_dict()["weights"] == [["fc.weight", [8, 8]]]
    assert [r.name for r in backend.report().rewritten] == ["fc.weight"]


def test_nothing_grows_with_the_calls():
    model, backend = net(), gws_compile.backend(FMT, inner="eager")
    compiled = torch.compile(model, backend=backend)

    def calls(count):
        for _ in range(count):
            functional_call(compiled, {"_orig_mod.fc.weight": torch.randn(8, 8, requires_grad=True)}, (EYE,))
            backend.step()
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects() if type(thing) is torch.Tensor)

    calls(20)
    assert calls(100) == calls(100)


def test_a_tied_weight_that_is_untied_and_tied_again():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(x), self.b(x)

    model, backend = Tied(), gws_compile.backend(FMT, inner="eager")
    compiled = torch.compile(model, backend=backend)
    for name_of_b, change in (("a.weight", None), ("b.weight", nn.Parameter(torch.randn(8, 8))), ("a.weight", "tie")):
        if change is not None:
            model.b.weight = model.a.weight if change == "tie" else change
        a, b = compiled(EYE)
        assert torch.equal(a.detach().t(), sample(model.a.weight, name="a.weight"))
        assert torch.equal(b.detach().t(), sample(model.b.weight, name=name_of_b))


@pytest.mark.parametrize("gone", [False, True])
def test_a_copy_is_a_weight_of_its_own_and_a_resumed_run_draws_as_it_did(gone):
    model, backend = net(), gws_compile.backend(FMT, inner="eager")
    used(torch.compile(model, backend=backend))
    copied = copy.deepcopy(model)
    if gone:
        del model
        torch._dynamo.reset()
    assert torch.equal(used(torch.compile(copied, backend=backend)), sample(copied.fc.weight, name="fc.weight#1"))
    state = backend.state_dict()
    assert [name for name, _ in state["weights"]] == (["fc.weight#1"] if gone else ["fc.weight", "fc.weight#1"])
    torch._dynamo.reset()
    resumed = gws_compile.backend(FMT, inner="eager")
    resumed.load_state_dict(state)
    if not gone:
        assert torch.equal(used(torch.compile(model, backend=resumed)), sample(model.fc.weight))
    assert torch.equal(used(torch.compile(copied, backend=resumed)), sample(copied.fc.weight, name="fc.weight#1"))


def learned(**settings):
    return gws_compile.backend(bits=gws_compile.LearnedBits(**settings), inner="eager", block=(4, 4))


def train(compiled, model, backend, steps=5):
    optimizer = torch.optim.Adam([{"params": [*model.parameters()]}, {"params": [*backend.parameters()], "lr": 0.05}])
    for _ in range(steps):
        optimizer.zero_grad()
        (compiled(torch.randn(4, 8)).square().sum() + backend.bit_loss()).backward()
        optimizer.step()


@pytest.mark.parametrize("replace", REPLACED, ids=lambda f: f.__name__)
def test_learned_widths_stay(replace):
    model, backend = net(), learned()
    backend.prepare(model, EYE)
    compiled = torch.compile(model, backend=backend)
    train(compiled, model, backend)
    (parameter,) = backend.parameters()
    before = parameter.detach().clone()
    model.zero_grad()
    replace(model)
    compiled(EYE.to(model.fc.weight.dtype)).sum().backward()
    (now,) = backend.parameters()
    assert now is parameter
    assert torch.equal(now, before)
    assert now.grad is not None
    assert list(backend.bits()) == ["fc.weight"]
    assert [name for name, _ in backend.state_dict()["weights"]] == ["fc.weight"]


@pytest.mark.parametrize("how", ["deep copy", "averaged"])
def test_a_copy_that_is_evaluated_is_cast_with_the_trained_widths(how):
    model, backend = net(), learned()
    compiled = torch.compile(model, backend=backend)
    backend.prepare(model, EYE)
    train(compiled, model, backend, steps=30)
    copied = copy.deepcopy(model) if how == "deep copy" else AveragedModel(model)
    with torch.no_grad():
        assert torch.equal(used(torch.compile(copied, backend=backend)), used(compiled))
    assert len(list(backend.parameters())) == 1
    assert backend.bit_loss().item() == pytest.approx((backend.bits()["fc.weight"] - 4).abs().mean().item())


def test_a_copy_that_is_trained_starts_with_the_widths_of_its_original():
    model, backend = net(), learned()
    compiled = torch.compile(model, backend=backend)
    backend.prepare(model, EYE)
    train(compiled, model, backend, steps=30)
    copied = copy.deepcopy(model)
    again = torch.compile(copied, backend=backend)
    again(EYE).sum().backward()
    bits = backend.bits()
    assert list(bits) == ["fc.weight", "fc.weight#1"]
    assert torch.equal(bits["fc.weight"], bits["fc.weight#1"])
    train(again, copied, backend)
    with torch.no_grad():  # its own now
        assert torch.equal(used(again), gws_compile.quantize(copied.fc.weight.detach(), "bf16") * 0 + used(again))
    assert not torch.equal(*backend.bits().values())


def test_prepared_on_the_meta_device():
    with torch.device("meta"):
        model = net()
    backend = learned()
    backend.prepare(model, torch.empty(4, 8, device="meta"))
    (parameter,) = backend.parameters()
    assert parameter.device.type == "cpu"
    model.to_empty(device="cpu")
    nn.init.normal_(model.fc.weight)
    train(torch.compile(model, backend=backend), model, backend)
    assert [p is parameter for p in backend.parameters()] == [True]
    assert parameter.grad is not None


@pytest.mark.parametrize(
    ("begin", "model_too", "copy_stays"),
    [("", False, True), ("prepared", True, True), ("resumed", False, False), ("resumed and prepared", True, False)],
)
def test_a_copy_that_is_evaluated_before_the_first_step_takes_no_name(fresh, begin, model_too, copy_stays):
    prepared, resumed = "prepared" in begin, "resumed" in begin
    saved = {}
    if resumed:
        model, backend = net(), learned()
        backend.prepare(model, EYE)
        train(torch.compile(model, backend=backend), model, backend)
        saved = {"model": model.state_dict(), "backend": backend.state_dict()}

    def run(evaluate):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, backend, copied = net(), learned(), None
        compiled = torch.compile(model, backend=backend)
        if resumed:
            model.load_state_dict(saved["model"])
            backend.load_state_dict(saved["backend"])
        if prepared:
            backend.prepare(model, EYE)
        if evaluate:
            copied = copy.deepcopy(compiled)
            with torch.no_grad():
                casts = [copied(EYE)]
                if model_too:
                    casts.append(compiled(EYE))
                assert all(torch.equal(cast, casts[0]) for cast in casts)
            if not copy_stays:
                copied = None
                gc.collect()
        compiled(EYE).sum().backward()  # where nothing was prepared, the widths are there from here on
        losses = []
        for step in range(3):
            torch.manual_seed(step)
            train(compiled, model, backend, steps=1)
            losses.append(backend.bit_loss().item())
        with torch.no_grad():
            cast = compiled(EYE)
            if copied is not None:
                copied.load_state_dict(compiled.state_dict())
                assert torch.equal(copied(EYE), cast)
        assert list(backend.bits()) == ["fc.weight"]
        return [*losses, *(p.detach() for p in model.parameters()), backend.bits()["fc.weight"], cast]

    for one, other in zip(run(False), run(True), strict=True):
        assert one == other if isinstance(one, float) else torch.equal(one, other)


def test_two_models_that_are_evaluated_behind_a_resume_have_their_own_widths(fresh):
    one, two, backend = net(), net(), learned()
    for model in (one, two):
        backend.prepare(model, EYE)
    bits = dict(zip(("one", "two"), backend.parameters(), strict=True))
    for parameter, value in zip(bits.values(), (0.5, 0.75), strict=True):
        parameter.data.fill_(value)
    for model in (one, two):
        torch.compile(model, backend=backend)(EYE).sum().backward()
    state = backend.state_dict()
    torch._dynamo.reset()
    backend = learned()
    backend.load_state_dict(state)
    with torch.no_grad():
        for model in (one, two):
            torch.compile(model, backend=backend)(EYE)
    for model in (one, two):
        torch.compile(model, backend=backend)(EYE).sum().backward()
    assert {name: p.unique().item() for name, p in backend.named_parameters()} == {
        "fc.weight.bits": 0.5, "fc.weight#1.bits": 0.75
    }  # fmt: skip
