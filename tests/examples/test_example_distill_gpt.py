"""``examples/distill_gpt.py``, for a few steps of a smaller model."""

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

for package in ("matplotlib", "tqdm", "transformers"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
distill_gpt = importlib.import_module("distill_gpt")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    torch.compiler.reset()
    shape = replace(distill_gpt.SIZE, layers=1, width=32, heads=2, seq=16, batch=2)
    monkeypatch.setattr(distill_gpt, "SIZE", shape)
    monkeypatch.setattr(distill_gpt, "HELD_OUT_BATCHES", 1)


def losses(tmp_path, *arguments):
    fast = ["--teacher-steps=2", "--steps=2", "--seeds=2", "--inner=eager", f"--out={tmp_path}"]
    distill_gpt.main([*fast, *arguments])
    return json.loads((tmp_path / "distillation.json").read_text())


def test_students_with_and_without_a_teacher(tmp_path, capsys):
    """A row for each format; deployed losses of all seeds, and their means and differences in the table."""
    figures = losses(tmp_path, "--formats", "uniform2")
    rows = re.findall(
        r"(?m)^(\w+) +(\d\.\d{4}) ± \d+\.\d{4} +(\d\.\d{4}) ± \d+\.\d{4} +([+-]\d\.\d{4}) ± ", capsys.readouterr().out
    )
    assert [name for name, *_ in rows] == ["uniform2"]
    for name, *texts in rows:
        found = {
            t: [s["loss"] for s in figures["students"] if (s["fmt"], s["taught"]) == (name, t)] for t in (False, True)
        }
        alone, taught = (sum(found[t]) / 2 for t in (False, True))
        assert [float(text) for text in texts] == pytest.approx([alone, taught, taught - alone], abs=6e-5)
        assert set(found[False]).isdisjoint(found[True])


def test_the_teacher_stays_as_it_is():
    """In the train step's graph and by name, the student's weights alone are rewritten; the loss is by hand."""
    parsed = distill_gpt.parse(["--inner=eager"])
    student, teacher = (distill_gpt.build_model("gpt2", distill_gpt.SIZE, 16) for _ in range(2))
    teacher.requires_grad_(False)
    pqt = distill_gpt.backend_of(parsed, {"fmt": "int2", "seed": 0, "taught": True})
    tokens = torch.randint(256, (2, 16))
    loss = torch.compile(distill_gpt.loss_of(student, teacher), backend=pqt, fullgraph=True)
    with pqt.noise(False):
        value = loss(tokens)
    assert len(pqt.report().rewritten) == 4
    assert "matches the exclude pattern 'teacher.*'" in {r.reason for r in pqt.report().skipped}
    with torch.no_grad():
        cast = torch.compile(student, backend=pqt)(input_ids=tokens).logits[:, :-1].double()
        soft = (teacher(input_ids=tokens).logits[:, :-1].double() / 2).softmax(-1)
    kl = (soft * (soft.log() - F.log_softmax(cast / 2, -1))).sum(-1).mean()
    ce = -F.log_softmax(cast, -1).gather(-1, tokens[:, 1:, None]).mean()
    assert value.item() == pytest.approx((0.7 * 4 * kl + 0.3 * ce).item(), rel=1e-5)


@pytest.mark.slow
def test_fixed_levels(tmp_path):
    """They end elsewhere than levels that are trained."""
    trained = losses(tmp_path, "--formats", "uniform2")
    fixed = losses(tmp_path, "--formats", "uniform2", "--fixed-levels")
    assert [s["loss"] for s in trained["students"]] != [s["loss"] for s in fixed["students"]]
    assert trained["teacher"] == fixed["teacher"]


def test_a_bad_number_of_seeds_is_said(capsys):
    with pytest.raises(SystemExit):
        distill_gpt.parse(["--seeds=1"])
    assert "--seeds must be 2 or more, for an interval, got 1" in capsys.readouterr().err
