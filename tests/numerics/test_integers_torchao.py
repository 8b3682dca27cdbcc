"""Integer formats with the scale ``a / max`` against torchao's symmetric quantization: the same float32 operations."""

import pytest
import torch
from support.oracle import assert_bits_equal

from gws_compile import quantize

primitives = pytest.importorskip("torchao.quantization.quant_primitives")


def torchao(w: torch.Tensor, bits: int, block: tuple[int, int]) -> torch.Tensor:
    limits = {"quant_min": 1 - 2 ** (bits - 1), "quant_max": 2 ** (bits - 1) - 1}
    scale, zero = primitives.choose_qparams_affine(
        w, primitives.MappingType.SYMMETRIC, block, torch.int8, **limits, scale_dtype=torch.float32
    )
    assert not zero.any()
    codes = primitives.quantize_affine(w, block, scale, zero, torch.int8, **limits)
    return primitives.dequantize_affine(codes, block, scale, zero, torch.int8, **limits)


@pytest.mark.parametrize("block", [(1, 128), (1, 512), (64, 512), (32, 32)], ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_amax_is_the_symmetric_quantization_of_torchao(bits, block):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 512, generator=generator) ** 3 * 2.0 ** (torch.arange(64) - 32.0)[:, None]
    w[3, 128:256], w[4, :8] = 0.0, -0.0
    # An int8 code has no negative zero.
    assert_bits_equal(quantize(w, f"int{bits}", block) + 0.0, torchao(w, bits, block))


def test_groups_of_bfloat16_weights():
    """torchao computes the scale of a bfloat16 weight in bfloat16, unless its maximum comes as float32."""
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = torchao(w.float(), 4, (1, 128)).bfloat16()
    assert_bits_equal(quantize(w, "int4_group") + 0.0, expected)
