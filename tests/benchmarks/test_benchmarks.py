"""The programs in benchmarks/, in their smallest sizes, and what they are there to show."""

import importlib
import json
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_memory_of_a_step(precision: str) -> None:
    pytest.importorskip("transformers")
    memory = importlib.import_module("memory")
    measured = []
    for variant in memory.VARIANTS:
        torch.compiler.reset()
        measured.append(memory.measure(variant, precision, memory.SIZES["tiny"], "fp8_e4m3", "cpu"))
    plain, save, recompute = measured
    weights = 4 * 64 * 64 + 3 * 64 * 160
    assert (plain.sampled, save.sampled, recompute.sampled) == (0, weights, weights)

    def extra(m, figure: str) -> float:
        return (getattr(m, figure) - getattr(plain, figure)) / weights

    if precision == "autocast":
        # The sample takes the place of the bf16 copy; recomputed, there is neither.
        assert extra(save, "saved") == pytest.approx(0, abs=0.01)
        assert extra(recompute, "saved") == pytest.approx(-2, abs=0.01)
        assert extra(save, "peak") == pytest.approx(0, abs=0.01)
        assert extra(recompute, "peak") < 0
    else:
        assert extra(save, "saved") == pytest.approx(2, abs=0.01)
        assert extra(recompute, "saved") == pytest.approx(0, abs=0.01)
        assert extra(recompute, "peak") < extra(save, "peak") < 2
    # Parameters and AdamW's two moments are the least there is.
    assert plain.peak > 3 * plain.parameters * (4 if precision == "autocast" else 2) + plain.saved
    assert "+0.0" in memory.table(measured)


def test_memory_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    memory = importlib.import_module("memory")

    class Here:
        """In place of a process for each measurement."""

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, _, variant, precision, *rest):
            saved = {"plain": 100, "save": 150, "recompute": 75}[variant]
            self.result = lambda: memory.Measurement(
                variant, precision, 60, 0 if variant == "plain" else 50, saved, 1000
            )
            return self

    monkeypatch.setattr(memory, "ProcessPoolExecutor", Here)
    memory.main(["--size=tiny", "--device=cpu", f"--json={tmp_path / 'out'}"])
    figures = json.loads((tmp_path / "out").read_text())
    assert figures["size"]["width"] == 64
    assert [m["saved"] for m in figures["measurements"]] == [100, 150, 75] * 2
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[-3] for line in printed if " save " in line] == ["+1.000"] * 2
    assert [line.split()[-3] for line in printed if " recompute " in line] == ["-0.500"] * 2
