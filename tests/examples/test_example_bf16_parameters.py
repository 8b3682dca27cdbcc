"""``examples/bf16_parameters.py``, for a few steps of a smaller model."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

for package in ("tqdm", "transformers"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
bf16_parameters = importlib.import_module("bf16_parameters")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    torch.compiler.reset()
    shape = replace(bf16_parameters.SIZE, layers=1, width=64, heads=2, seq=32, batch=2)
    monkeypatch.setattr(bf16_parameters, "SIZE", shape)
    monkeypatch.setattr(bf16_parameters, "HELD_OUT_BATCHES", 1)


def test_bytes_and_losses_of_each_way(tmp_path, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else real(name))
    bf16_parameters.main(["--steps=3", "--inner=aot_eager", f"--out={tmp_path}"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["float32", "bf16", "bf16, sr"]
    model = bf16_parameters.build_model("llama", bf16_parameters.SIZE, 32)
    count, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    # Parameter, gradient and two moments; and AdamW's float32 count of steps for each.
    assert figures["float32"]["bytes"] == 16 * count + 4 * tensors
    assert figures["bf16"]["bytes"] == figures["bf16, sr"]["bytes"] == 8 * count + 4 * tensors
    assert all(5 < one["held_out"] < 6 for one in figures.values())
    assert "bf16, sr" in capsys.readouterr().out


def test_a_bad_number_of_steps_is_said(capsys):
    with pytest.raises(SystemExit):
        bf16_parameters.parse(["--steps=1"])
    assert "--steps must be 2 or more, got 1" in capsys.readouterr().err
