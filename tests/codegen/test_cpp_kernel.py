"""The C++ kernel that samples a weight on a CPU: bit for bit the eager operator, and what Inductor makes of it."""

import re

import pytest
import torch
from support.operator import arguments, clock_of_width, cut, sample, sample_parts, whole_maxima
from support.oracle import assert_bits_equal
from torch._inductor.utils import fresh_cache, run_and_get_code

from gws_compile import LearnedBits
from gws_compile.numerics import widths
from gws_compile.torch_internals.cpp_template import cpp_vector_size

SIZE = cpp_vector_size(torch.device("cpu"))
pytestmark = pytest.mark.skipif(SIZE is None, reason="no vectors in C++ code here")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# Shape, dtype, settings; all of whole vectors (16 float32 values at most).
CASES = {
    "default": ((64, 128), F32, {}),
    "autocast": ((64, 128), F32, {"out_dtype": BF16}),
    "rows left over, a partial block": ((101, 80), F32, {}),
    "fewer rows than side by side": ((5, 64), BF16, {}),
    "several parts in a row": ((40, 2096), F32, {"out_dtype": BF16}),
    "bf16 weight": ((64, 80), BF16, {"fmt": "e2m1", "bits": 3.0, "scale": "ceil"}),
    "fp16 weight, out bf16": ((64, 80), F16, {"noise": "uniform", "bits": 4.5, "out_dtype": BF16}),
    "no scale": ((64, 80), F32, {"fmt": "e5m2", "noise": "uniform", "scale": ""}),
    "cast only": ((64, 80), F32, {"fmt": "e3m2", "noise": "none"}),
    "cast only, no scale": ((64, 80), BF16, {"fmt": "e8m3", "noise": "none", "scale": ""}),
    "bf16 grid": ((64, 80), F32, {"fmt": "e8m7", "bits": 9.0}),
    "23 mantissa bits": ((64, 80), F32, {"fmt": "e7m23", "bits": 24.0}),
    "blocks of one row": ((33, 96), F32, {"block": (1, 32)}),
    "blocks of many columns": ((33, 2208), F32, {"block": (4, 1104)}),
    "experts": ((3, 40, 48), F32, {"batch_dims": 1}),
    "convolution": ((20, 16, 3, 3), F32, {"noise": "uniform"}),
    "two batch dims": ((2, 3, 16, 32), F32, {"block": (4, 16), "batch_dims": 2}),
    "switched off": ((64, 80), F32, {"clock": torch.tensor([7, 0, 0, 0, 0], dtype=torch.int32)}),
    "amax": ((256, 256), F32, {"scale": "amax", "block": (128, 128), "out_dtype": BF16}),
    "amax, long rows": ((19, 2208), F32, {"fmt": "e2m1", "bits": 3.0, "scale": "amax", "block": (1, 0)}),
    "amax, a matrix each": ((3, 40, 48), F32, {"scale": "amax", "block": (0, 0), "batch_dims": 1}),
    "int4, groups": ((21, 320), F32, {"fmt": "int4", "bits": 4.0, "scale": "amax", "block": (1, 128)}),
    "int8, rows": ((21, 96), BF16, {"fmt": "int8", "bits": 8.0, "scale": "amax", "block": (1, 0)}),
    "int2, blocks of two rows": ((13, 96), F32, {"fmt": "int2", "noise": "none", "scale": "ceil", "block": (2, 32)}),
    "blocks of one column": ((67, 96), F32, {"block": (32, 1), "out_dtype": BF16}),
    "columns": ((35, 160), BF16, {"scale": "amax", "block": (0, 1), "noise": "uniform", "bits": 4.5}),
    "blocks of one column of experts": ((3, 20, 32), F32, {"block": (16, 1), "batch_dims": 1, "noise": "none"}),
    "blocks of four rows, a width from the clock": (
        (29, 96), BF16, {"bits": None, "clock": clock_of_width(3.7), "block": (4, 48), "out_dtype": F32},
    ),
}  # fmt: skip
# Maxima that a part of the weight does not have are computed before, by a loop of Inductor's.
NVFP4 = {"fmt": "e2m1", "bits": 3.0, "scale": "nvfp4"}
WITH_MAXIMA = {
    "nvfp4": ((101, 80), F32, {**NVFP4, "block": (16, 16)}),
    "nvfp4, one column": ((101, 80), BF16, {**NVFP4, "block": (16, 1)}),
    "nvfp4, rows": ((101, 80), BF16, {**NVFP4, "block": (1, 16), "noise": "none", "out_dtype": F32}),
    "nvfp4, experts": (
        (3, 40, 48), F32,
        {**NVFP4, "bits": None, "clock": clock_of_width(2.5), "block": (16, 16), "batch_dims": 1, "out_dtype": BF16},
    ),
    "a matrix beyond the cache": ((200, 1040), F32, {"scale": "amax", "block": (0, 0), "noise": "uniform"}),
    "blocks beyond the cache": ((260, 1024), F32, {"block": (256, 512), "out_dtype": BF16}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with fresh_cache():
        yield


def weight(shape, dtype):
    torch.manual_seed(0)
    w = torch.randn(shape) * 0.02
    if len(shape) == 2 and shape[0] >= 64:
        w[40, 40], w[63, 5], w[:32, 32:64] = float("nan"), float("-inf"), 0
        w[1, :16] = -0.0
    return w.to(dtype)


def compiled(run, *inputs):
    """The result of the compiled function and its code, in which every kernel is ours."""
    result, ours, others = compiled_kernels(run, *inputs)
    assert ours
    assert not others
    return result, ours


def compiled_kernels(run, *inputs):
    """The result of the compiled function, its kernels that are ours, and the others."""
    result, (code,) = run_and_get_code(torch.compile(run, fullgraph=True), *inputs)
    assert "torch.ops.gws" not in code
    kernels = re.findall(r"async_compile\.cpp_pybinding\(.*?'''\)", code, re.S)
    ours = [kernel for kernel in kernels if "const auto c0 = " in kernel]
    return result, ours, [kernel for kernel in kernels if kernel not in ours]


def test_equals_eager():
    """All cases in one compiled function: NaN, Inf, signed zeros and zero blocks included."""
    weights = [weight(shape, dtype) for shape, dtype, _ in CASES.values()]

    def run(weights):
        return [sample(*arguments(w, **s)) for w, (_, _, s) in zip(weights, CASES.values(), strict=True)]

    results, kernels = compiled(run, weights)
    assert len(kernels) == len(CASES)
    for got, want in zip(results, run(weights), strict=True):
        assert got.stride() == want.stride()
        assert_bits_equal(got, want)


def test_equals_eager_with_maxima_computed_before():
    """Scales of two levels, and blocks of which the cache holds a part: one more kernel, that finds the maxima."""
    weights = [weight(shape, dtype) for shape, dtype, _ in WITH_MAXIMA.values()]
    weights[-2:] = [w.nan_to_num() for w in weights[-2:]]  # a NaN there would leave little else

    def run(weights):
        return [sample(*arguments(w, **s)) for w, (_, _, s) in zip(weights, WITH_MAXIMA.values(), strict=True)]

    results, ours, _ = compiled_kernels(run, weights)
    assert len(ours) == len(WITH_MAXIMA)
    for got, want in zip(results, run(weights), strict=True):
        assert_bits_equal(got, want)


def test_parts_of_a_weight():
    """A shard is that part of the whole weight's sample: rows, columns, experts, and columns of a convolution."""
    cases = [
        ((96, 80), (32, 0), (64, 80), {}),
        ((40, 96), (0, 32), (40, 64), {}),
        ((64, 64), (32, 32), (32, 32), {}),
        ((6, 40, 48), (2, 0, 0), (3, 40, 48), {"batch_dims": 1}),
        ((6, 64, 48), (0, 32, 0), (6, 32, 48), {"batch_dims": 1}),
        ((8, 32, 4, 4), (0, 16, 0, 0), (8, 16, 4, 4), {}),
    ]
    wholes = [weight(shape, F32) for shape, *_ in cases]

    def run(parts):
        return sample_parts(parts, cases)

    results, _ = compiled(run, [cut(w, at, local) for w, (_, at, local, _) in zip(wholes, cases, strict=True)])
    for got, w, (_, at, local, settings) in zip(results, wholes, cases, strict=True):
        assert_bits_equal(got, cut(sample(*arguments(w, **settings)), at, local))


def test_parts_of_a_weight_whose_maxima_are_given():
    """What lies on several ranks has its maximum from all of them: matrices, rows, and the two levels of NVFP4."""
    cases = [
        ((96, 80), (32, 0), (64, 80), {**NVFP4, "block": (16, 16)}),
        ((5, 64, 48), (0, 0, 16), (5, 64, 32), {**NVFP4, "block": (1, 16), "batch_dims": 1, "out_dtype": BF16}),
        ((40, 96), (0, 48), (40, 48), {"scale": "amax", "block": (0, 0), "noise": "uniform"}),
        ((45, 96), (0, 48), (45, 48), {"fmt": "int8", "bits": 8.0, "scale": "amax", "block": (1, 0)}),
        ((40, 96), (16, 0), (24, 96), {"scale": "floor", "block": (0, 32)}),
    ]
    wholes = [weight(shape, F32).nan_to_num() for shape, *_ in cases]
    for w in wholes:
        w.view(-1)[0] = 3.0  # what no part has but the first
    parts = [cut(w, at, local) for w, (_, at, local, _) in zip(wholes, cases, strict=True)]
    maxima = [whole_maxima(w, **settings) for w, (*_, settings) in zip(wholes, cases, strict=True)]
    results, ours = compiled(lambda parts, maxima: sample_parts(parts, cases, maxima), parts, maxima)
    assert len(ours) == len(cases)
    for got, w, (_, at, local, settings) in zip(results, wholes, cases, strict=True):
        assert_bits_equal(got, cut(sample(*arguments(w, **settings)), at, local))


def test_element_indices_wrap_around():
    """A part far behind the first 2**32 elements of a weight."""
    whole, offset = (1 << 20, 1 << 14), ((1 << 19) + 32, 64)
    w = weight((32, 64), F32)

    def run(w):
        return sample(*arguments(w, part=(whole, offset)))

    assert_bits_equal(compiled(run, w)[0], run(w))


@pytest.mark.parametrize("granularity", ["block", "weight"])
def test_learned_widths(granularity):
    """Widths by block and by weight; drawn, without noise, and frozen."""
    torch.manual_seed(0)
    floats = LearnedBits(init=6, target=4).rule
    integers = LearnedBits(init=6, target=4, formats=("int3", "fp8_e4m3", "int8")).rule
    amax = {"scale": "amax"}
    cases = [
        ((101, 80), {}, floats),
        ((3, 40, 1072), {"batch_dims": 1, "noise": "uniform"}, floats),
        ((64, 80), {"noise": "none"}, floats),
        ((101, 80), amax, floats),
        ((3, 40, 48), {**amax, "batch_dims": 1, "noise": "uniform", "block": (1, 0), "fmt": "int8"}, integers),
    ]
    weights = [weight(shape, F32) for shape, *_ in cases]
    parameters = []
    for (shape, settings, _), w in zip(cases, weights, strict=True):
        matrices = shape[0] if "batch_dims" in settings else 1
        size = widths.parameter_shape(matrices, *w.shape[-2:], settings.get("block", (32, 32)), granularity)
        parameters.append(1 + torch.randn(size))

    def run(weights, parameters, clock):
        return [
            sample(*arguments(w, **{"fmt": "e8m7", "learned": b, "rule": rule.spec, "clock": clock, **settings}))
            for w, b, (_, settings, rule) in zip(weights, parameters, cases, strict=True)
        ]

    for clock in ([7, -1, 0, 0], [8, -1, -1, 0], [9, 0, 0, 0]):
        clock = torch.tensor(clock, dtype=torch.int32)
        results, kernels = compiled(run, weights, parameters, clock)
        assert len(kernels) == len(cases)
        for got, want in zip(results, run(weights, parameters, clock), strict=True):
            assert_bits_equal(got, want)


def test_weights_of_a_shape_share_a_kernel():
    """The kernel reads a weight and writes its sample, and stores nothing else."""
    weights = [weight((64, 128), F32), weight((64, 128), F32) + 1]

    def run(weights):
        return [sample(*arguments(w, out_dtype=BF16)) for w in weights]

    results, (code,) = run_and_get_code(torch.compile(run, fullgraph=True), weights)
    assert len(re.findall(r"async_compile\.cpp_pybinding", code)) == 1
    assert re.findall(r"= empty_strided_cpu\(\((.*?)\), \(.*?\), (.*?)\)", code) == [("64, 128", "torch.bfloat16")] * 2
    for got, want in zip(results, run(weights), strict=True):
        assert_bits_equal(got, want)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: (torch.randn(40, 70),), id="columns are no whole vectors"),
        pytest.param(lambda: (torch.randn(64, 96).t(),), id="strides"),
        pytest.param(lambda: (torch.randn(64, 96), {"block": (32, 4)}), id="narrow blocks"),
        pytest.param(
            lambda: (torch.randn(520, 1024), {"block": (260, 512)}),
            id="blocks beyond the cache that end inside of a part",
        ),
    ],
)
def test_other_weights_take_loops(make):
    w, *settings = make()

    def run(w):
        return sample(*arguments(w, **(settings[0] if settings else {})))

    result, (code,) = run_and_get_code(torch.compile(run, fullgraph=True), w)
    assert "torch.ops.gws" not in code
    assert "const auto c0 = " not in code
    assert_bits_equal(result, run(w))


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda s: s @ torch.ones(96, 8), id="product"),
        pytest.param(lambda s: s[::4] * 2, id="slice"),
        pytest.param(lambda s: s[::8].abs().sum(0), id="reduction"),
        pytest.param(lambda s: s + 1, id="elementwise"),
        pytest.param(lambda s: (s.t().contiguous(), s.view(64, 3, 32)[:, 1] + 1, s), id="several"),
    ],
)
def test_what_reads_a_sample(read):
    """Slices, views and reductions read the sample from memory; elementwise readers are fused with loops instead."""
    w = weight((64, 96), F32).nan_to_num()

    def run(w):
        return read(sample(*arguments(w)))

    got, want = torch.compile(run, fullgraph=True)(w), run(w)
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    for a, b in pairs:
        torch.testing.assert_close(a, b)
