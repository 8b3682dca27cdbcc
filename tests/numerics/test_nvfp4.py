"""NVFP4: codes and scales against the float32 operations of TransformerEngine's reference quantizer, one by one.

The reference is written down here a second time: torch's float32 operations, torch's e4m3, the e2m1 of ml_dtypes.
"""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from support.oracle import as_matrices, assert_bits_equal, block_maximum_oracle, random_floats

from gws_compile import quantize
from gws_compile.numerics.cast import cast
from gws_compile.numerics.nvfp4 import ELEMENT, encode_scale, nvfp4_scale, stored_scale
from gws_compile.numerics.primitives import TorchPrimitives

P = TorchPrimitives()
FLOAT32_MAX = float(np.finfo(np.float32).max)
LARGEST_ENCODE = 2.0**115
"""Where S_enc ends here. In the reference it is float32's largest value."""
BLOCKS = pytest.mark.parametrize("block", [(16, 16), (1, 16)], ids=str)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIDPOINTS = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
"""Halfway between two values of e2m1 -> the one with the even code."""


def maxima(w: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of its block, and of its matrix over what is finite, at every element of a (matrices, rows, columns) weight."""
    value = w.float().numpy()
    finite = np.where(np.isfinite(value), value, np.float32(0))
    return tuple(torch.from_numpy(block_maximum_oracle(*of)) for of in ((value, block), (finite, (None, None))))


def reference_encode(matrix_maximum: torch.Tensor, limit: float = FLOAT32_MAX) -> torch.Tensor:
    encode = (torch.tensor(448.0 * 6.0) / matrix_maximum).clamp(max=limit)
    return torch.where((matrix_maximum == 0) | (encode == 0), torch.tensor(1.0), encode)


def reference_stored(amax: torch.Tensor, encode: torch.Tensor) -> torch.Tensor:
    sixth = torch.tensor(1.0) / torch.tensor(6.0)
    return (amax * (encode * sixth)).clamp(max=448.0).to(torch.float8_e4m3fn).float()


def reference(
    w: torch.Tensor, block: tuple[int, int], limit: float = FLOAT32_MAX
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, S_b, S_enc and values of a (matrices, rows, columns) weight, each at every element.

    Args:
        limit: the largest S_enc.
    """
    amax, matrix_maximum = maxima(w, block)
    encode = reference_encode(matrix_maximum, limit)
    stored = reference_stored(amax, encode)
    factor = (torch.tensor(1.0) / (stored * (torch.tensor(1.0) / encode))).clamp(max=FLOAT32_MAX)
    scaled = (w.float() * factor).clamp(-6.0, 6.0)
    codes = torch.from_numpy(scaled.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
    value = codes * (stored / encode)
    assert value.dtype == codes.dtype == stored.dtype == encode.dtype == torch.float32
    return codes, stored, encode, torch.where(amax.isfinite(), value, torch.nan).to(w.dtype)


def package(w: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, S_b and S_enc: the cast with X = 1 leaves the code."""
    amax, matrix_maximum = maxima(w, block)
    encode = encode_scale(P, matrix_maximum)
    inverse, _ = nvfp4_scale(P, amax, encode, 1.0 / encode, torch.float32)
    codes = cast(P, w.float(), inverse, torch.ones_like(amax), ELEMENT, "nvfp4", torch.float32)
    return codes, stored_scale(P, amax, encode), encode


def assert_is_the_reference(w: torch.Tensor, block: tuple[int, int], limit: float = FLOAT32_MAX) -> torch.Tensor:
    """Of a (matrices, rows, columns) weight; returns S_b."""
    codes, stored, encode, value = reference(w, block, limit)
    for actual, expected in zip(package(w, block), (codes, stored, encode), strict=True):
        assert_bits_equal(actual, expected)
    assert_bits_equal(quantize(w, "nvfp4", block), value)
    return stored


def at_magnitudes(exponents, *, seed: int = 1, spread: int = 20) -> torch.Tensor:
    """A matrix of 50 x 72 for each exponent of its maximum; its blocks are smaller by 0 to ``spread`` binades."""
    exponents = np.asarray(list(exponents))
    n = len(exponents)
    w = random_floats((n, 50, 72), seed, (-6, -1)).astype(np.float64)
    rng = np.random.default_rng(seed)
    blocks = 2.0 ** -rng.integers(0, spread + 1, (n, 4, 5))
    w *= blocks.repeat(16, 1)[:, :50].repeat(16, 2)[:, :, :72]
    w[:, 20, 20] = rng.choice([-1, 1], n) * rng.uniform(1, 1.99, n)
    return torch.from_numpy((w * 2.0 ** exponents[:, None, None]).astype(np.float32))


# --- Against the reference -------------------------------------------------------------------------------------------


@BLOCKS
def test_every_magnitude_agrees_with_the_reference(block):
    """Matrices with maxima from where both have the same S_enc to the largest float32; partial blocks."""
    w = at_magnitudes(range(-102, 128, 2))
    w[-1, 20, 20] = FLOAT32_MAX
    stored = assert_is_the_reference(w, block)
    # Every S_b that there is: 0 in blocks that are too small, subnormal ones, and up to 448.
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(stored.unique(), every)


@BLOCKS
def test_usual_weights_agree_with_the_reference(block):
    generator = torch.Generator().manual_seed(0)
    assert_is_the_reference(torch.randn(4, 128, 192, generator=generator) * 0.02, block)
    assert_is_the_reference(torch.randn(4, 128, 192, generator=generator) ** 5, block)


@BLOCKS
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_narrow_weights_are_cast_in_float32(dtype, block):
    w = at_magnitudes(range(-12, 15) if dtype == torch.float16 else range(-102, 127, 3), spread=8).to(dtype)
    assert_is_the_reference(w, block)


@BLOCKS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_weights_stay_finite(dtype, block):
    """Maxima that are the dtype's largest values: 6 times S_b / S_enc is not beyond them."""
    largest = torch.tensor([torch.finfo(dtype).max]).to(dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    tops = (largest.view(integer) - torch.arange(64, dtype=integer)).view(dtype)
    w = tops[:, None, None].repeat(1, 16, 32)
    w[:, :, 16:] = (torch.linspace(-1, 1, 16) / torch.arange(1, 17)[:, None] * largest.float()).to(dtype)
    assert_is_the_reference(w, block)
    assert quantize(w, "nvfp4", block).isfinite().all()


@BLOCKS
def test_zero_blocks_and_signed_zeros(block):
    w = at_magnitudes([0])
    w[0, :16, :16], w[0, 16, :16], w[0, 17:19, 16:32] = 0.0, -0.0, -0.0
    assert_is_the_reference(w, block)
    assert_bits_equal(quantize(w, "nvfp4", block)[0, :16, :16], torch.zeros(16, 16))
    for zero in (0.0, -0.0):  # S_enc is 1 there
        zeros = torch.full((1, 20, 40), zero)
        assert_is_the_reference(zeros, block)
        assert_bits_equal(quantize(zeros, "nvfp4", block), zeros)


@BLOCKS
def test_blocks_that_are_too_small_become_zero(block):
    """``S_b`` is 0 at or below half of e4m3's smallest value, 2**-10: the codes are the reference's, the values 0."""
    w = torch.zeros(1, 16, 64)
    w[0, 0, 0] = 2688.0  # S_enc is 1
    tie = torch.tensor(6 * 2.0**-10)
    w[0, :, 16:32] = tie
    w[0, :, 32:48] = torch.nextafter(tie, torch.tensor(1.0))
    w[0, :, 48:] = -(2.0**-120)
    stored = assert_is_the_reference(w, block)
    assert stored[0, 0, ::16].tolist() == [448.0, 0.0, 2.0**-9, 0.0]
    assert_bits_equal(quantize(w, "nvfp4", block)[0, :, 16:32], torch.zeros(16, 16))
    assert_bits_equal(quantize(w, "nvfp4", block)[0, :, 48:], -torch.zeros(16, 16))
    assert package(w, block)[0][0, 3, ::16].tolist() == [0.0, 6.0, 3.0, -6.0]


@BLOCKS
def test_midpoints_go_to_the_even_code(block):
    """In a block whose X is known: all seven, and their neighbours on both sides; of either sign."""
    w = torch.zeros(1, 16, 32)
    w[0, 0, 0] = 2688.0  # S_enc is 1
    exact = torch.tensor(list(MIDPOINTS))
    below, above = (torch.nextafter(exact, torch.tensor(end)) for end in (0.0, 9.0))
    even = torch.tensor(list(MIDPOINTS.values()))
    odd = exact * 2 - even
    for scale in (1.0, 0.5, 256.0, 2.0**-9):  # S_b, and so X, with a block maximum of 6 times that
        rows = torch.zeros(16, 16)
        rows[:, 0] = 6.0
        rows[0, 1:8], rows[0, 8:15] = exact, -exact
        rows[1, 1:8], rows[1, 8:15] = below, above
        w[0, :, 16:] = rows * scale
        assert assert_is_the_reference(w, block)[0, 0, 16] == scale
        actual = quantize(w, "nvfp4", block)[0, :2, 17:31] / scale
        lower, upper = torch.minimum(even, odd), torch.maximum(even, odd)
        assert_bits_equal(actual, torch.stack([torch.cat([even, -even]), torch.cat([lower, upper])]))


def test_scales_round_to_even():
    """``S_b`` where it lies halfway between two values of e4m3: 2688 makes S_enc 1, and ``a = 6 t`` the scale t."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (values[1:] + values[:-1]) / 2
    expected = torch.where(torch.arange(126) % 2 == 0, values[:-1], values[1:])
    assert_bits_equal(stored_scale(P, 6 * ties, torch.ones(126)), expected)
    assert_bits_equal(reference_stored(6 * ties, torch.ones(126)), expected)


# --- What is said of it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@BLOCKS
def test_nan_and_inf_stay_in_their_block(block, bad):
    """Other blocks are as if such values were absent; what else is in their block still counts for the matrix."""
    w = at_magnitudes([3, -20])
    for matrix, row, col in ((0, 0, 0), (0, 20, 21), (1, 49, 71), (1, 33, 5)):
        broken = w.clone()
        broken[matrix, row, col] = 0.0
        expected = quantize(broken, "nvfp4", block)
        rows, cols = block
        top, left = row // rows * rows, col // cols * cols
        expected[matrix, top : top + rows, left : left + cols] = torch.nan
        broken[matrix, row, col] = bad
        assert_bits_equal(quantize(broken, "nvfp4", block), expected)
        *_, value = reference(broken, block)
        assert_bits_equal(value, expected)
    nothing = torch.full((20, 40), bad)
    assert quantize(nothing, "nvfp4", block).isnan().all()


def test_the_transpose_has_the_transposed_values():
    """In blocks of 16 x 16: what forward and backward read is the same weight."""
    w = at_magnitudes(range(-60, 60, 5))
    assert_bits_equal(quantize(w.mT, "nvfp4"), quantize(w, "nvfp4").mT)


def test_a_matrix_of_experts_has_a_maximum_of_its_own():
    w = at_magnitudes([0, 30, -30, 5])
    assert_bits_equal(quantize(w, "nvfp4"), torch.stack([quantize(one, "nvfp4") for one in w]))
    kernels = w[:2].reshape(100, 8, 3, 3)  # one matrix, 100 x 72
    *_, value = reference(torch.from_numpy(as_matrices(kernels.numpy())), (16, 16))
    assert_bits_equal(quantize(kernels, "nvfp4"), value.view(kernels.shape))


@BLOCKS
def test_smaller_matrices_have_the_largest_encode_scale(block):
    """The departure that the module states: S_enc ends at a power of two, so that nothing of the scales is subnormal.

    The reference with that limit is the same bit for bit, down to matrices of subnormals; and above the maximum at
    which it sets in, the reference as it is has the same S_enc.
    """
    w = at_magnitudes(range(-127, -102), spread=6)
    w[0] = 0.0
    w[0, 5:9, 3:7] = torch.tensor([1e-45, -1e-45, 1e-41, -1e-38])
    assert_is_the_reference(w, block, LARGEST_ENCODE)
    edge = torch.tensor(2688.0 / LARGEST_ENCODE)
    above, below = edge * (1 + torch.arange(9) / 8), edge * 2.0 ** -torch.arange(0.0, 40.0)
    assert_bits_equal(encode_scale(P, above), reference_encode(above))
    assert_bits_equal(encode_scale(P, below), torch.full((40,), LARGEST_ENCODE))
    assert (reference_encode(below)[1:] > LARGEST_ENCODE).all()


@BLOCKS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flushing_subnormals_changes_nothing(dtype, block):
    """One thread computes tensors of this size, the one whose mode is set."""
    w = at_magnitudes([*range(-127, -100, 3), *range(-100, 127, 20)], spread=24)
    w = [one.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype) for one in w]
    expected = [quantize(one, "nvfp4", block) for one in w]
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor does not flush subnormals")
        assert (torch.tensor([1e-40]) * 1.0).item() == 0.0
        actual = [quantize(one, "nvfp4", block) for one in w]
    finally:
        torch.set_flush_denormal(False)
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)
