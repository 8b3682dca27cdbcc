"""What is written lies on the grid and stays there, and the weight is its mean."""

import itertools

import numpy as np
import pytest
import torch

import gws_compile
from gws_compile.config import Config
from gws_compile.numerics.elements import parse_element
from gws_compile.numerics.noise import random_word
from gws_compile.numerics.primitives import TorchPrimitives
from gws_compile.numerics.spec import key_at
from gws_compile.ops.write_grid import WRITE_PLACE, write_to_grid

DRAWS, COPIES = 4096, 256
KEY = torch.tensor([123456789, -987654321], dtype=torch.int32)

GRIDS = [
    *itertools.product(["fp8_e4m3", "fp4_e2m1", "e3m4", "int8", "int3", "int2"], ["floor", "ceil", "amax"], [(1, 16)]),
    ("fp4_e2m1", "nvfp4", (1, 16)),
    ("fp8_e5m2", None, (32, 32)),
    ("bf16", "floor", (32, 32)),
    ("int4", "amax", (None, None)),
    ("fp8_e4m3", "floor", (32, 32)),
]


def write(w, fmt, scale, block, draw):
    config = Config.make(fmt, scale=scale, block=block, noise="none")
    clock = torch.tensor([draw, 0, 0, 0, 0], dtype=torch.int32)
    return write_to_grid(w, config.sample_spec(w.dtype), w.ndim - 2, config.block, KEY, clock)


def words(draw, count):
    """The words with which the elements of a weight are rounded, as unsigned ints."""
    p = TorchPrimitives()
    key = key_at(p, KEY.__getitem__, WRITE_PLACE)
    index = torch.arange(count, dtype=torch.int32)
    return random_word(p, index, key, torch.tensor(draw, dtype=torch.int32)).numpy().view(np.uint32).astype(np.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("fmt", "scale", "block"), GRIDS)
def test_what_is_written_stays(fmt, scale, block, dtype):
    for seed in range(3):
        torch.manual_seed(seed)
        w = (torch.randn(64, 128) * 10 ** torch.empty(64, 1).uniform_(-3, 1)).to(dtype)
        w[::7] = 0
        written = write(w, fmt, scale, block, seed)
        assert torch.equal(gws_compile.quantize(written, fmt, block, scale), written)
        for draw in range(5):
            assert torch.equal(write(written, fmt, scale, block, 1000 + draw), written)


@pytest.mark.parametrize(("fmt", "scale", "block"), GRIDS)
def test_the_weight_is_the_mean(fmt, scale, block):
    """Of every element, the largest of a block too, where "floor" and "nvfp4" would saturate."""
    torch.manual_seed(0)
    w = torch.randn(4, 32) * torch.tensor([1.0, 3.0, 0.1, 20.0])[:, None]
    copies = w.expand(COPIES, 4, 32).contiguous()  # matrices of their own, each with words of its own
    moved = torch.cat([write(copies, fmt, scale, block, draw) for draw in range(DRAWS // COPIES)]).double() - w
    element = parse_element(fmt)
    blocks = w.abs().amax() if block == (None, None) else w.abs().view(4, 2, 16).amax(-1).repeat_interleave(16, 1)
    # A chance below 1 in 4096 may not have been seen: as if a step had been gone once more.
    step = torch.maximum(2 * element.min_subnormal * blocks / element.max, w.abs() * 2.0 ** (1 - element.mantissa_bits))
    step = torch.maximum(step, moved.abs().amax(0))
    error = ((moved.square().sum(0) + step**2) / DRAWS - moved.mean(0) ** 2).clamp(min=0).sqrt() / DRAWS**0.5
    assert (moved.mean(0).abs() <= 5 * error).all(), (moved.mean(0).abs() / error).max()
    assert (moved.amax(0) > moved.amin(0)).float().mean() > 0.6  # rounded to nearest, none would be


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_is_the_published_rounding_with_its_uniforms(bits):
    """Zhao et al., arXiv 2412.04787: ``ceil`` where a uniform number is below the fraction, clamped, of ``w Q / max``.

    The scale is that of ``|w|`` here, which is theirs where the largest weight is positive.
    """
    torch.manual_seed(bits)
    top = 2 ** (bits - 1) - 1
    w = torch.empty(64, 64).uniform_(-1, 1) * 0.999
    w[0, 0] = 1.0
    for draw in range(4):
        scaled = w.double().numpy().reshape(-1) * top
        low = 2 ** (23 - (bits - 2))
        chance = words(draw, w.numel()) % low
        # Away from zero where fraction and chance carry: of a negative number that is down.
        uniform = np.where(scaled > 0, low - 1 - chance, chance) / low
        fraction = scaled - np.floor(scaled)
        expected = np.clip(np.where(uniform < fraction, np.ceil(scaled), np.floor(scaled)), -top, top)
        levels = write(w, f"int{bits}", "amax", (None, None), draw).double().numpy().reshape(-1) * top
        assert np.array_equal(np.rint(levels), expected)
        assert np.abs(levels - expected).max() < 1e-4


@pytest.mark.parametrize(("fmt", "scale"), [("int3", "amax"), ("fp4_e2m1", "nvfp4"), ("fp8_e4m3", "floor")])
def test_a_broken_block_is_nan_and_no_other_sees_it(fmt, scale):
    torch.manual_seed(0)
    w = torch.randn(4, 64)
    w[1, 3], w[2, 40] = float("nan"), float("inf")
    written = write(w, fmt, scale, (1, 16), 0)
    broken = torch.zeros(4, 64, dtype=torch.bool)
    broken[1, :16] = broken[2, 32:48] = True
    assert torch.equal(written.isnan(), broken)


def test_an_empty_weight():
    assert write(torch.empty(0, 16), "int4", "amax", (1, 16), 0).shape == (0, 16)
