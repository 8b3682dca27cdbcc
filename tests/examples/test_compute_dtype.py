"""Which dtype the examples compute in, by what a device does fast."""

import argparse
import contextlib
import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
compute_dtype = importlib.import_module("compute_dtype")

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("bfloat16", "float32", "chosen"),
    [(14.4, 47.2, torch.bfloat16), (92.0, 52.7, torch.float32), (183.7, 39.7, torch.float32)],
    ids=["avx512_bf16", "avx512", "avx2"],
)
def test_a_cpu_is_measured(bfloat16, float32, chosen, monkeypatch):
    """Milliseconds of the product, read on one processor with fewer and fewer of its instructions; a busy machine adds
    to some of the readings."""
    readings = iter([bfloat16 * 9, bfloat16, bfloat16 * 1.5, *[bfloat16] * 3, *[float32] * 5, float32 * 20])
    monkeypatch.setattr(compute_dtype, "_seconds", lambda function: function() is None or next(readings))
    assert compute_dtype.fast_dtype(CPU) is chosen
    assert next(readings, None) is None


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_is_asked(supported, monkeypatch):
    def answer(including_emulation):
        assert not including_emulation
        return supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    assert compute_dtype.fast_dtype(torch.device("cuda")) is (torch.bfloat16 if supported else torch.float32)


def test_who_asks_for_a_dtype_gets_it(monkeypatch):
    parser = argparse.ArgumentParser()
    compute_dtype.add_dtype_option(parser)
    monkeypatch.setattr(compute_dtype, "fast_dtype", lambda device: "measured")
    assert compute_dtype.chosen_dtype(parser.parse_args([]).dtype, CPU) == "measured"
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        assert compute_dtype.chosen_dtype(parser.parse_args(["--dtype", name]).dtype, CPU) is dtype


def test_in_words():
    assert compute_dtype.describe(torch.bfloat16, asked=False) == "bfloat16 autocast"
    assert compute_dtype.describe(torch.float32, asked=True) == "float32"
    assert "emulates bfloat16" in compute_dtype.describe(torch.float32, asked=False)
