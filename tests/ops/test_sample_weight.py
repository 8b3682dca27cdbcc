"""The operator: its registration, its gradient, and the C++ code that Inductor makes of it."""

import ast
import hashlib
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.operator import arguments, clock_of_width, cut, maximum, sample, sample_parts, whole_maxima
from support.oracle import as_matrices, assert_bits_equal, block_maximum_oracle, random_floats
from torch._inductor.utils import run_and_get_code

import gws_compile
from gws_compile.ops import masks
from gws_compile.ops.sample_arguments import OPERATOR_VERSION

PACKAGE = Path(gws_compile.__file__).parent


@pytest.mark.parametrize("noise", ["rounded_normal", "uniform", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(noise, dtype):
    w = torch.randn(40, 50, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.gws.sample_weight.default, arguments(w, noise=noise))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_out_dtype_is_a_conversion_behind_the_operator(dtype, out_dtype):
    """Values, strides and gradients, eager and compiled."""
    torch.manual_seed(0)
    w = torch.randn(70, 64, dtype=dtype).t().requires_grad_()
    upstream = torch.randn(64, 70, dtype=out_dtype)
    torch._dynamo.reset()

    def run(w, inside):
        return sample(*arguments(w, out_dtype=out_dtype if inside else None)).to(out_dtype)

    results = []
    for function, inside in [(run, False), (run, True), (torch.compile(run, fullgraph=True), True)]:
        w.grad = None
        out = function(w, inside)
        out.backward(upstream)
        results.append((out.detach(), w.grad))
    for out, grad in results[1:]:
        assert out.stride() == results[0][0].stride()
        assert_bits_equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_strides_are_kept():
    for w in (
        torch.randn(40, 50).t(),
        torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(2, 6, 7).transpose(1, 2),
    ):
        result = sample(*arguments(w))
        assert result.stride() == w.stride()
        # strides change neither blocks nor noise: they follow the logical index
        assert torch.equal(result, sample(*arguments(w.contiguous())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_the_identity(dtype):
    w = torch.randn(40, 50, dtype=dtype, requires_grad=True)
    upstream = torch.randn(40, 50, dtype=dtype)
    sample(*arguments(w, fmt="e2m1")).backward(upstream)
    assert torch.equal(w.grad, upstream)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other Python versions print the same code differently")
def test_version_is_raised_with_the_code():
    """Compile caches tell versions apart by the operators' versions alone: change them with what is computed."""
    sources = sorted(path for room in ("numerics", "ops", "codegen") for path in (PACKAGE / room).rglob("*.py"))
    code = [
        re.sub(r"OPERATOR_VERSION = \d+", "", ast.unparse(_Bare().visit(ast.parse(p.read_text())))) for p in sources
    ]
    code += [path.read_text() for path in sorted((PACKAGE / "codegen/cpp").glob("*.jinja"))]
    digest = hashlib.sha256("".join(code).encode()).hexdigest()[:16]
    assert (OPERATOR_VERSION, masks.VERSION, digest) == (9, 1, "f35bc2383ddc9bec")


class _Bare(ast.NodeTransformer):
    """Drops docstrings; comments and layout are no part of the tree."""

    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def test_errors():
    with torch._subclasses.FakeTensorMode(), pytest.raises(TypeError, match=r"float32.*got torch.float64"):
        sample(*arguments(torch.empty(4, 4, dtype=torch.float64), noise="none"))
    stale = (*arguments(torch.empty(4, 4), noise="none")[:-1], OPERATOR_VERSION - 1)
    with torch._subclasses.FakeTensorMode(), pytest.raises(RuntimeError, match=f"for {OPERATOR_VERSION - 1}"):
        sample(torch.empty(4, 4), *stale[1:])


CASES = {
    "default": {},
    "fp4, ceil": {"fmt": "e2m1", "bits": 3.0, "scale": "ceil"},
    "uniform, no scale": {"fmt": "e5m2", "noise": "uniform", "bits": 4.5, "scale": ""},
    "cast only": {"fmt": "e3m2", "noise": "none"},
    "bf16 grid": {"fmt": "e8m7", "bits": 9.0},
    "identity": {"fmt": "e8m23", "noise": "none"},
    "odd blocks": {"fmt": "e4m7", "bits": 9.0, "block": (7, 40)},
    "23 mantissa bits": {"fmt": "e7m23", "bits": 24.0},
}


def test_compiled_equals_eager():
    """All cases in one compiled function: bit for bit, partial blocks, NaN, Inf and zero blocks included."""
    torch.manual_seed(0)
    w = torch.randn(100, 72) * 0.02
    w[40, 40], w[70, 5], w[:32, 32:64] = float("nan"), float("-inf"), 0
    inputs = [
        (w.to(torch.bfloat16 if i % 3 == 2 else torch.float16 if i % 3 == 1 else torch.float32), settings, 0)
        for i, settings in enumerate(CASES.values())
    ]
    inputs += [
        (torch.randn(3, 40, 33), {}, 1),
        (torch.randn(8, 10, 3, 3), {}, 0),
        (torch.randn(8, 10, 3, 3).to(memory_format=torch.channels_last), {"noise": "uniform"}, 0),
        (torch.randn(40, 70).t(), {}, 0),
        (torch.randn(2, 3, 16, 33), {"block": (4, 7)}, 2),
    ]

    def run(weights):
        return [sample(*arguments(x, **s, batch_dims=b)) for x, (_, s, b) in zip(weights, inputs, strict=True)]

    weights = [x for x, _, _ in inputs]
    expected = run(weights)
    compiled, (code,) = run_and_get_code(torch.compile(run, fullgraph=True), weights)
    assert "torch.ops.gws" not in code
    for got, want in zip(compiled, expected, strict=True):
        assert got.stride() == want.stride()
        assert_bits_equal(got, want)


NVFP4 = {"fmt": "e2m1", "bits": 3.0, "scale": "nvfp4"}
# Weight and settings: exact scales and those of two levels, blocks as long as a weight, integers, moved widths.
SCALES = {
    "amax": ((100, 80), torch.float16, {"scale": "amax", "block": (64, 64)}),
    "amax, rows": (
        (50, 70), torch.bfloat16,
        {"fmt": "e5m2", "bits": None, "clock": clock_of_width(2.2), "scale": "amax", "block": (1, 0)},
    ),
    "amax, a matrix": ((40, 70), torch.float32, {"scale": "amax", "block": (0, 0), "noise": "none"}),
    "amax, convolution": (
        (8, 10, 3, 3), torch.bfloat16, {"scale": "amax", "block": (1, 0), "out_dtype": torch.float32},
    ),
    "nvfp4": ((100, 70), torch.float32, {**NVFP4, "block": (16, 16)}),
    "nvfp4, rows of experts": ((3, 40, 33), torch.float16, {**NVFP4, "block": (1, 16), "batch_dims": 1}),
    "int4, groups": ((70, 90), torch.float32, {"fmt": "int4", "bits": 4.0, "scale": "amax", "block": (1, 32)}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
def test_scales_compiled_equal_eager(name):
    """In Inductor's loops: columns that are no whole vectors, or an elementwise reader that is fused with them."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    shape, dtype, settings = SCALES[name]
    w = torch.randn(shape) * 0.02
    if shape[0] == 100:
        w[40, 40], w[70, 5], w[:32, 32:64], w[33] = float("nan"), float("-inf"), 0, -0.0
    w = w.to(dtype)
    if shape[0] == 70:
        w = w.t()

    def run(w):
        sampled = sample(*arguments(w, **settings))
        return -sampled if shape[1] == 80 else sampled

    got, (code,) = run_and_get_code(torch.compile(run, fullgraph=True), w)
    assert "torch.ops.gws" not in code
    assert "const auto c0 = " not in code  # no kernel of our own
    assert got.stride() == run(w).stride()
    assert_bits_equal(got, run(w))


@pytest.mark.parametrize("settings", [{}, {"scale": "amax", "block": (0, 0)}, {**NVFP4, "block": (16, 16)}], ids=str)
@pytest.mark.parametrize("noise", ["rounded_normal", "uniform"])
def test_a_width_from_the_clock_is_that_width(noise, settings):
    """No more than a constant that comes as a tensor: the sample is that of the fixed width."""
    w = torch.randn(40, 50)
    for bits in (2.0, 3.7, 5.0, 24.0):
        fixed = sample(*arguments(w, **{**settings, "noise": noise, "bits": bits}))
        moved = arguments(w, **{**settings, "noise": noise, "bits": None, "clock": clock_of_width(bits)})
        assert_bits_equal(sample(*moved), fixed)


MAXIMA = [  # shape, batch dims, dtype, block, only what is finite
    ((50, 70), 0, torch.float32, (0, 0), True),
    ((50, 70), 0, torch.bfloat16, (1, 0), False),
    ((64, 96), 0, torch.float32, (1, 0), False),
    ((50, 70), 0, torch.float32, (7, 40), True),
    ((3, 20, 33), 1, torch.float16, (0, 0), True),
    ((2, 3, 9, 17), 2, torch.float32, (10**6, 16), False),
    ((8, 5, 3, 3), 0, torch.bfloat16, (2, 0), True),
]


def test_weight_maximum():
    """Against numpy, eager and compiled: one value a block, as bits; NaN above all others, or no NaN and no Inf."""
    weights, expected = [], []
    for i, (shape, dims, dtype, block, finite) in enumerate(MAXIMA):
        w = random_floats(shape, i, (-127, 126) if dtype == torch.float32 else (-14, 14))
        w.flat[[5, 100]] = math.nan, -math.inf
        w[-1] = 0.0
        weights.append(torch.from_numpy(w).to(dtype))
        matrices = as_matrices(weights[-1].float().numpy(), dims)
        if finite:
            matrices = np.where(np.isfinite(matrices), matrices, np.float32(0))
        sides = [min(side or size, size) for side, size in zip(block, matrices.shape[1:], strict=True)]
        expected.append(block_maximum_oracle(matrices, sides)[:, :: sides[0], :: sides[1]])

    def run(weights):
        return [
            maximum(w, batch_dims=dims, block=block, finite=finite)
            for w, (_, dims, _, block, finite) in zip(weights, MAXIMA, strict=True)
        ]

    torch._dynamo.reset()
    compiled, (code,) = run_and_get_code(torch.compile(run, fullgraph=True), weights)
    assert "torch.ops.gws" not in code
    for results in (run(weights), compiled):
        for got, want in zip(results, expected, strict=True):
            assert got.dtype == torch.int32
            assert_bits_equal(got.view(torch.float32), torch.from_numpy(want.copy()))


def test_weight_maximum_as_an_operator():
    for shape, block in (((40, 50), [16, 0]), ((0, 50), [16, 0]), ((3, 0), [0, 0])):
        w = torch.randn(shape)
        torch.library.opcheck(torch.ops.gws.weight_maximum.default, (w, 0, block, True, OPERATOR_VERSION))
    w = torch.tensor([[1.0, math.nan], [-math.inf, 2.0]])
    assert_bits_equal(maximum(w, finite=True).view(torch.float32), torch.full((1, 1, 1), 2.0))
    # What ranks agree on is the largest of their bits: a NaN's, of either sign, are above those of Inf.
    rows = maximum(torch.tensor([[math.nan], [-math.nan], [math.inf], [-3.0]]), block=(1, 0)).flatten()
    assert (rows[:2] > rows[2]).all()
    assert rows[2] > rows[3] > 0


def test_parts_are_parts_of_the_whole_sample_with_its_maxima():
    """A part of a block has the block's maximum from `weight_maximum` of the whole: eager and compiled."""
    torch.manual_seed(0)
    cases = [
        ((96, 70), (32, 0), (64, 70), {**NVFP4, "block": (16, 16)}),
        ((40, 90), (0, 50), (40, 40), {"scale": "amax", "block": (0, 0), "noise": "uniform"}),
        ((20, 12, 3, 3), (0, 8, 0, 0), (20, 4, 3, 3), {"scale": "amax", "block": (1, 0)}),
        ((6, 40, 33), (2, 0, 0), (3, 40, 33), {**NVFP4, "block": (1, 16), "batch_dims": 1}),
        ((40, 90), (0, 60), (40, 30), {"fmt": "int8", "bits": 8.0, "scale": "amax", "block": (1, 0)}),
        ((40, 90), (0, 48), (40, 42), {**NVFP4, "block": (1, 16), "out_dtype": torch.bfloat16}),
        ((6, 40, 33), (0, 16, 0), (6, 24, 33), {**NVFP4, "block": (16, 16), "batch_dims": 1, "noise": "none"}),
        ((96, 70), (40, 0), (56, 70), {"scale": "amax", "block": (0, 0)}),
        ((4, 20, 90), (0, 0, 33), (4, 20, 57), {"fmt": "int4", "bits": 4.0, "block": (1, 0), "batch_dims": 1}),
        ((90, 70), (50, 0), (40, 70), {"scale": "floor", "block": (0, 32)}),
    ]
    wholes = [torch.randn(shape) for shape, *_ in cases]
    for w in wholes:
        w.view(-1)[0] = 9.0  # the maximum is not in the part
    parts = [cut(w, offset, local) for w, (_, offset, local, _) in zip(wholes, cases, strict=True)]
    maxima = [whole_maxima(w, **settings) for w, (*_, settings) in zip(wholes, cases, strict=True)]
    maxima[3] = maxima[3][2:5]  # of the experts that are here
    expected = [
        cut(sample(*arguments(w, **settings)), offset, local)
        for w, (_, offset, local, settings) in zip(wholes, cases, strict=True)
    ]

    def run(parts, maxima):
        return sample_parts(parts, cases[: len(parts)], maxima)

    for got, want in zip(run(parts, maxima), expected, strict=True):
        assert_bits_equal(got, want)
    compiled = torch.compile(run, fullgraph=True)  # what the C++ kernel takes is among its own tests
    for got, want in zip(compiled(parts[:2], maxima[:2]), expected[:2], strict=True):
        assert_bits_equal(got, want)


def test_parts_are_parts_of_the_whole_sample():
    """A shard of whole blocks, at its offset, is that part of the whole weight's sample: eager and compiled."""
    torch.manual_seed(0)
    cases = [
        ((96, 70), (32, 0), (64, 70), {}),
        ((70, 96), (0, 32), (70, 64), {"noise": "uniform"}),
        ((64, 64), (32, 32), (32, 32), {"fmt": "e2m1"}),
        ((6, 40, 33), (2, 0, 0), (3, 40, 33), {"batch_dims": 1}),
        ((20, 16, 3, 3), (8, 8, 0, 0), (12, 8, 3, 3), {"block": (4, 24)}),
        ((40, 40), (0, 0), (40, 40), {}),
    ]
    wholes = [torch.randn(shape) for shape, *_ in cases]

    def run(parts):
        return sample_parts(parts, cases)

    parts = [cut(w, offset, local) for w, (_, offset, local, _) in zip(wholes, cases, strict=True)]
    expected = [
        cut(sample(*arguments(w, **settings)), offset, local)
        for w, (_, offset, local, settings) in zip(wholes, cases, strict=True)
    ]
    for got in (run(parts), torch.compile(run, fullgraph=True)(parts)):
        for sampled, want in zip(got, expected, strict=True):
            assert_bits_equal(sampled, want)


def test_no_loop_loses_its_end():
    """Inductor's C++ loop splitting drops the rest of a loop that the block side does not divide."""
    torch.manual_seed(0)
    cases = [
        (torch.randn(shape), {"block": block, "noise": noise})
        for shape, block in [
            ((8, 40), (32, 32)), ((40, 8), (32, 32)), ((70, 45), (1, 32)), ((45, 70), (32, 1)),
            ((8, 5, 3, 3), (32, 32)),
        ]
        for noise in ("rounded_normal", "none")
    ]  # fmt: skip
    cases += [(w.t(), settings) for w, settings in cases if w.ndim == 2]

    def run(weights):
        return [sample(*arguments(w, **s)) for w, (_, s) in zip(weights, cases, strict=True)]

    weights = [w for w, _ in cases]
    for got, want in zip(torch.compile(run, fullgraph=True)(weights), run(weights), strict=True):
        assert_bits_equal(got, want)
    for w, settings in cases[:4]:  # alone in a graph, where no other division keeps the loop whole
        torch._dynamo.reset()
        assert_bits_equal(
            torch.compile(lambda w, s=settings: sample(*arguments(w, **s)))(w), sample(*arguments(w, **settings))
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", ["rounded_normal", "none"])
def test_generated_cpp_code(dtype, noise):
    """The loops with which an elementwise reader is fused: one kernel, one vector at a time, no float32 copy."""
    w = torch.randn(256, 512).to(dtype)

    def run(w):
        return -sample(*arguments(w, noise=noise)).to(torch.bfloat16)

    result, (code,) = run_and_get_code(torch.compile(run, fullgraph=True), w)
    assert_bits_equal(result, run(w))
    assert "torch.ops.gws" not in code
    assert len(re.findall(r"^cpp_fused\w+ = async_compile", code, re.M)) == 1
    buffers = re.findall(r"= empty_strided_cpu\(\(([\d, ]*)\), \([\d, ]*\), torch\.(\w+)\)", code)
    sizes = [(math.prod(int(n) for n in shape.split(",") if n.strip()), dtype) for shape, dtype in buffers]
    per_block = [(size, dtype) for size, dtype in sizes if size == 8 * 16]
    # The block maxima, amplitude, 1 / X and X; the columns' part of the element index; the result.
    assert len(per_block) == (3 if noise == "none" else 4)
    assert sorted(set(sizes) - set(per_block)) == [(512, "int32")] * (noise != "none") + [(256 * 512, "bfloat16")]
    # The hash and the cast in vectors: one float32 vector an iteration, and no scalar rest of the row.
    body = code[code.rindex("for(int64_t x0") :]
    assert "VectorizedN" not in body
    assert "std::array<int32_t, 16>" in body or "std::array<int32_t, 8>" in body
    assert body.count("for(int64_t x1") == 1
