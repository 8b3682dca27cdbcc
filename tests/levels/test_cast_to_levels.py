"""The operator ``gws::cast_to_levels`` and its gradient, against numpy and float64."""

import ast
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.levels import cast_oracle, gradient_oracle

import gws_compile
from gws_compile import Levels
from gws_compile.levels import nearest
from gws_compile.levels.arguments import LEVELS_VERSION, LevelsArguments
from gws_compile.levels.operators import DTYPES

TERNARY, NORMAL = Levels((-1, 0, 1)), Levels.normal(4)
FOLDER = Path(gws_compile.__file__).parent / "levels"


def cast(w, levels, table=NORMAL.table, block=(32, 32), scale="amax", batch_dims=0, **rest):
    sides = [side or 0 for side in block]
    given = LevelsArguments(w, levels, list(table), batch_dims, sides, scale, **rest)
    return torch.ops.gws.cast_to_levels(*given.call())


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other Python versions print the same code differently")
def test_version_is_raised_with_the_code():
    """Compile caches see the version, not the source: raise it with any change of arithmetic, and set the digest."""
    trees = [ast.parse(path.read_text()) for path in sorted(FOLDER.glob("*.py"))]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if hasattr(node, "body") and isinstance(node.body, list):
            node.body = [
                one for one in node.body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
            ] or [ast.Pass()]
    digest = hashlib.sha256("".join(map(ast.unparse, trees)).encode()).hexdigest()[:16]
    assert (LEVELS_VERSION, digest) == (2, "9a1cde034ffc642e")


