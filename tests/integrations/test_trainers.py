"""Trainers of other packages with the backend by name: one sample for each optimizer step, that of the reference.

Every training forward is recorded with the weights that it was called with; afterwards an untouched copy of the model
is called with the weights that `gws_compile.sample` draws for that step, which is the number of times that the weights
have changed.
"""

import contextlib
import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from support.torch_version import TORCH
from torch.func import functional_call

import gws_compile
from gws_compile.command_line.named_backend import forget_named_backends
from gws_compile.command_line.run_session import RunOptions, RunSession

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

FMT, SEED = "fp6_e3m2", 11


@pytest.fixture(autouse=True)
def _settings(monkeypatch, request):
    forget_named_backends()
    request.getfixturevalue("fresh")  # with no backend that the name stood for before
    for name, value in {"GWS_FMT": FMT, "GWS_SEED": str(SEED), "GWS_INNER": "aot_eager"}.items():
        monkeypatch.setenv(name, value)


class Recorder:
    """Watches a model's training forwards; made before anything is done to the model."""

    def __init__(self, model):
        self.oracle = copy.deepcopy(model)
        self.forwards = []
        model.register_forward_hook(torch.compiler.disable(self.saw), with_kwargs=True)

    def saw(self, model, args, kwargs, output):
        if torch.is_grad_enabled():
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            output = getattr(output, "logits", output).detach().clone()
            self.forwards.append((weights, args, kwargs, output))

    def check(self, backend, steps, forwards_per_step, tolerance=1e-5, context=contextlib.nullcontext):
        sampled = {record.name for record in backend.report().rewritten}
        assert len(sampled) >= 3
        assert len(self.forwards) == steps * forwards_per_step
        step, before = 0, self.forwards[0][0]
        for number, (weights, args, kwargs, output) in enumerate(self.forwards):
            step += any(not torch.equal(weights[name], before[name]) for name in weights)
            before = weights
            assert step == number // forwards_per_step
            right = self.output(weights, sampled, step, args, kwargs, context)
            assert (right - output).abs().max() <= tolerance * output.abs().max()
            wrong = self.output(weights, sampled, step + 1, args, kwargs, context)
            assert (wrong - output).abs().max() > 20 * tolerance * output.abs().max()
        assert backend.state_dict()["step"] == steps

    def output(self, weights, sampled, step, args, kwargs, context):
        values = {
            name: gws_compile.sample(w, FMT, name=name, step=step, seed=SEED) if name in sampled else w
            for name, w in weights.items()
        }
        with torch.no_grad(), context():
            output = functional_call(self.oracle, values, args, kwargs)
        return getattr(output, "logits", output)


@contextlib.contextmanager
def around(how, model):
    """The model compiled by name; or what `gws run` puts in place around a script that compiles by default, or not."""
    if how == "by name":
        model.compile(backend="gws")
        yield
        return
    session = RunSession(RunOptions("train.py", auto="--auto" in how))
    session.start()
    try:
        yield
    finally:
        session.stop()
    assert sum(session.calls.taken.values()) == 1


def reset_accelerate():
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


@pytest.mark.parametrize("how", ["by name", "gws run", "gws run --auto"])
def test_huggingface_trainer(how):
    pytest.importorskip("transformers")
    reset_accelerate()
    example = importlib.import_module("huggingface_trainer")
    model = example.build_model()
    recorder = Recorder(model)
    with around(how, model):
        arguments = {"torch_compile": True} if how == "gws run" else {}
        example.train(model, max_steps=3, gradient_accumulation_steps=2, use_cpu=True, **arguments)
    recorder.check(gws_compile.named_backend(), steps=3, forwards_per_step=2)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("how", ["by name", "gws run", "gws run --auto"])
def test_accelerate(how, precision):
    reset_accelerate()
    example = importlib.import_module("accelerate_loop")
    model = example.build_model()
    recorder = Recorder(model)
    with around(how, model):
        arguments = {"dynamo_backend": "inductor"} if how == "gws run" else {}
        example.train(model, 3, gradient_accumulation_steps=2, cpu=True, mixed_precision=precision, **arguments)
    recorder.check(
        gws_compile.named_backend(),
        steps=3,
        forwards_per_step=2,
        context=contextlib.nullcontext if precision == "no" else lambda: torch.autocast("cpu", torch.bfloat16),
    )


@pytest.mark.parametrize("how", ["by name", "gws run --auto"])
def test_lightning(how):
    pytest.importorskip("lightning")
    example = importlib.import_module("lightning_module")
    model = example.Classifier()
    recorder = Recorder(model)
    with around(how, model):
        example.train(model, max_steps=3, accumulate_grad_batches=2, accelerator="cpu", log_every_n_steps=1)
    recorder.check(gws_compile.named_backend(), steps=3, forwards_per_step=2)


def test_lightning_compiled_as_a_whole():
    """With any backend it works, or it does not: the documentation names the versions of torch."""
    pytest.importorskip("lightning")
    example = importlib.import_module("lightning_module")
    if TORCH in ((2, 12), (2, 13)):
        with pytest.raises(torch._dynamo.exc.InternalTorchDynamoError, match="has no attribute '__dict__'"):
            example.train(torch.compile(example.Classifier(), backend="eager"), max_steps=1, accelerator="cpu")
        return
    model = example.Classifier()
    recorder = Recorder(model)
    whole = torch.compile(model, backend="gws")
    example.train(whole, max_steps=3, accumulate_grad_batches=2, accelerator="cpu", log_every_n_steps=1)
    recorder.check(gws_compile.named_backend(), steps=3, forwards_per_step=2)


def test_accelerate_refuses_the_name():
    """So does the Trainer, which hands the name on. The documentation says so; when this fails, it is out of date."""
    reset_accelerate()
    import accelerate

    with pytest.raises(ValueError, match="'GWS' is not a valid DynamoBackend"):
        accelerate.Accelerator(cpu=True, dynamo_backend="gws")
    transformers = pytest.importorskip("transformers")
    example = importlib.import_module("huggingface_trainer")
    arguments = transformers.TrainingArguments("nowhere", torch_compile=True, torch_compile_backend="gws", use_cpu=True)
    with pytest.raises(ValueError, match="'GWS' is not a valid DynamoBackend"):
        transformers.Trainer(example.build_model(), arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["huggingface_trainer", "accelerate_loop", "lightning_module"])
def test_examples_run(name, monkeypatch, capsys):
    """As they stand, with generated code; the settings come from the environment."""
    monkeypatch.delenv("GWS_INNER")
    reset_accelerate()
    importlib.import_module(name).main()
    assert " of " in capsys.readouterr().out.splitlines()[-1]
    assert all(record.fmt == FMT for record in gws_compile.named_backend().report().rewritten)
