import pytest
import torch
from support.oracle import assert_bits_equal

from gws_compile import quantize

mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
config = pytest.importorskip("torchao.prototype.mx_formats.config")

ELEMENTS = {
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp6_e3m2": "fp6_e3m2",
    "fp6_e2m3": "fp6_e2m3",
    "fp4_e2m1": torch.float4_e2m1fn_x2,
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    """Normal values, rows at magnitudes from 2**-80 to 2**80; a block of zeros, and one nearly so."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(644, 512, generator=generator) * 2.0 ** (torch.arange(644) // 4 - 80.0)[:, None]
    w[3, 32:64] = 0.0
    w[4, 64:95] = -0.0
    # Heavy tails: the smallest values of a block fall among the subnormals and below.
    w[::3] *= torch.randn(215, 512, generator=generator) ** 6
    return w.to(request.param)


def torchao(w: torch.Tensor, fmt: str, rule: str) -> torch.Tensor:
    scale, data = mx_tensor.to_mx(w, ELEMENTS[fmt], 32, config.ScaleCalculationMode[rule])
    return mx_tensor.to_dtype(data, scale, ELEMENTS[fmt], 32, w.dtype)


@pytest.mark.parametrize("fmt", ELEMENTS)
def test_floor_is_the_rule_of_torchao(fmt, weight):
    assert_bits_equal(quantize(weight, fmt, (1, 32), "floor"), torchao(weight, fmt, "FLOOR"))


@pytest.mark.parametrize("fmt", ELEMENTS)
def test_ceil_is_the_rceil_of_torchao(fmt, weight):
    # torchao's scale of a block of zeros is another one; zeros times it are zeros all the same.
    assert_bits_equal(quantize(weight, fmt, (1, 32), "ceil"), torchao(weight, fmt, "RCEIL"))


def test_a_block_with_nan_is_nan():
    w = torch.ones(2, 64)
    w[1, 40] = torch.nan
    expected = torch.ones(2, 64)
    expected[1, 32:] = torch.nan
    assert_bits_equal(torchao(w, "fp8_e4m3", "FLOOR"), expected)
    assert_bits_equal(quantize(w, "fp8_e4m3", (1, 32)), expected)
