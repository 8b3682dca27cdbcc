"""The operators with learned widths: samples against `quantize`, the gradient against its equation in float64."""

import math
import re

import numpy as np
import pytest
import torch
from support.oracle import (
    assert_bits_equal,
    block_maximum_oracle,
    noise_oracle,
    random_floats,
    random_words,
)
from torch._inductor.utils import run_and_get_code

import gws_compile
import gws_compile.codegen.lowering  # what torch.compile needs without the backend
from gws_compile import LearnedBits
from gws_compile.numerics.keys import key_words
from gws_compile.numerics.widths import parameter_shape
from gws_compile.ops.sample_arguments import OPERATOR_VERSION

pytestmark = pytest.mark.usefixtures("fresh")

RULE = LearnedBits().rule
KEY = torch.tensor(key_words(0, "w"), dtype=torch.int32)


def sample(
    w, parameter, rule, *, fmt="bf16", noise="none", clock=(0, 0, 0, 0, 0), block=(32, 32), scale="floor", batch_dims=0
):
    key = None if noise == "none" else KEY
    clock = None if noise == "none" else torch.tensor(clock, dtype=torch.int32)
    return torch.ops.gws.sample_weight(
        w, key, clock, batch_dims, gws_compile.FloatFormat.parse(fmt).spec, 0.0, noise, list(block), scale,
        parameter, rule.spec, [], [], None, None, True, 0, "", OPERATOR_VERSION,
    )  # fmt: skip


