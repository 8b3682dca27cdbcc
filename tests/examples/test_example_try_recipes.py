"""``examples/try_recipes.py``, for a few steps of a smaller model."""

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gws_compile

for package in ("matplotlib", "tqdm", "transformers"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
try_recipes = importlib.import_module("try_recipes")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    torch.compiler.reset()
    shape = replace(try_recipes.SIZE, layers=3, width=64, heads=2, seq=32, batch=2)
    monkeypatch.setattr(try_recipes, "SIZE", shape)
    monkeypatch.setattr(try_recipes, "HELD_OUT_BATCHES", 1)


def test_losses_of_each_recipe(tmp_path, capsys):
    """They begin near plain's, each with its own, and stand in a table, a file and a picture."""
    names = ["nvfp4", "exmy"]
    try_recipes.main(["--steps=3", "--inner=aot_eager", f"--out={tmp_path}", "--recipes", *names])
    rows = re.findall(r"(?m)^(\w+) +(\d\.\d{4}) +([+-]\d+\.\d+ %) +\d+$", capsys.readouterr().out)
    assert [name for name, *_ in rows] == ["plain", *names]
    figures = json.loads((tmp_path / "recipes.json").read_text())
    assert all(len(one["train"]) == 3 for one in figures.values())
    firsts = [one["train"][0] for one in figures.values()]
    assert len(set(firsts)) == 3
    assert max(firsts) - min(firsts) < 0.1
    assert (tmp_path / "recipes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_forward_in_high_precision_and_the_ends_left_out(tmp_path, capsys):
    """From the first step on, plain's forward; and what is left of three blocks is one."""
    options = ["--steps=2", "--inner=aot_eager", f"--out={tmp_path}", "--recipes", "mxfp8"]
    try_recipes.main([*options, "--forward-until=0"])
    figures = json.loads((tmp_path / "recipes.json").read_text())
    assert figures["mxfp8"]["train"][0] == pytest.approx(figures["plain"]["train"][0], abs=1e-6)
    parsed = try_recipes.parse([*options, "--keep-ends"])
    model = try_recipes.build_model("llama", try_recipes.SIZE, 32)
    (_, plain), (_, backend) = try_recipes.compilers(parsed, model)
    assert plain == "aot_eager"
    assert isinstance(backend, gws_compile.Backend)
    kept = [backend.config.settings_of(f"model.layers.{i}.mlp.up_proj.weight") is not None for i in range(3)]
    assert kept == [False, True, False]


def test_a_bad_number_of_steps_is_said(capsys):
    with pytest.raises(SystemExit):
        try_recipes.parse(["--steps=1"])
    assert "--steps must be 2 or more, got 1" in capsys.readouterr().err
