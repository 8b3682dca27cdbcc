"""The operator: its registration, its gradient, and the C++ code that Inductor makes of it."""

import ast
import hashlib
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from support.operator import arguments, cut, sample, sample_parts
from support.oracle import assert_bits_equal
from torch._inductor.utils import run_and_get_code

import gws_compile
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
    """Compile caches tell versions apart by the operator's version alone: change it with what is computed."""
    sources = sorted(path for room in ("numerics", "ops", "codegen") for path in (PACKAGE / room).rglob("*.py"))
    code = [
        re.sub(r"OPERATOR_VERSION = \d+", "", ast.unparse(_Bare().visit(ast.parse(p.read_text())))) for p in sources
    ]
    code.append((PACKAGE / "codegen/cpp/sample_weight.cpp.jinja").read_text())
    digest = hashlib.sha256("".join(code).encode()).hexdigest()[:16]
    assert (OPERATOR_VERSION, digest) == (7, "4567b043062bd89f")


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
