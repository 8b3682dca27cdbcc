"""``examples/deploy.py``, whole: trained for a few steps, exported, loaded in processes of their own."""

import importlib
import sys
from pathlib import Path

import pytest

for package in ("compressed_tensors", "tqdm", "transformers"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
deploy = importlib.import_module("deploy")


@pytest.mark.slow
def test_the_exported_model_is_the_evaluated_one(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(deploy, "GENERATED", 8)
    deploy.main(["--steps=3", "--inner=eager", "--fmt=mxfp4", f"--out={tmp_path / 'out'}"])
    printed = capfd.readouterr().out
    assert "14 of 16 weights packed, 4.25 bits an element" in printed
    rows = [line for line in printed.splitlines() if line.startswith(("compiled,", "exported,"))]
    losses = [float(row.split()[4 if row.startswith("exported") else 3]) for row in rows]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)
