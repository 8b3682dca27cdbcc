"""Codes in bytes."""

import ml_dtypes
import numpy as np
import pytest
import torch

from gws_compile.deploy.codecs import FLOAT8, INT4, INT8, NIBBLES, SIXES


def all_codes(dtype: type, bits: int) -> torch.Tensor:
    """Every finite value of a format, in the order of its codes, (4, n)."""
    values = np.arange(2**bits, dtype=np.uint8).view(dtype).astype(np.float32)
    return torch.tensor(np.resize(values[np.isfinite(values)], (4, 256)))


@pytest.mark.parametrize(
    ("codec", "dtype", "bits"),
    [
        (FLOAT8, ml_dtypes.float8_e4m3fn, 8),
        (NIBBLES, ml_dtypes.float4_e2m1fn, 4),
        (SIXES, ml_dtypes.float6_e2m3fn, 6),
    ],
)
def test_every_code_comes_back(codec, dtype, bits):
    levels = all_codes(dtype, bits)
    unpacked = codec.unpack(codec.pack(levels), levels.shape[1])
    assert torch.equal(unpacked, levels)
    assert torch.equal(unpacked.signbit(), levels.signbit())


def test_codes_are_those_of_ml_dtypes():
    levels = all_codes(ml_dtypes.float4_e2m1fn, 4)
    codes = levels.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    packed = NIBBLES.pack(levels).numpy()
    assert np.array_equal(packed & 15, codes[:, 0::2])
    assert np.array_equal(packed >> 4, codes[:, 1::2])
    levels = all_codes(ml_dtypes.float6_e2m3fn, 6)
    codes = levels.numpy().astype(ml_dtypes.float6_e2m3fn).view(np.uint8).astype(np.uint32).reshape(4, -1, 4)
    words = (codes << np.array([0, 6, 12, 18], dtype=np.uint32)).sum(-1)
    expected = np.stack([words & 255, words >> 8 & 255, words >> 16], -1).reshape(4, -1)
    assert np.array_equal(SIXES.pack(levels).numpy(), expected)


@pytest.mark.parametrize(("codec", "bits"), [(INT4, 4), (INT8, 8)])
@pytest.mark.parametrize("cols", [1, 7, 8, 9, 33])
def test_integers_come_back_in_rows_of_any_length(codec, bits, cols):
    largest = 2 ** (bits - 1) - 1
    levels = torch.arange(-largest, largest + 1).repeat(cols)[: 3 * cols].view(3, cols).float()
    packed = codec.pack(levels)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, -(-cols * bits // 32))
    assert torch.equal(codec.unpack(packed, cols), levels)
