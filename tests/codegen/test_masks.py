"""Masks in Inductor's C++ against the eager kernels, bit for bit; those in Triton are in test_triton_code."""

import pytest
import torch
from support.oracle import assert_bits_equal

import gws_compile.codegen.masks  # noqa: F401  registers the lowerings
from gws_compile.ops.masks import VERSION

pytestmark = pytest.mark.usefixtures("reset")

NAN = float("nan")


def case(shape, batch_dims, over_rows, kept, of, dtype=torch.float32, *, channels_last=False):
    w = torch.randn(shape).mul(2).round().div(2)  # ties
    w.view(-1)[3] = NAN
    w.view(-1)[-1] = float("-inf")
    w = w.to(dtype)
    return (w.to(memory_format=torch.channels_last) if channels_last else w), batch_dims, over_rows, kept, of


FEW = [((5, 36), 0, False, 2, 4), ((36, 5), 0, True, 2, 4, torch.bfloat16)]
MANY = [
    ((7, 24), 0, False, 3, 8, torch.bfloat16),
    ((3, 8, 20), 1, False, 1, 2, torch.float16),
    ((2, 32, 19), 1, True, 5, 16),
    ((6, 4, 3, 3), 0, False, 2, 4),
    ((8, 4, 3, 3), 0, True, 2, 4),
]


@pytest.mark.parametrize("kinds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_compiled_equals_eager(kinds):
    torch.manual_seed(0)
    cases = [case(*one) for one in kinds]
    if kinds is MANY:
        cases.append(case((6, 4, 3, 3), 0, False, 2, 12, channels_last=True))
    weights = [w for w, *_ in cases]

    def masks(*weights):
        found = []
        for w, (_, *how) in zip(weights, cases, strict=True):
            mask = torch.ops.gws.element_mask(w, *how, VERSION)
            found.append((mask, torch.ops.gws.apply_mask(w, mask, None, VERSION)))
        return found

    for compiled, eager in zip(torch.compile(masks)(*weights), masks(*weights), strict=True):
        for got, expected in zip(compiled, eager, strict=True):
            assert_bits_equal(got, expected)


@pytest.mark.slow
def test_a_weight_that_is_not_contiguous():
    turned = torch.randn(24, 8).t()  # not contiguous
    mask = torch.compile(lambda w: torch.ops.gws.element_mask(w, 0, False, 2, 4, VERSION))(turned)
    assert_bits_equal(mask, torch.ops.gws.element_mask(turned.contiguous(), 0, False, 2, 4, VERSION))


def test_a_graph_of_another_version_is_refused():
    w = torch.ones(4, 4)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(RuntimeError, match=f"was made for {VERSION + 1}"):
        torch.ops.gws.element_mask(mode.from_tensor(w), 0, False, 2, 4, VERSION + 1)