FORMATS = ("fp4_e2m1", "fp6_e3m2", "fp6_e2m3", "fp8_e4m3", "fp8_e5m2", "fp12_e4m7", "e5m10", "e2m22", "bf16")
INTEGERS = ("int2", "int4", "int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["floor", "ceil", "amax", ""])
def test_a_block_is_cast_as_quantize_casts_it(scale, dtype):
    """Every format as an operand of the mixed cast: bit for bit, weights of all magnitudes, NaN and zero blocks."""
    ordinary = random_floats((100, 72), 1, (-30, 5))
    for exponents in ((-30, 5), (-120, -90), (60, 90)):
        w = torch.from_numpy(np.where(np.arange(72) % 7 == 0, ordinary, random_floats((100, 72), 2, exponents)))
        if dtype == torch.float16:
            w = w.clamp(-60000, 60000)
        w = w.to(dtype)
        w[40, 40], w[:32, 32:64] = float("nan"), 0
        for fmt in FORMATS + INTEGERS * bool(scale):
            rule = LearnedBits(formats=(fmt,)).rule
            expected = gws_compile.quantize(w, fmt, scale=scale or None)
            expected[32:64, 32:64] = float("nan")  # the block maximum is read even where the cast alone would not
            assert_bits_equal(sample(w, torch.ones(()), rule, scale=scale), expected)


def test_each_block_has_its_own_format():
    """Widths chosen block by block, compiled and eager, with experts and partial blocks."""
    for shape, dims in (((100, 72), 0), ((3, 40, 70), 1), ((20, 10, 3, 3), 0)):
        torch._dynamo.reset()
        w = torch.randn(shape)
        matrices, rows, cols = learned_shape = (shape[0], *shape[1:]) if dims else (1, shape[0], math.prod(shape[1:]))
        size = parameter_shape(matrices, rows, cols, (32, 32), "block")
        five = [3.0, 4.0, 5.0, 9.0, 10.0]
        widths = torch.tensor(five)[torch.randint(5, size)]
        parameter = RULE.parameter(widths)
        expected = torch.empty(learned_shape)
        names = ["fp4_e2m1", "fp6_e3m2", "fp8_e4m3", "fp12_e4m7", "bf16"]
        casts = {b: gws_compile.quantize(w, f).view(learned_shape) for b, f in zip(five, names, strict=True)}
        by_matrix = widths.view(matrices, *size[-2:])
        for m in range(matrices):
            for i in range(size[-2]):
                for j in range(size[-1]):
                    at = (m, slice(32 * i, 32 * i + 32), slice(32 * j, 32 * j + 32))
                    expected[at] = casts[by_matrix[m, i, j].item()][at]
        assert_bits_equal(sample(w, parameter, RULE, batch_dims=dims), expected.view(shape))
        compiled = torch.compile(lambda w, b, dims=dims: sample(w, b, RULE, batch_dims=dims), fullgraph=True)
        assert_bits_equal(compiled(w, parameter), expected.view(shape))


@pytest.mark.parametrize("noise", ["rounded_normal", "uniform"])
def test_compiled_equals_eager(noise):
    """Noise at learned widths, bit for bit; switched off it is the cast of the widths' formats, frozen it is both."""
    w, parameter = torch.randn(100, 72), torch.rand(4, 3) * 4 - 1

    def run(w, b, clock):
        return torch.ops.gws.sample_weight(
            w,
            KEY,
            clock,
            0,
            "e8m7",
            0.0,
            noise,
            [32, 32],
            "floor",
            b,
            RULE.spec,
            [],
            [],
            None,
            None,
            True,
            0,
            "",
            OPERATOR_VERSION,
        )

    compiled = torch.compile(run, fullgraph=True)
    clocks = [
        torch.tensor(c, dtype=torch.int32)
        for c in ((3, -1, 0, 0, 0), (3, 0, 0, 0, 0), (3, -1, -1, 0, 0), (4, 0, -1, 0, 0))
    ]
    drawn, plain, frozen, frozen_plain = (compiled(w, parameter, c) for c in clocks)
    for got, clock in zip((drawn, plain, frozen, frozen_plain), clocks, strict=True):
        assert_bits_equal(got, run(w, parameter, clock))
    assert_bits_equal(plain, sample(w, parameter, RULE))
    assert_bits_equal(frozen_plain, plain)
    # The noise is that of the equation, cast to bf16 while widths move and to each block's format when they are frozen.
    words = random_words(np.arange(w.numel()), key_words(0, "w"), 3)
    r = noise_oracle(words, noise).reshape(w.shape)
    amax = block_maximum_oracle(w.numpy()[None], (32, 32))[0].astype(np.float64)
    b = RULE.widths(parameter).double().numpy().repeat(32, 0)[:100].repeat(32, 1)[:, :72]
    exact = torch.from_numpy(w.numpy() + r * amax * 2 ** (1 - b))
    assert ((drawn - exact).abs() <= exact.abs() * 2.0**-8 + amax.max() * 1e-5).all()
    assert_bits_equal(frozen, sample(frozen, parameter, RULE))  # on the grid already


def gradient_oracle(grad, w, step, noise, rule, parameter, block, dims):
    """The equation in float64, block by block."""
    shape = (w.shape[0], w.shape[1], math.prod(w.shape[2:])) if dims else (1, w.shape[0], math.prod(w.shape[1:]))
    r = noise_oracle(random_words(np.arange(w.numel()), key_words(0, "w"), step), noise).reshape(shape)
    value, grad = w.float().numpy().reshape(shape), grad.double().numpy().reshape(shape)
    amax = block_maximum_oracle(value, block)
    size = (shape[0], -(-shape[1] // block[0]), -(-shape[2] // block[1]))
    total = np.zeros(size)
    b = np.clip(rule.target + parameter.double().numpy() * (rule.init - rule.target), rule.min, rule.max)
    b = np.broadcast_to(b.reshape(size) if parameter.ndim else b, size)
    for m, i, j in np.ndindex(size):
        at = (m, slice(block[0] * i, block[0] * (i + 1)), slice(block[1] * j, block[1] * (j + 1)))
        a = float(amax[at].flat[0])
        total[m, i, j] = -math.log(2) * 2.0 ** (1 - b[m, i, j]) * a * float((grad[at] * r[at]).sum())
    total = total * (rule.init - rule.target)
    return torch.from_numpy(np.array(total.sum()) if parameter.ndim == 0 else total.reshape(parameter.shape))


@pytest.mark.parametrize(
    ("noise", "granularity"),
    [
        ("rounded_normal", "block"),
        pytest.param("rounded_normal", "weight", marks=pytest.mark.slow),
        pytest.param("uniform", "block", marks=pytest.mark.slow),
        pytest.param("uniform", "weight", marks=pytest.mark.slow),
    ],
)
def test_gradient_is_the_equation(noise, granularity):
    """Against float64, on whole and partial blocks, experts, convolutions and bfloat16; eager and compiled."""
    cases = [
        ((64, 96), 0, (32, 32), torch.float32),
        ((70, 45), 0, (32, 32), torch.float32),
        ((5, 7), 0, (32, 32), torch.float32),
        ((33, 100), 0, (16, 48), torch.bfloat16),
        ((3, 40, 33), 1, (32, 32), torch.float32),
        ((20, 10, 3, 3), 0, (8, 24), torch.float32),
    ]
    rule = LearnedBits(init=5.5, target=4.25).rule

    def run(weights, parameters):
        clock = torch.tensor([9, -1, 0, 0, 0], dtype=torch.int32)
        return [
            torch.ops.gws.sample_weight(
                w,
                KEY,
                clock,
                dims,
                "e8m7",
                0.0,
                noise,
                list(block),
                "floor",
                b,
                rule.spec,
                [],
                [],
                None,
                None,
                True,
                0,
                "",
                OPERATOR_VERSION,
            )
            for w, b, (_, dims, block, _) in zip(weights, parameters, cases, strict=True)
        ]

    weights = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape, _, _, dtype in cases]
    parameters = []
    for shape, dims, block, _ in cases:
        matrices = (shape[0], shape[1], math.prod(shape[2:])) if dims else (1, shape[0], math.prod(shape[1:]))
        size = parameter_shape(*matrices, block, granularity)
        parameters.append(torch.rand(size).requires_grad_())
    upstream = [torch.randn(w.shape, dtype=w.dtype) for w in weights]
    expected = [
        gradient_oracle(g, w.detach(), 9, noise, rule, b.detach(), block, dims)
        for g, w, b, (_, dims, block, _) in zip(upstream, weights, parameters, cases, strict=True)
    ]
    for call in (run, torch.compile(run, fullgraph=True)):
        for tensor in (*weights, *parameters):
            tensor.grad = None
        torch.autograd.backward(call(weights, parameters), upstream)
        for w, b, g, want in zip(weights, parameters, upstream, expected, strict=True):
            assert torch.equal(w.grad, g)  # the identity, as with fixed widths
            # 1e-5 of the largest: the sum over a block of up to 2e4 terms of either sign, in float32
            torch.testing.assert_close(b.grad.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_gradient_is_that_of_the_expected_loss():
    """Finite differences of the mean loss over 24 draws, the same draws on both sides."""
    w, target = torch.randn(64, 64), torch.randn(64, 64)
    rule = LearnedBits(formats=("fp4_e2m1", "e8m22")).rule

    def mean_loss(parameter):
        total = torch.zeros((), dtype=torch.float64)
        for step in range(24):
            used = sample(w, parameter, rule, fmt="e8m22", noise="rounded_normal", clock=(step, -1, 0, 0, 0))
            total = total + ((used - target) ** 2).double().sum() / 24
        return total

    parameter = torch.full((2, 2), 0.4).requires_grad_()
    mean_loss(parameter).backward()
    for at in ((0, 0), (1, 0)):
        shift = torch.zeros(2, 2)
        shift[at] = 2.0**-7
        difference = (mean_loss(parameter.detach() + shift) - mean_loss(parameter.detach() - shift)) / 2.0**-6
        assert parameter.grad[at].item() == pytest.approx(difference.item(), rel=2e-3)


def test_one_fused_reduction():
    """Backward draws R again and reduces it and the block maximum in one kernel beside the gradient's own."""
    w, b = torch.randn(256, 256, requires_grad=True), torch.ones(8, 8, requires_grad=True)

    def run(w, b):
        return sample(w, b, RULE, noise="rounded_normal", clock=(1, -1, 0, 0, 0)).square()

    _, codes = run_and_get_code(lambda: torch.compile(run, fullgraph=True)(w, b).sum().backward())
    backward = codes[-1]
    assert "torch.ops.gws" not in "".join(codes)
    assert len(re.findall(r"^cpp_fused\w+ = async_compile", backward, re.M)) == 1
    # The columns' part of the element index, the block maxima and the sums; the gradient of w takes the place of the
    # sample. Nothing holds R.
    assert re.findall(r"= empty_strided_cpu\(\(([^)]*)\)", backward) == ["256, ", "1, 8, 8", "1, 8, 8"]
