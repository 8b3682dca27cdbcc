"""Under `gws run` every way of asking for the default compiler gets this backend, and nothing else does."""

import functools
import warnings

import pytest
import torch
from support import eager
from support.accumulation import loss_of, train
from support.small_models import Net

import gws_compile
from gws_compile.command_line.named_backend import stands_for
from gws_compile.command_line.torch_compile_patch import CompileCall, CompileCalls, TorchCompilePatch
from gws_compile.compiler.backend import Backend
from gws_compile.config import Config
from gws_compile.torch_internals import compilers

FILE = "tests/command_line/test_torch_compile_patch.py"


def double(x):
    return x * 2


@pytest.fixture
def patch():
    torch._dynamo.reset()
    torch.manual_seed(0)
    patch = TorchCompilePatch(Backend(Config.make("fp6_e3m2", inner="aot_eager")), CompileCalls())
    original = torch.compile
    patch.install()
    yield patch
    patch.remove()
    assert torch.compile is original


@pytest.fixture
def asked(monkeypatch):
    """The arguments that reach torch.compile, as they would be without compiling anything."""
    seen = []

    def recorder(model=None, **kwargs):
        seen.append((model, kwargs))
        return model

    monkeypatch.setattr(torch, "compile", recorder)
    patch = TorchCompilePatch(Backend(Config.make()), CompileCalls())
    patch.install()
    yield seen, patch
    patch.remove()


def in_place(model):
    model.compile(dynamic=False)
    return model


def decorated(model):
    @torch.compile
    def call(x):
        return model(x)

    return call


def decorated_with_arguments(model):
    @torch.compile(fullgraph=True)
    def call(x):
        return model(x)

    return call


