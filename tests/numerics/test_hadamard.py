"""The random Hadamard transform."""

import pytest
import torch
from support.recipe_oracle import hadamard_matrix

import gws_compile.codegen.lowering  # noqa: F401  registers operators and lowerings
from gws_compile.numerics.hadamard import SIZES, signs
from gws_compile.ops.sample_arguments import HadamardArguments

torch.manual_seed(0)


def transform(x, size, *, rows=False, batch_dims=0):
    return torch.ops.gws.hadamard(*HadamardArguments(x, size, batch_dims, rows).call())


def test_the_signs_are_those_of_transformer_engine():
    assert "".join("+" if sign > 0 else "-" for sign in signs(16)) == "+++-+------+-+--"
    assert signs(128) == signs(16) * 8


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [False, True])
def test_it_is_the_product_with_the_matrix(size, rows):
    """On small integers every sum is exact, so that nothing hangs on the order of additions."""
    x = torch.randint(-64, 65, (size * 2, size * 3)).float()
    matrix = hadamard_matrix(size) * size**0.5
    groups = (x.t() if rows else x).double().reshape(-1, size) @ matrix
    wanted = groups.reshape((x.t() if rows else x).shape) / size**0.5
    got = transform(x, size, rows=rows)
    assert torch.allclose((got.t() if rows else got).double(), wanted, rtol=2**-23, atol=0)
    if size == 16:  # a division by 4 is exact
        assert torch.equal((got.t() if rows else got).double(), wanted)


def test_the_matrix_is_torchaos():
    utils = pytest.importorskip("torchao.prototype.moe_training.nvfp4_training.hadamard_utils")
    theirs = utils.get_rht_matrix(signs(16), "cpu", torch.float32, 16)
    assert torch.equal(transform(torch.eye(16), 16), theirs)


@pytest.mark.parametrize("size", SIZES)
def test_products_of_transformed_operands_are_those_of_the_operands(size):
    """``(A H)(H^T B) = A B``, without rounding; H is orthogonal."""
    a, b = torch.randn(24, 2 * size), torch.randn(2 * size, 40)
    product = transform(a, size).double() @ transform(b, size, rows=True).double()
    assert torch.allclose(product, a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    eye = hadamard_matrix(size)
    assert torch.allclose(eye @ eye.t(), torch.eye(size, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=pytest.mark.slow),
        torch.bfloat16,
        pytest.param(torch.float16, marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager(dtype):
    """The C++ kernel, its turned form, the loops by stages (dynamic shapes, strided operands): bit for bit."""
    shapes = (((128, 96), 0, 16), ((2, 64, 64), 1, 32), ((128, 2, 64), 0, 128))
    for shape, dims, size in shapes:
        x = (torch.randn(shape) * 20000).clamp(-65000, 65000).to(dtype)
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        for rows in (False, True):
            rest = HadamardArguments(None, size, dims, rows).call()[1:]

            def run(x, rest=rest):
                return torch.ops.gws.hadamard(x, *rest)

            for given, dynamic in ((x, False), (strided, False), (x.clone(), True)):
                torch._dynamo.reset()
                if dynamic:
                    torch._dynamo.mark_dynamic(given, dims if not rows else x.ndim - 1)
                assert torch.equal(torch.compile(run)(given), run(x)), (shape, rows, dynamic)


def test_opcheck():
    torch.library.opcheck(torch.ops.gws.hadamard.default, HadamardArguments(torch.randn(32, 48), 16, 0, False).call())
