"""`MetricsCallback` under the real Trainer."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import gws_compile
from gws_compile.command_line.named_backend import forget_named_backends

transformers = pytest.importorskip("transformers")

from gws_compile.integrations.huggingface import MetricsCallback  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    forget_named_backends()


def trainer_of(model, tmp_path, **arguments):
    example = importlib.import_module("huggingface_trainer")
    settings = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, report_to=[], save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, use_cpu=True, logging_steps=2, learning_rate=1e-3, **arguments,
    )  # fmt: skip
    return transformers.Trainer(model, settings, train_dataset=example.counting(32))


def build():
    return importlib.import_module("huggingface_trainer").build_model()


@pytest.mark.parametrize("per_weight", [False, True])
def test_metrics_are_logged_beside_the_loss(tmp_path, per_weight):
    model, backend = build(), gws_compile.backend("fp4_e2m1", inner="eager")
    model.compile(backend=backend)
    trainer = trainer_of(model, tmp_path, max_steps=4, gradient_accumulation_steps=2)
    seen = {}

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = backend.metrics().scalars(per_weight=per_weight)

    trainer.add_callback(Watch())
    trainer.add_callback(MetricsCallback(trainer, backend, every=2, per_weight=per_weight))
    trainer.train()
    history = trainer.state.log_history
    logged = {entry["step"]: entry for entry in history if "gws/sqnr_mean" in entry}
    assert logged.keys() == {2, 4}
    for step, entry in logged.items():
        assert {name: value for name, value in entry.items() if name.startswith("gws/")} == seen[step]
    assert any(name.endswith("q_proj.weight/sqnr") for name in logged[2]) == per_weight
    assert logged[2]["gws/sqnr_mean"] != logged[4]["gws/sqnr_mean"]
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4]


def test_the_backend_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("GWS_INNER", "eager")
    model = build()
    model.compile(backend="gws", options={"fmt": "fp6_e3m2"})
    trainer = trainer_of(model, tmp_path, max_steps=2)
    trainer.add_callback(MetricsCallback(trainer, every=1))
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "gws/exact" in entry] == [1, 2]


def test_nothing_to_log_is_said_once(tmp_path):
    trainer = trainer_of(build(), tmp_path, max_steps=3)
    trainer.add_callback(MetricsCallback(trainer, gws_compile.backend(), every=1))
    with pytest.warns(gws_compile.GwsWarning, match="nothing to log") as warned:
        trainer.train()
    assert len([w for w in warned if w.category is gws_compile.GwsWarning]) == 1


def test_a_bad_interval():
    with pytest.raises(ValueError, match="every must be a number of steps, 1 or more, got 0"):
        MetricsCallback(None, every=0)


def test_the_package_does_not_import_transformers():
    import subprocess

    code = "import sys, gws_compile, gws_compile.integrations; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
