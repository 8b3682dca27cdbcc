"""Integer formats against numpy: the levels, the rounding, the block scales, and the width that stands for a format."""

import numpy as np
import pytest
import torch
from support.oracle import (
    as_matrices,
    assert_bits_equal,
    block_maximum_oracle,
    noise_oracle,
    random_floats,
    random_words,
    sample_oracle,
)

from gws_compile import FloatFormat, IntFormat, quantize
from gws_compile.numerics.elements import parse_element
from gws_compile.numerics.spec import SampleSpec
from gws_compile.ops.eager import sample_eager

WIDTHS = range(2, 9)
KEY = (0x243F6A88, 0x05A308D3)


def weight(shape=(90, 70)) -> np.ndarray:
    """Rows at magnitudes from 2**-100 to 2**100, each over 14 binades; a block of zeros of either sign."""
    w = random_floats(shape, 1, (-12, 1)) * 2.0 ** np.linspace(-100, 100, shape[0]).round()[:, None]
    w[:8, :16] = 0.0
    w[:8, :8] = -0.0
    return w.astype(np.float32)


def amax_oracle(w: np.ndarray, bits: int, block) -> np.ndarray:
    """float32, one operation after the other: ``q = rint(w * (1 / s))``, ``s = a / max``."""
    largest = np.float32(2 ** (bits - 1) - 1)
    amax = block_maximum_oracle(as_matrices(w), block).reshape(w.shape)
    s = np.where(amax > 0, amax, np.float32(1)) / largest
    q = np.clip(np.rint(w * (np.float32(1) / s)), -largest, largest)
    assert q.dtype == s.dtype == np.float32
    return q * s


def power_of_two_oracle(w: np.ndarray, bits: int, block, scale: str) -> np.ndarray:
    """float64, in which nothing but `numpy.rint` rounds."""
    largest = 2.0 ** (bits - 1) - 1
    amax = block_maximum_oracle(as_matrices(w), block).reshape(w.shape).astype(np.float64)
    x = 2.0 ** (np.floor(np.log2(np.where(amax > 0, amax, 1))) - (bits - 2))
    if scale == "ceil":
        x = np.where(amax > largest * x, 2 * x, x)
        assert (amax <= largest * x).all()
    exact = np.clip(np.rint(w / x), -largest, largest) * x
    assert (exact == exact.astype(np.float32)).all()
    return exact.astype(np.float32)


