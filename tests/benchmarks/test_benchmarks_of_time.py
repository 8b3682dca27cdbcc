"""The programs in benchmarks/ that time something, in their smallest sizes: that they work, and count right."""

import importlib
import json
from pathlib import Path

import pytest
import timing
import torch


def test_functions_take_turns() -> None:
    calls: list[str] = []
    times = timing.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, "cpu", rounds=3, calls=2)
    assert "".join(calls) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert {name: len(of) for name, of in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert timing.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0


@pytest.mark.slow
def test_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernels = importlib.import_module("kernels")
    arguments = "--device cpu --shape 64x96 --dtype bfloat16 --rounds 2"
    kernels.main([*arguments.split(), f"--json={tmp_path / 'out'}"])
    figures = json.loads((tmp_path / "out").read_text())
    assert figures["torch"] == torch.__version__
    timings = figures["timings"]
    assert [(t["variant"], t["output"]) for t in timings] == [
        (variant, output) for variant in ("cast", "sample", "fused", "randn", "uniform") for output in ("fresh", "into")
    ]
    assert [t["over_cast"] for t in timings if t["variant"] == "cast"] == [1.0] * 2
    for t in timings:
        assert t["bandwidth"] * t["seconds"] == pytest.approx(64 * 96 * (2 + 2))
    assert len([line for line in capsys.readouterr().out.splitlines() if "rounded_normal" in line]) == 10


def test_what_is_timed_is_the_sample() -> None:
    """Fresh or not, compiled or not; and the noise by hand has the law of the other one."""
    kernels = importlib.import_module("kernels")
    case = kernels.Case("fp8_e4m3", "rounded_normal", "float32", (64, 96))
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    sample = kernels.sampler(kernels.settings_of(case), "cpu")
    wanted = sample(w)
    assert wanted.dtype == torch.bfloat16
    assert torch.equal(torch.compile(sample, fullgraph=True)(w), wanted)
    torch.manual_seed(0)
    noisy = kernels.with_randn(torch.full((512, 512), 0.75), 5.0).float() - 0.75
    assert sorted(set((noisy / 0.75 * 16).round().int().flatten().tolist())) == [-2, -1, 0, 1, 2]
    assert (noisy != 0).float().mean().item() == pytest.approx(0.3173, abs=0.005)  # erfc(1 / sqrt 2)


@pytest.mark.slow
def test_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    step = importlib.import_module("step")
    peers = importlib.import_module("peers")

    def missing(model, optimizer) -> None:
        raise peers.Missing("pip install it")

    monkeypatch.setitem(peers.PEERS, "diffq", missing)
    monkeypatch.setattr(
        step,
        "measure_compilation",
        lambda variant, precision, *rest: step.Compilation(
            variant, precision, {"plain": 10.0}.get(variant, 12.0), 3.0, dict.fromkeys(step.PHASES, 1.0)
        ),
    )
    arguments = "--size tiny --device cpu --precision autocast --rounds 2 --where --profile --variants plain save diffq"
    step.main([*arguments.split(), f"--json={tmp_path / 'out'}"])
    figures = json.loads((tmp_path / "out").read_text())
    plain, save = figures["steps"]
    assert (plain["variant"], plain["over_plain"]) == ("plain", 1.0)
    assert (save["variant"], save["graphs"], save["breaks"], save["recompilations"]) == ("save", 1, 0, 0)
    assert plain["tokens"] * plain["seconds"] == pytest.approx(2 * 32)
    assert save["peak"] == pytest.approx(plain["peak"], rel=0.01)  # the sample takes the place of autocast's copy
    assert [(p["variant"], p["kernels"]["aten::mm"][1] > 20) for p in figures["profiles"]] == [
        ("plain", True),
        ("save", True),
    ]
    printed = capsys.readouterr().out
    assert "One step of save, float32 weights, bf16 autocast:" in printed
    assert "diffq was left out: pip install it" in printed
    (row,) = [line for line in printed.splitlines() if " save " in line and "12.0" in line]
    assert row.split()[5:9] == ["12.0", "1.20", "3.0", "1.00"]


def test_peers_change_what_is_trained() -> None:
    """The noise by hand sits on the weights that the backend rewrites, and the optimizer still has them."""
    pytest.importorskip("transformers")
    step, llama = importlib.import_module("step"), importlib.import_module("llama")
    training = step.Training("parametrize", "autocast", llama.SIZES["tiny"], "fp8_e4m3", "cpu")
    noisy = [name for name, _ in training.model.named_parameters() if name.endswith("parametrizations.weight.original")]
    assert len(noisy) == 7
    held = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in training.model.parameters()}
    layer = training.model.model.layers[0].mlp.up_proj
    assert not torch.equal(layer.weight, layer.parametrizations.weight.original)


def test_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    growth = importlib.import_module("growth")
    monkeypatch.setattr(growth, "sampling", lambda sides, *_: [growth.Sampling(side**2, 2.0) for side in sides])
    seconds = {"plain": 2.0, "sampled": 3.0}
    monkeypatch.setattr(growth, "_in_a_fresh_process", lambda way, layers, device: seconds.get(way, 1.0) * layers)
    growth.main(["--device=cpu", "--largest=20", "--layers", "1", "3", f"--out={tmp_path}"])
    figures = json.loads((tmp_path / "growth.json").read_text())
    assert [s["elements"] for s in figures["sampling"]] == [2**20, 2**22, 2**24]
    assert [c["seconds"] for c in figures["compiling"] if c["way"] == "sampled"] == [3.0, 9.0]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "sampled, layer by layer"])
def test_a_compilation_in_a_fresh_process(way: str) -> None:
    pytest.importorskip("transformers")
    assert importlib.import_module("growth")._in_a_fresh_process(way, 1, "cpu") > 0


@pytest.mark.slow
def test_a_warm_start_is_faster() -> None:
    """Caches are hit: the second process does a fraction of the first one's work."""
    pytest.importorskip("transformers")
    step, llama = importlib.import_module("step"), importlib.import_module("llama")
    found = step.measure_compilation("save", "autocast", llama.SIZES["tiny"], "fp8_e4m3", "cpu")
    assert found.warm < 0.6 * found.cold
    assert found.phases["lowering"] > 0
    assert found.phases["C++ or Triton"] > 0


@pytest.mark.slow
def test_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One program's figures are kept, another's failure is said, and the rest goes on."""
    everything = importlib.import_module("everything")
    programs = {
        "kernels": (tuple("kernels.py --device cpu --shape 32x32 --rounds 1 --no-peers --dtype float32".split()), 5),
        "broken": (("kernels.py", "--shape", "nonsense"), 5),
        "slow": (("-c", "import time; time.sleep(60)"), 0.01),
    }
    monkeypatch.setattr(everything, "ON_CPU", programs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    everything.main([f"--out={tmp_path / 'out.json'}"])
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["torch"] == torch.__version__
    assert {name: result.get("failed") for name, result in kept["results"].items()} == {
        "kernels": None,
        "broken": "exit code 1",
        "slow": "took longer than 0.01 minutes",
    }
    timings = kept["results"]["kernels"]["figures"]["timings"]
    printed = capsys.readouterr().out
    assert f"x {timings[2]['over_cast']:.2f}" in printed
    assert "| took longer than 0.01 minutes" in printed.replace("|   ", "| ").replace("  took", " took")
