"""Real model code: what benchmarks/model_coverage.py checks of each model, and what docs/coverage.md says."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.reports import LEAVES_FRAME
from support.small_models import OneLayer

pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import model_coverage as coverage
from model_catalogue import ENTRIES, Entry

PAGE = coverage.PAGE.read_text()
LINES = frozenset(PAGE.splitlines())

DEFAULT = (
    "Qwen3Moe", "convolutions, 2d", "U-Net", "Transformer layers", "LSTM", "Llama with LoRA",
    "fused projections", "computed weights", "functional_call, vmap, grad", "graph break in a loop",
)  # fmt: skip


def entries(*names):
    chosen = [e for e in ENTRIES if e.name in names or not names]
    assert {e.name for e in chosen} >= set(names)
    return [pytest.param(e, id=e.name, marks=() if e.name in DEFAULT else pytest.mark.slow) for e in chosen]


@pytest.mark.parametrize("entry", entries())
def test_model(entry):
    """All weights are listed; the surgery changes no bit; a step is one at the sampled weights; the page agrees."""
    row = coverage.table([coverage.check(entry)]).splitlines()[-1]
    if entry.untraced and not LEAVES_FRAME:
        return  # the page is of a torch that leaves more
    assert row in LINES, f"{row}\ndocs/coverage.md says otherwise: run python benchmarks/model_coverage.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry",
    entries(
        "Llama", "Qwen3Moe", "Mamba", "Bert", "ViT", "ConvNext", "Wav2Vec2", "CLIP", "Transformer layers", "U-Net",
        "Llama with LoRA", "functional_call, vmap, grad",
    ),
)  # fmt: skip
def test_the_surgery_alone_is_plain_inductor(entry):
    coverage.check_surgery(entry, "inductor")


def test_the_page_lists_the_catalogue():
    tables = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    names = {e.name for e in ENTRIES}
    rows = [row for row in tables if row[0].removeprefix("| ") in names]
    assert sorted(row[0].removeprefix("| ") for row in rows) == sorted(names)
    assert "`python benchmarks/model_coverage.py`" in PAGE.split("## ")[0]
    # The text around the tables is the program's.
    assert PAGE.endswith(coverage.BOTTOM.format(operations=coverage.operations_table()))
    first, last = coverage.TOP.split("{torch}")[0], coverage.TOP.split("{transformers}")[1].split("{rewritten}")[0]
    assert PAGE.startswith(first)
    assert last in PAGE
    weights, rewritten = (sum(int(row[i]) for row in rows) for i in (1, 2))
    assert f"{rewritten} of {weights} weights in {len(ENTRIES)} models are rewritten" in PAGE


def test_the_catalogue_is_wide():
    families = {}
    for entry in ENTRIES:
        families.setdefault(entry.family, []).append(entry.name)
    hugging_face = {"decoder", "encoder", "encoder-decoder", "mixture of experts", "state space", "vision", "audio"}
    hugging_face.add("multimodal")
    assert hugging_face <= families.keys()
    count = sum(len(families[family]) for family in hugging_face)
    assert count >= 30
    assert f"in {count} Hugging Face architectures" in (coverage.PAGE.parents[1] / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: None, r"one: listed and owned weights differ in \['fc.weight'\]"),
        (lambda record: replace(record, rewritten=False, reason=""), "one: fc.weight is left alone: "),
        (
            lambda record: replace(record, rewritten=False, reason="used by f"),
            "one: fc.weight is left alone: used by f",
        ),
    ],
    ids=["forgotten", "without a reason", "unknown"],
)
def test_the_check_fails_where_coverage_falls_short(monkeypatch, change, message):
    entry = Entry("one", "plain torch", partial(OneLayer, 8, 8), lambda: {"x": torch.ones(2, 8)})
    found, report = coverage.explain(entry)
    assert (found.weights, found.rewritten) == (1, 1)
    short = coverage.gws_compile.Report(record for record in map(change, report) if record)
    monkeypatch.setattr(coverage.gws_compile, "explain", lambda *args, **kwargs: short)
    with pytest.raises(AssertionError, match=message):
        coverage.explain(entry)


def test_the_check_sees_a_step_that_is_not_at_the_samples(monkeypatch):
    entry = Entry("one", "plain torch", partial(OneLayer, 8, 8), lambda: {"x": torch.ones(2, 8)})
    _, report = coverage.explain(entry)
    coverage.check_samples(entry, report)
    monkeypatch.setattr(coverage, "sampled", lambda value, record: value)
    with pytest.raises(AssertionError, match="one: "):
        coverage.check_samples(entry, report)