CASES = {
    "default": {},
    "odd blocks": {"block": (7, 40)},
    "rows": {"block": (1, None)},
    "whole": {"block": (None, None)},
    "no scale": {"scale": ""},
    "ternary": {"table": TERNARY.table},
    "of one sign": {"table": (0.5, 3.0, 7.0)},
    "256": {"table": Levels.uniform(8).table},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_cast(case, dtype):
    torch.manual_seed(1)
    w = torch.randn(70, 90).to(dtype)
    settings = {"table": NORMAL.table, "block": (32, 32), "scale": "amax"} | case
    levels = torch.tensor(settings["table"]) + 0.05 * torch.randn(len(settings["table"]))
    expected = cast_oracle(w, levels, settings["table"], settings["block"], scaled=bool(settings["scale"]))
    assert torch.equal(cast(w, levels, **settings), expected)


@pytest.mark.parametrize(("shape", "batch_dims"), [((3, 40, 50), 1), ((20, 5, 3, 3), 0)])
def test_matrices_and_convolutions(shape, batch_dims):
    w, levels = torch.randn(shape), torch.tensor(NORMAL.table)
    assert torch.equal(
        cast(w, levels, batch_dims=batch_dims), cast_oracle(w, levels, NORMAL.table, batch_dims=batch_dims)
    )


def test_nearest_in_float64():
    """No other level lies nearer, up to float32's rounding of ``w / s``."""
    w, levels = torch.randn(64, 64), torch.randn(9)
    sampled = cast(w, levels)
    for i in (0, 32):
        for j in (0, 32):
            block = slice(i, i + 32), slice(j, j + 32)
            x = w[block].double() / w[block].abs().max().double()
            distances = (x[..., None] - levels.double()).abs()
            found = (sampled[block].double() / w[block].abs().max().double() - x).abs()
            assert (found <= distances.amin(-1) + 1e-6).all()


def test_the_block_maximum_becomes_the_largest_level():
    w = torch.tensor([[-3.0, 0.1, 2.9, 1.4]])
    assert cast(w, torch.tensor(TERNARY.table), TERNARY.table).tolist() == [[-3.0, 0.0, 3.0, 0.0]]
    tripled = 3 * torch.tensor(TERNARY.table)  # the scale stays while the levels move: midpoints lie at -1.5 and 1.5
    assert cast(w, tripled, TERNARY.table).tolist() == [[0.0, 0.0, 0.0, 0.0]]


def test_ties_go_to_the_lower_level():
    w = torch.tensor([[-1.0, -0.5, 0.5, 1.0]])
    assert cast(w, torch.tensor(TERNARY.table), TERNARY.table).tolist() == [[-1.0, -1.0, 0.0, 1.0]]


def test_order_of_the_levels():
    """Training may move one past another: the cast is that of the sorted levels."""
    w, levels = torch.randn(40, 40), torch.tensor(NORMAL.table)
    order = torch.randperm(16)
    assert torch.equal(cast(w, levels[order]), cast(w, levels))
    leaf = levels[order].clone().requires_grad_()
    plain = levels.clone().requires_grad_()
    grad = torch.randn(40, 40)
    cast(w, leaf).backward(grad)
    cast(w, plain).backward(grad)
    assert torch.equal(leaf.grad, plain.grad[order])


def test_special_values():
    levels = torch.tensor(NORMAL.table)
    assert cast(torch.zeros(4, 4), levels).eq(0).all()
    w = torch.randn(64, 32)
    w[0, 0], w[1, 1] = float("nan"), float("inf")
    sampled = cast(w, levels)
    assert sampled[:32].isnan().all()
    assert torch.equal(sampled[32:], cast(w[32:], levels))
    alone = cast(w, levels, scale="")
    assert (alone.isnan() == ~w.isfinite()).all()
    for factor in (2.0**-140, 2.0**-100, 2.0**100, 2.0**126):
        w = torch.rand(8, 8) * factor
        w[0, 0] = factor
        assert torch.equal(cast(w, levels), cast_oracle(w, levels, NORMAL.table))
        assert cast(w, levels).isfinite().all()


def test_a_table_without_parameter():
    """Frozen weights have the levels of their settings."""
    w = torch.randn(40, 40)
    assert torch.equal(cast(w, None), cast(w, torch.tensor(NORMAL.table)))


def test_strides_and_dtype():
    w = torch.randn(40, 50).t()
    sampled = cast(w, torch.tensor(NORMAL.table), out_dtype=torch.bfloat16)
    assert sampled.stride() == w.stride()
    assert torch.equal(sampled, cast(w.contiguous(), torch.tensor(NORMAL.table)).bfloat16())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients(case):
    """Straight through to the weight; to the levels the sum over their elements, in float64, rounded once."""
    settings = {"table": NORMAL.table, "block": (32, 32), "scale": "amax"} | case
    w = torch.randn(70, 90, requires_grad=True)
    levels = (torch.tensor(settings["table"]) + 0.01).requires_grad_()
    grad = torch.randn(70, 90)
    cast(w, levels, **settings).backward(grad)
    assert torch.equal(w.grad, grad)
    expected = gradient_oracle(grad, w, levels, settings["table"], settings["block"], scaled=bool(settings["scale"]))
    # Sums of 6,300 float64 numbers in two orders, then float32.
    torch.testing.assert_close(levels.grad, expected.float(), rtol=2e-7, atol=1e-9)


def test_gradcheck():
    """The result is linear in the levels as long as no element changes its own; float32 is exact at these numbers."""
    w = torch.tensor([[1.0, -1.0, 0.25, 0.6], [0.1, -0.7, 0.5, -0.25]])
    levels = torch.tensor([-1.0, -0.25, 0.5, 0.75], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda p: cast(w, p.float(), (-1.0, 0.0, 0.5, 1.0)).double(), levels, eps=2.0**-8, atol=1e-12, rtol=1e-12
    )


def test_sums():
    """Of whole numbers, whose sums are exact in whatever order."""
    numbers, parts = torch.randint(5, (1000,)), torch.randint(-1000, 1000, (1000,)).double()
    expected = np.bincount(numbers.numpy(), parts.numpy(), 7)
    for add in (nearest.sums_in_one_pass, nearest.sums_level_by_level):
        assert np.array_equal(add(numbers, parts, 7).numpy(), expected)


def test_the_operator_keeps_torchs_rules():
    w, levels = torch.randn(8, 8, requires_grad=True), torch.tensor(TERNARY.table, requires_grad=True)
    given = LevelsArguments(w, levels, list(TERNARY.table), 0, [32, 32], "amax")
    torch.library.opcheck(torch.ops.gws.cast_to_levels.default, given.call())


def test_errors():
    with torch._subclasses.FakeTensorMode(), pytest.raises(TypeError, match=r"float32.*got torch.float64"):
        cast(torch.empty(4, 4, dtype=torch.float64), None)
    with torch._subclasses.FakeTensorMode(), pytest.raises(RuntimeError, match=f"made for {LEVELS_VERSION + 1}"):
        cast(torch.empty(4, 4), None, version=LEVELS_VERSION + 1)
