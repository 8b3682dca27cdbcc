"""NVFP4 against torchao's quantizer, on weights for which its order of operations rounds as ours does.

torchao's scale of a matrix is ``A / 2688``, the inverse of ours, and it keeps S_b at e4m3's smallest normal value or
above. With a maximum of 2688 times a power of two that scale is exact; with weights of few bits and no small blocks the
rest of its operations has the same result too.
"""

import pytest
import torch
from support.oracle import assert_bits_equal

from gws_compile import quantize
from gws_compile.numerics.cast import cast
from gws_compile.numerics.nvfp4 import ELEMENT, encode_scale, nvfp4_scale, stored_scale
from gws_compile.numerics.primitives import TorchPrimitives

theirs = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")

P = TorchPrimitives()


@pytest.mark.parametrize("exponent", [-100, -20, -12, 0, 30, 110])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_scales_and_values(dtype, exponent):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(96, 512, generator=generator) ** 3
    w *= 2.0 ** -torch.randint(6, (96, 32), generator=generator).repeat_interleave(16, 1)
    w = (w.bfloat16().float().clamp(-40, 40) * 2.0**5).bfloat16().float()
    w[:, ::16] = w[:, ::16].sign() * w[:, ::16].abs().clamp(min=1.0)  # no block of a small maximum
    w[7, 100] = -2688.0
    w = (w * 2.0**exponent).to(dtype)

    scale = theirs.per_tensor_amax_to_scale(w.abs().amax())
    assert scale == 2.0**exponent
    their_stored, packed = theirs.nvfp4_quantize(w, per_tensor_scale=scale)
    their_codes = kernels.f4_unpacked_to_f32(kernels.unpack_uint4(packed))

    blocks = w.float().view(96, 32, 16)
    amax = blocks.abs().amax(2, keepdim=True)
    matrix_maximum = w.float().abs().amax()
    encode = encode_scale(P, matrix_maximum)
    stored = stored_scale(P, amax, encode)
    inverse, _ = nvfp4_scale(P, amax, encode, 1.0 / encode, dtype)
    codes = cast(P, blocks, inverse, torch.ones_like(amax), ELEMENT, "nvfp4", dtype)
    assert stored.min() >= 2.0**-6
    assert_bits_equal(stored.squeeze(2), their_stored.float())
    assert_bits_equal(codes.reshape(w.shape), their_codes)
    assert_bits_equal(
        quantize(w, "nvfp4", (1, 16)), (codes * (their_stored.float()[..., None] * scale)).view(w.shape).to(dtype)
    )
