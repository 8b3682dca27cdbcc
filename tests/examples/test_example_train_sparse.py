"""``examples/train_sparse.py``, for a few steps of a smaller model."""

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

for package in ("tqdm", "transformers"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
train_sparse = importlib.import_module("train_sparse")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    torch.compiler.reset()
    shape = replace(train_sparse.SIZE, layers=1, width=48, heads=2, seq=32, batch=2)
    monkeypatch.setattr(train_sparse, "SIZE", shape)
    monkeypatch.setattr(train_sparse, "HELD_OUT_BATCHES", 1)


@pytest.mark.slow
def test_losses_zeros_and_the_model_that_is_cut(tmp_path, capsys):
    """Half of the elements are zero; and what is cut computes what was masked."""
    train_sparse.main(["--steps=4", "--inner=aot_eager", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    rows = re.findall(r"(?m)^([\w:]+) +(\d\.\d{4}) +[+-]\d+\.\d+ % +(?:(\d+\.\d) %)? +\d+$", printed)
    assert [name for name, *_ in rows] == ["plain", "dense", "2:4", "neurons"]
    zeros = {name: float(share or 0) for name, _, share in rows}
    assert 50 <= zeros["2:4"] < 52 > 20 > zeros["neurons"] > zeros["dense"]
    figures = json.loads((tmp_path / "sparse.json").read_text())
    assert figures["cut"] == pytest.approx(figures["neurons"], rel=1e-5)
    assert len({round(loss, 5) for loss in figures.values()}) == 5  # "cut" is "neurons"
    assert max(figures.values()) - min(figures.values()) < 0.5


def test_a_bad_sparsity_is_said(capsys):
    with pytest.raises(SystemExit):
        train_sparse.parse(["--sparsity=4:2"])
    assert "N from 1 to M - 1 and M at most 64, got '4:2'" in capsys.readouterr().err