WAYS = {
    "function": lambda model: torch.compile(model),
    "by name": lambda model: torch.compile(model, backend="inductor"),
    "in place": in_place,
    "decorator": decorated,
    "decorator with arguments": decorated_with_arguments,
    "partial": lambda model: functools.partial(torch.compile, dynamic=False)(model),
    "imported": lambda model: __import__("torch", fromlist=["compile"]).compile(model),
    "torch.compiler": lambda model: torch.compiler.compile(model),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_run_is_that_of_the_oracle(way, patch):
    """Two micro-batches for each of three optimizer steps: one sample a step, that of `gws_compile.sample`."""
    model, oracle = Net(), Net()
    oracle.load_state_dict(model.state_dict())
    batches = [[torch.randn(8, 40) for _ in range(2)] for _ in range(3)]
    losses = train(WAYS[way](model), model, batches)
    expected = eager.train(oracle, batches, loss_of, ["up.weight", "down.weight"], "fp6_e3m2")
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    ((call, number),) = patch.calls.seen.items()
    assert number == 1
    assert call.taken
    assert FILE in call.where or call.where.startswith("test_torch_compile_patch.py")


def test_other_arguments_are_kept(asked):
    seen, patch = asked
    model, options = Net(), {"max_autotune": True}
    torch.compile(model, fullgraph=True, dynamic=False, options=options)
    model.compile(mode="max-autotune")
    torch.compile(mode="reduce-overhead", backend="inductor")
    backend = patch.backend
    assert seen[0] == (model, {"fullgraph": True, "dynamic": False, "options": options, "backend": backend})
    assert seen[1] == (model._call_impl, {"mode": "max-autotune", "backend": backend})
    assert seen[2] == (None, {"mode": "reduce-overhead", "backend": backend})
    assert [call.target for call in patch.calls.seen] == ["Net", "Net"]  # the third is a decorator without function


def test_what_only_inductor_takes_is_dropped_for_another_compiler(patch):
    """`mode` and `options` of the script, with a warning that names them; the script runs."""
    model, x = Net(), torch.randn(2, 40)
    said = r"torch.compile of Net at .*_compile_patch.py:\d+ asks for mode='max-autotune', which only Inductor has"
    with pytest.warns(gws_compile.GwsWarning, match=said):
        compiled = torch.compile(model, mode="max-autotune", dynamic=False)
    compiled(x).sum().backward()
    with pytest.warns(gws_compile.GwsWarning, match=r"options={'epilogue_fusion': True}, .* --inner is 'aot_eager'"):
        Net().compile(options={"epilogue_fusion": True})
    with pytest.warns(gws_compile.GwsWarning, match="of a function at .* asks for mode='reduce-overhead'"):
        decorated = torch.compile(mode="reduce-overhead")(lambda v: model(v))
    decorated(x)
    assert len(patch.backend.graphs) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(Net(), mode="default")(x)


def test_other_backends_are_left_alone_and_said(asked):
    seen, patch = asked
    own = gws_compile.backend(inner="eager")
    with pytest.warns(
        gws_compile.GwsWarning, match=r"of Net at .*test_torch_compile_patch.py:\d+ is left alone: .*'cudagraphs'"
    ):
        torch.compile(Net(), backend="cudagraphs")
    with pytest.warns(gws_compile.GwsWarning, match="the script names backend=double"):
        torch.compile(Net(), backend=double)
    with pytest.warns(gws_compile.GwsWarning, match="the script names options={'use_aoti': True}"):
        torch.compile(Net(), options={"use_aoti": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(Net(), backend="gws")
        torch.compile(Net(), backend=own)
        torch.compile(Net(), disable=True)
    assert [kwargs.get("backend") for _, kwargs in seen] == ["cudagraphs", double, None, "gws", own, None]
    calls = patch.calls
    assert [call.reason for call in calls.left] == [
        "backend='cudagraphs'",
        "backend=double",
        "options={'use_aoti': True}",
        "disable=True",
    ]
    assert [call.reason for call in calls.taken] == [
        "backend='gws' in the script",
        "a gws backend of the script's own",
    ]
    assert calls.own == [own]


def test_a_default_backend_of_the_script_is_left_alone(asked):
    if not hasattr(torch.compiler, "set_default_backend"):
        pytest.skip("this torch has no default backend to set")
    seen, _ = asked
    torch.compiler.set_default_backend("aot_eager")
    try:
        with pytest.warns(gws_compile.GwsWarning, match="names backend='aot_eager'"):
            torch.compile(double)
    finally:
        torch.compiler.set_default_backend(None)
    assert seen == [(double, {})]


def test_calls_of_this_package_are_not_the_scripts(patch):
    report = gws_compile.explain(Net(), torch.randn(2, 40), fmt="fp8_e4m3")
    assert [r.fmt for r in report.rewritten] == ["fp8_e4m3"] * 2
    assert not patch.calls.seen


def test_compiled_optimizer_step_and_loss_run_as_they_are(patch):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    step = torch.compile(optimizer.step)
    before = model.up.weight.detach().clone()
    torch.compile(loss_of)(double, torch.randn(3, requires_grad=True)).backward()
    model(torch.ones(1, 40)).sum().backward()
    step()
    torch.testing.assert_close(model.up.weight.detach(), before - 0.5 * model.up.weight.grad)
    assert len(patch.backend.report()) == 0


def test_the_name_tells_which_backend_it_stands_for(patch, monkeypatch):
    """So that a model that was given to it by name, and is never traced, is found."""
    monkeypatch.setenv("GWS_INNER", "eager")
    model = Net()
    compiled = torch.compile(model, backend="gws", options={"fmt": "fp4_e2m1"})
    assert compilers.compiled_modules(gws_compile.named_backend(fmt="fp4_e2m1")) == [model]
    assert compilers.compiled_modules(gws_compile.named_backend(fmt="fp6_e3m2")) == []
    assert compiled._orig_mod is model
    torch.compile(model, backend="gws", options={"fmt": "fp99"})  # an error where it is called, not here
    assert stands_for({"fmt": "fp99"}) is None


def test_places_are_counted(patch):
    for _ in range(3):
        torch.compile(double)
    (call,) = patch.calls.seen
    assert patch.calls.to_dict()[0]["count"] == 3
    assert call == CompileCall(call.where, "double", taken=True)
