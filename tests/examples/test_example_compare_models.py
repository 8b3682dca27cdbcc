"""The training functions of the comparison, what they tell of a run, and the page of the experiment."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import gws_compile
from gws_compile.command_line.compared_settings_file import own_from_file
from gws_compile.comparison.compared_settings import DEFAULT_METHODS
from gws_compile.comparison.comparing import listed
from gws_compile.comparison.summary import summarize

for package in ("matplotlib", "tqdm", "transformers"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
compare_models = importlib.import_module("compare_models")
training_figures = importlib.import_module("training_figures")
noise_size = importlib.import_module("noise_size")

SMALL = {"steps": 4, "width": 32, "layers": 1, "batch": 2, "seq": 16, "data": __file__}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_comparison(kind, tmp_path):
    """Every method trains, and tells its figures."""
    found = gws_compile.compare(
        getattr(compare_models, kind),
        fmts=["fp4_e2m1"],
        methods=["cast-afterwards", "rounded-normal", "learned"],
        seeds=1,
        training=SMALL,
        common={"inner": "eager"},
        out=tmp_path,
        progress=False,
    )
    assert not any(row.failed or row.diverged for row in found.rows)
    noisy = found["fp4_e2m1, rounded normal noise"].figures
    assert noisy["tokens"].mean == 4 * 2 * 16
    assert 0 < noisy["changed_levels"].mean < 1
    assert noisy["scatter_draws"].mean > 0
    assert found["plain"].figures["scatter_draws"].mean == 0
    assert found["learned widths, average 3"].average_bits > 0


def test_changed_levels():
    """Counted in levels of the blocks' own scales: a weight that grows as a whole changes none, one that moves does."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    backend = gws_compile.backend("int3", noise="none", inner="eager")
    with torch.no_grad():
        torch.compile(model, backend=backend)(torch.randn(1, 64))
    figures = training_figures.TrainingFigures(model, backend, steps=2)
    weight = model[0].weight
    with torch.no_grad():
        figures.before_step(1)
        weight.mul_(2)
        figures.after_step(1)
        assert figures.numbers() == {"changed_levels": 0.0}
        largest = weight.abs().amax()
        weight[3, 5] = 0.0
        weight[40, 50] = largest
        figures.before_step(1)
        weight[3, 5] = weight[:32, :32].abs().amax() * 0.7  # level 2 of 3
        figures.after_step(1)
    assert figures.numbers() == {"changed_levels": (0.0 + 1 / 64**2) / 2}


def test_gradient_noise():
    """Held to the variance of gradients that are written out: of a linear loss the gradient is the batch's sum."""

    class Text:
        def batch_of_step(self, step, batch, seq, *, seed):
            return torch.full((batch, seq), float(step + seed))

    model = torch.nn.Linear(1, 1, bias=False)
    figures = training_figures.TrainingFigures(model, gws_compile.backend(inner="eager"), steps=1)
    found = figures.gradient_noise(lambda tokens: model(tokens[:, :1]).sum(), Text(), 2, 3, seed=4)
    gradients = torch.tensor([2.0 * (number + 5) for number in range(training_figures.DRAWS)])
    assert found["scatter_draws"] == 0
    assert found["scatter_batches"] == pytest.approx(float(gradients.var() / gradients.mean() ** 2))


class Output(NamedTuple):
    loss: torch.Tensor


def test_the_size_of_the_noise():
    """Beside what the references change."""
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(64, 48, bias=False)

        def forward(self, input_ids, labels):
            out = self.fc(input_ids)
            return Output(out.sum())

    model, x = Model(), torch.randn(2, 64)
    bits, cast, noisy = noise_size.sizes(model, x, {"fmt": "int3", "noise": "rounded_normal", "bits": None})
    w = model.fc.weight.detach()
    expected = {
        "cast": gws_compile.quantize(w, "int3"),
        "noisy": gws_compile.sample(w, "int3", name="fc.weight", step=0),
    }
    relative = {name: float((w - value).double().norm() / w.double().norm()) for name, value in expected.items()}
    assert bits == 3.0
    assert (cast, noisy) == pytest.approx((relative["cast"], relative["noisy"]), rel=1e-9)


FORMATS = ("fp8_e4m3", "fp6_e3m2", "fp4_e2m1", "nvfp4", "int4", "int3", "int2")


def of_the_page(kind):
    """The comparison of the page, from its runs, and its settings."""
    content = json.loads((ROOT / "docs" / "data" / f"compare-{kind}.json").read_text())
    own = own_from_file(ROOT / "examples" / "compare_more.toml") if kind == "llama" else {}
    settings = listed(FORMATS, DEFAULT_METHODS, (), own, {})
    return summarize(settings, content["runs"], FORMATS), settings


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_page_shows_what_its_data_says(kind):
    """Its tables are those of the runs, of which each setting has three."""
    page = (ROOT / "docs" / "experiments.md").read_text()
    found, settings = of_the_page(kind)
    assert {row.seeds for row in found.rows} == {3}
    assert len(found.rows) == len(settings)
    assert found.methods_table() in page
    if kind == "llama":
        shown = {line.partition(" |")[0] for line in page.splitlines() if line.startswith("| ")}
        own = [row for row in found.rows if row.method in ("", "plain") and row.name != "plain"]
        assert {f"| {row.name}" for row in own} <= {name.rstrip() for name in shown}
        assert only(found, own).table() in page
        robust = [found[name] for name in ROBUST]
        assert only(found, robust).robustness_table() in page
        told = [row for row in found.rows if row.method in ("plain", "straight-through", "rounded-normal")]
        assert only(found, told).figures_table() in page


ROBUST = (
    "plain",
    "int3, straight-through",
    "int2, straight-through",
    "fp4_e2m1, rounded normal noise",
    "int3, rounded normal noise",
    "int2, rounded normal noise",
    "int3, uniform noise",
    "int2, uniform noise",
)


def only(found, rows):
    return dataclasses.replace(found, rows=tuple(rows))