@pytest.mark.parametrize("block", [(1, 128), (1, None), (None, None), (8, 16)], ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_amax_is_float32_arithmetic(bits, block):
    w = weight()
    assert_bits_equal(quantize(torch.from_numpy(w), f"int{bits}", block), amax_oracle(w, bits, block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_largest_weights_stay_finite(bits, dtype):
    """The scale is at most 2**126, and at most the largest float32 with which ``max`` times it is finite."""
    top, largest = torch.finfo(dtype).max, 2.0 ** (bits - 1) - 1
    x = np.float32(min(top / largest, 2.0**126))
    if float(x) * largest > top:
        x = np.nextafter(x, np.float32(0))
    w = torch.linspace(-1, 1, 65).mul(top).to(dtype)[None]
    q = np.clip(np.rint(w.float().numpy() * (np.float32(1) / x)), -largest, largest)
    actual = quantize(w, f"int{bits}", (1, None))
    assert actual.isfinite().all()
    assert_bits_equal(actual, torch.from_numpy(q * x).to(dtype))


@pytest.mark.parametrize("scale", ["floor", "ceil"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_powers_of_two_are_exact(bits, scale):
    w = weight()
    for block in ((1, None), (8, 16)):
        actual = quantize(torch.from_numpy(w), f"int{bits}", block, scale)
        assert_bits_equal(actual, power_of_two_oracle(w, bits, block, scale))


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_level_is_reached_and_ties_go_to_even(bits):
    """With a block maximum of ``max`` the scale is 1, and a weight is its own code."""
    largest = 2 ** (bits - 1) - 1
    halves = np.arange(-2 * largest, 2 * largest + 1, dtype=np.float32)[None] / 2
    exact = np.concatenate([halves, np.nextafter(halves, np.float32(0)), np.rint(halves)])
    actual = quantize(torch.from_numpy(exact), f"int{bits}", (None, None))
    assert_bits_equal(actual, np.rint(exact))
    assert np.unique(actual.numpy()).tolist() == list(range(-largest, largest + 1))


@pytest.mark.parametrize("scale", ["amax", "floor", "ceil"])
@pytest.mark.parametrize("bits", range(3, 9))
def test_the_float_format_of_these_levels_is_the_same(bits, scale):
    """A format of one exponent bit has evenly spaced values: 0 to 2**(N-1) - 1 with N - 2 mantissa bits, bias 3 - N."""
    integer, float_format = IntFormat(bits), FloatFormat.make(1, bits - 2, bias=3 - bits)
    for name in ("max", "emax", "emin", "min_normal", "min_subnormal", "mantissa_bits", "noise_bits", "storage_bits"):
        assert getattr(integer, name) == getattr(float_format, name)
    w = weight()
    w[40:, 20] = [2.0 ** (k - 126) for k in range(5, 255, 5)]
    for dtype in (torch.float32, torch.bfloat16):
        narrow = torch.from_numpy(w).to(dtype)
        expected = quantize(narrow, float_format, (8, 16), scale)
        assert_bits_equal(quantize(narrow, integer, (8, 16), scale), expected)


@pytest.mark.parametrize("noise", ["rounded_normal", "uniform"])
@pytest.mark.parametrize("bits", range(3, 9))
def test_noise_is_cast_as_in_the_float_format_of_these_levels(bits, noise):
    w = random_floats((40, 50), 2, (-8, 1))
    float_format = FloatFormat.make(1, bits - 2, bias=3 - bits)
    words = torch.from_numpy(np.array([*KEY, 3, -1, 0, 0], np.int32))
    spec = SampleSpec(IntFormat(bits), noise, bits - 0.5, "ceil", None, torch.float32)
    actual = sample_eager(torch.from_numpy(w), spec, 0, (8, 16), words[:2], words[2:])
    assert_bits_equal(actual, sample_oracle(w, KEY, 3, float_format, bits - 0.5, noise, (8, 16), "ceil"))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_width_of_a_format_is_the_largest_whose_noise_reaches_another_level(bits):
    """R = -1 takes the largest weight of a block to another level at ``b = N``, and no longer at ``b = N + 1``."""
    assert IntFormat(bits).noise_bits == bits
    w = torch.full((64, 64), 1.75)
    words = torch.from_numpy(np.array([*KEY, 5, -1, 0, 0], np.int32))
    r = noise_oracle(random_words(np.arange(w.numel()), KEY, 5), "rounded_normal").reshape(64, 64)
    levels = 2 ** (bits - 1) - 1
    for width, step in ((bits, 1), (bits + 1, 0)):
        spec = SampleSpec(IntFormat(bits), "rounded_normal", float(width), "amax", None, torch.float32)
        sampled = sample_eager(w, spec, 0, (None, None), words[:2], words[2:])
        code = torch.round(sampled / (torch.tensor(1.75) / levels))
        assert (r == -1).sum() > 500
        assert (code[r == -1] == levels - step).all()
        assert (code[r >= 0] == levels).all()


def test_names_are_read_back():
    for bits in WIDTHS:
        fmt = IntFormat(bits)
        assert parse_element(f"int{bits}") == parse_element(fmt.spec) == parse_element(fmt) == fmt
        assert (str(fmt), fmt.name, fmt.storage_bits, fmt.scaled) == (f"int{bits}", f"int{bits}", bits, True)


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_other_widths_are_named(bits):
    message = f"an integer format has 2 to 8 bits, got {bits}; e.g. 'int4'"
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse_element(f"int{bits}")
    with pytest.raises(ValueError, match=f"^{message}; or 'int2' to 'int8'; or a preset: mxfp8, "):
        quantize(torch.ones(2, 2), f"int{bits}")


@pytest.mark.parametrize("bits", [True, 4.0, "4", None])
def test_a_width_is_an_int(bits):
    with pytest.raises(ValueError, match=f"an integer format has 2 to 8 bits, got {bits!r}"):
        IntFormat(bits)


def test_an_integer_needs_a_scale():
    message = "int4 needs a block scale: scale must be 'amax', 'floor' or 'ceil', got None"
    with pytest.raises(ValueError, match=f"^{message}$"):
        quantize(torch.ones(2, 2), "int4", scale=None)
