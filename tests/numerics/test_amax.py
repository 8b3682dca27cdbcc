"""The scale ``a / max``: float32 operations one by one in numpy, and the cast by ml_dtypes."""

import numpy as np
import pytest
import torch
from support.narrow_cast import ml_dtypes_cast
from support.oracle import (
    ML_DTYPES_FORMATS,
    as_matrices,
    assert_bits_equal,
    block_maximum_oracle,
    noise_oracle,
    random_floats,
    random_words,
    sample,
)

from gws_compile import FORMATS, quantize

THEIRS = {
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "fp6_e2m3": "float6_e2m3fn",
    "fp6_e3m2": "float6_e3m2fn",
    "fp4_e2m1": "float4_e2m1fn",
}
BLOCKS = [(1, None), (None, None), (128, 128), (1, 128), (None, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT32_MAX = float(np.finfo(np.float32).max)


def scale_oracle(amax: np.ndarray, largest: float, smallest: float, limit: float) -> np.ndarray:
    """``a / max`` within what is promised: the smallest grid value at least 2**-124, the largest at most ``limit``."""
    low = max(2.0**-124 / smallest, 2.0**-126)
    high = np.float32(min(limit / largest, 2.0**126))
    if float(high) * largest > limit:
        high = np.nextafter(high, np.float32(0))
    return np.clip(amax / np.float32(largest), np.float32(low), high)


def amax_oracle(
    w: torch.Tensor, fmt: str, block: tuple[int | None, int | None], y: np.ndarray | None = None
) -> torch.Tensor:
    """``quantize(w, fmt, block, "amax")``; ``y`` for what is cast, where it is not the weight itself."""
    matrices = as_matrices(w.float().numpy())
    amax, theirs = block_maximum_oracle(matrices, block), ML_DTYPES_FORMATS[THEIRS[fmt]]
    s = scale_oracle(amax, theirs.max, theirs.min_subnormal, torch.finfo(w.dtype).max)
    with np.errstate(invalid="ignore", under="ignore"):
        q = ml_dtypes_cast((matrices if y is None else as_matrices(y)) * (np.float32(1) / s), THEIRS[fmt])
        value = np.where(np.isfinite(amax), q * s, np.float32(np.nan))
    assert q.dtype == s.dtype == value.dtype == np.float32
    return torch.from_numpy(value.reshape(w.shape)).to(w.dtype)


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Each row over 20 binades, and the rows at magnitudes that the dtype has."""
    w = random_floats(shape, 1, (-20, 1))
    span = 8 if dtype == torch.float16 else 90
    rows = np.linspace(-span, span, shape[0]).round().reshape(-1, *[1] * (len(shape) - 1))
    w = torch.from_numpy((w * 2.0**rows).astype(np.float32)).to(dtype)
    w[:2] = 0.0
    w[2, :8] = -0.0
    return w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("fmt", THEIRS)
def test_agrees_with_ml_dtypes(fmt, block, dtype):
    """Partial blocks at both ends, zero blocks, signed zeros."""
    w = weight((150, 290), dtype)
    assert_bits_equal(quantize(w, fmt, block, "amax"), amax_oracle(w, fmt, block))


@pytest.mark.parametrize("shape", [(3, 40, 70), (9, 5, 3, 3), (77,), (1, 1), (4, 0)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_experts_convolutions_and_small_tensors(block, shape):
    """Three dims are matrices with maxima of their own; four are one matrix, (out, the rest)."""
    w = torch.from_numpy(random_floats(shape, 2, (-12, 2)))
    if w.ndim == 3:
        w *= torch.tensor([1.0, 64.0, 2.0**-20])[:, None, None]
    expected = amax_oracle(w, "fp8_e4m3", block) if w.numel() else w
    assert_bits_equal(quantize(w, "fp8_e4m3", block, "amax"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", THEIRS)
def test_every_magnitude_up_to_the_largest_is_finite(fmt, dtype):
    """A row a binade, from subnormals on, and rows of the largest values: the scale keeps to its range."""
    exponents = np.arange(-127, 128)
    w = np.stack([random_floats(40, 300 + int(e), (max(int(e) - 9, -127), int(e))) for e in exponents])
    largest = torch.finfo(dtype).max
    w = torch.from_numpy(w).clamp(-largest, largest).to(dtype)
    steps = torch.arange(40) % 8
    ends = torch.tensor([largest]).to(dtype).view(torch.int32 if dtype == torch.float32 else torch.int16)
    w = torch.cat([w, (ends - steps.to(ends.dtype)).view(dtype)[None], -w[-3:]])
    for block in ((1, None), (1, 8)):
        actual = quantize(w, fmt, block, "amax")
        assert actual.isfinite().all()
        assert_bits_equal(actual, amax_oracle(w, fmt, block))


@pytest.mark.parametrize("fmt", THEIRS)
def test_the_block_maximum_becomes_the_formats(fmt):
    """What the exact scale is for, at every magnitude it is promised at: ``max * X`` is the block maximum again."""
    amax = np.abs(random_floats(2**14, 3, (-90, 120)))
    w = torch.from_numpy(np.stack([amax, -amax, amax / 64], axis=1))
    largest = np.float32(FORMATS[fmt].max)
    actual = quantize(w, fmt, (1, None), "amax")
    assert_bits_equal(actual[:, 0], largest * (amax / largest))
    assert_bits_equal(actual[:, 1], -actual[:, 0])
    assert (np.abs(actual[:, 0].numpy().astype(np.float64) / amax - 1) <= 2.0**-23).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("block", "cell"),
    [((1, None), (slice(5, 6), slice(None))), ((None, None), (slice(None), slice(None))),
     ((4, 5), (slice(4, 8), slice(5, 10))), ((None, 5), (slice(None), slice(5, 10)))],
    ids=str,
)  # fmt: skip
def test_nan_and_inf_stay_in_their_block(block, cell, bad):
    w = torch.from_numpy(random_floats((10, 13), 4, (-5, 2)))
    expected = quantize(w, "fp8_e4m3", block, "amax")
    expected[cell] = torch.nan
    w[5, 7] = bad
    assert_bits_equal(quantize(w, "fp8_e4m3", block, "amax"), expected)


@pytest.mark.parametrize("scale", ["amax", "floor", "ceil"])
@pytest.mark.parametrize(
    ("long", "whole"),
    [((10**6, 10**6), (None, None)), ((1, 10**6), (1, None)), ((10**6, 16), (None, 16)), ((40, 70), (None, None))],
    ids=str,
)
def test_a_block_is_no_longer_than_the_matrix(long, whole, scale):
    for shape in ((40, 70), (3, 40, 70), (40, 7, 5, 2)):
        w = torch.from_numpy(random_floats(shape, 5, (-12, 2)))
        assert_bits_equal(quantize(w, "fp8_e5m2", long, scale), quantize(w, "fp8_e5m2", whole, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flushing_subnormals_changes_nothing(dtype):
    """One thread computes tensors of this size, the one whose mode is set."""
    w = np.stack([random_floats(48, 1100 + e, (max(e - 20, -127), e)) for e in range(-127, 128, 3)])
    w = torch.from_numpy(w).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    cases = [(fmt, block) for fmt in (*THEIRS, "int2", "int4", "int8") for block in ((1, 16), (1, None))]
    expected = [quantize(w, fmt, block, "amax") for fmt, block in cases]
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor does not flush subnormals")
        assert (torch.tensor([1e-40]) * 1.0).item() == 0.0
        actual = [quantize(w, fmt, block, "amax") for fmt, block in cases]
    finally:
        torch.set_flush_denormal(False)
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)


@pytest.mark.parametrize("noise", ["rounded_normal", "uniform"])
@pytest.mark.parametrize("block", [(8, 16), (1, None), (None, None)], ids=str)
def test_noise_is_cast_on_the_grid_of_the_weight_itself(block, noise):
    """Block maximum and scale are those of the weight, not of what noise makes of it."""
    w, key, step = random_floats((40, 50), 6, (-8, 1)), (123456789, 987654321), 3
    amax = block_maximum_oracle(w[None], block)[0]
    r = noise_oracle(random_words(np.arange(w.size), key, step), noise).reshape(w.shape)
    y = np.where(r == 0, w, w + r * (amax * np.float32(2.0**-1.5)))
    actual = sample(
        torch.from_numpy(w), "fp6_e3m2", key=key, step=step, bits=2.5, noise=noise, block=block, scale="amax"
    )
    assert_bits_equal(actual, amax_oracle(torch.from_numpy(w), "fp6_e3m2", block, y))


@pytest.mark.parametrize("largest", [448.0, 6.0, 7.5, 28.0, 7.0, 127.0])
def test_the_scale_of_cast_weights_is_the_one_that_they_were_cast_with(largest):
    """A cast weight's block maximum is max X, whose quotient is X again: in float32, for every maximum of a binade."""
    amax = (np.arange(2**23, dtype=np.uint32) + np.float32(1.0).view(np.uint32)).view(np.float32)
    x = amax / np.float32(largest)
    assert np.array_equal((x * np.float32(largest)) / np.float32(largest), x)
