"""The experiment on bit widths: it runs, and its page shows what its data says."""

import importlib
import json
import sys
from pathlib import Path

import pytest

for package in ("matplotlib", "tqdm", "transformers"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
experiment = importlib.import_module("bit_experiment")


@pytest.mark.slow
def test_a_run_of_each_kind(tmp_path):
    out = tmp_path / "bits.json"
    options = ["--steps=2", "--batch=2", "--seq=16", "--seeds=1", "--inner=eager", f"--data={__file__}", f"--out={out}"]
    options.append("--dtype=float32")
    for only in ("plain", "fixed fp6_e3m2, no noise", "learned per weight, average 5, uniform"):
        experiment.main(["run", *options, f"--only={only}"])
    runs = json.loads(out.read_text())["runs"]
    assert [r["setting"] for r in runs] == [
        "plain", "fixed fp6_e3m2, no noise (straight-through)", "learned per weight, average 5, uniform noise"
    ]  # fmt: skip
    plain, fixed, learned = runs
    assert plain["trained"] == plain["deployed"]
    assert fixed["trained"] == fixed["deployed"]
    assert learned["trained"] != learned["deployed"]
    assert (fixed["average"], fixed["share"]) == (4.0, {"fp6_e3m2": 1.0})
    assert 5.9 < learned["average"] < 6.0
    assert fixed["bytes"] < learned["bytes"] < plain["bytes"]
    assert {r["dtype"] for r in runs} == {"float32"}
    before = out.read_text()
    experiment.main(["run", *options, "--only=plain"])  # nothing is trained twice
    assert json.loads(before)["runs"] == json.loads(out.read_text())["runs"]
    with pytest.raises(SystemExit, match="has runs computed in float32: give the same --dtype"):
        experiment.main(["run", *options, "--only=fixed", "--dtype=bfloat16"])


def test_the_page_shows_training_without_master_weights():
    data = json.loads((ROOT / "docs" / "data" / "experiments-direct-llama.json").read_text())
    rows = list(experiment.rows(data["runs"]))
    assert [row["name"] for row in rows] == [setting.name for setting in experiment.direct_settings()]
    assert all(row["seeds"] == 3 for row in rows)
    assert experiment.table(rows) in (ROOT / "docs" / "experiments.md").read_text()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_page_shows_the_data(kind, tmp_path):
    data = json.loads((ROOT / "docs" / "data" / f"experiments-{kind}.json").read_text())
    rows = list(experiment.rows(data["runs"]))
    assert [row["name"] for row in rows] == [setting.name for setting in experiment.settings()]
    assert all(row["seeds"] == 3 for row in rows)
    assert all(abs(row["average"] - 5) < 0.05 for row in rows if "average 5" in row["name"])
    assert experiment.table(rows) in (ROOT / "docs" / "experiments.md").read_text()
    experiment.plot(tmp_path / "plot.png", kind, rows)
    assert (tmp_path / "plot.png").stat().st_size > 10_000
