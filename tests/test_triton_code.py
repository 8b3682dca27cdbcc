"""The code that Inductor generates for a GPU: how many kernels, of which instructions, and that they compute the eager
kernel's bits. No GPU is needed, see `support.triton_stub`.

All generated code comes from one worker process, started by the first test that needs it.
"""

from __future__ import annotations

import itertools
import math
import re
from functools import cache

import pytest
import torch
from support.triton_stub import Call, Kernel, Outcome, compile_kernels, kernel_sources, run_calls
from torch import nn
from torch.nn import functional as F

import gws_compile
import gws_compile.lowering
from gws_compile.cast import needs_block_maximum
from gws_compile.formats import FloatFormat
from gws_compile.learned import WidthRule
from gws_compile.sampling import OPERATOR_VERSION

pytest.importorskip("triton")

KEYS = torch.tensor([[11, -12], [123456789, -987654321]], dtype=torch.int32)
ON = torch.tensor([7, -1], dtype=torch.int32)
OFF = torch.tensor([7, 0], dtype=torch.int32)
LEARNING = torch.tensor([7, -1, 0], dtype=torch.int32)
FROZEN = torch.tensor([7, -1, -1], dtype=torch.int32)
RULE = WidthRule.of(gws_compile.LearnedBits()).spec
BITS = {"e4m3": 5.0, "e2m1": 3.0, "e5m2": 4.0, "e8m7": 9.0, "e8m23": 24.0, "e7m23": 24.0}
NOISES = ("rounded_normal", "uniform", "none")
SCALES = ("floor", "ceil", "")
DTYPES = (torch.float32, torch.bfloat16)


# --- The functions that are compiled, in the worker -------------------------------------------------------------------


def sample(
    w: torch.Tensor,
    keys: torch.Tensor | None,
    clock: torch.Tensor | None,
    fmt: str,
    noise: str,
    scale: str,
    block: tuple[int, int],
    batch_dims: int,
) -> torch.Tensor:
    return torch.ops.gws.sample_weight(
        w, keys, clock, 1, batch_dims, fmt, BITS[fmt], noise, block, scale, None, "", [], [], True, OPERATOR_VERSION
    )


def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A linear layer under bf16 autocast."""
    w_hat = sample(w, KEYS, ON, "e4m3", "rounded_normal", "floor", (32, 32), 0)
    return F.linear(x, w_hat.to(torch.bfloat16))


def train_step(x: torch.Tensor, inner: str) -> list[torch.Tensor]:
    """Output and gradients of a model under the backend. No biases: their gradients are sums, in no fixed order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 70, bias=False), nn.ReLU(), nn.Linear(70, 8, bias=False))
    y = torch.compile(model, backend=gws_compile.backend(inner=inner, exclude=(), strict=True))(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


def learned(w: torch.Tensor, b: torch.Tensor, clock: torch.Tensor, noise: str) -> torch.Tensor:
    """A weight with learned widths, and the cast of autocast behind it."""
    return torch.ops.gws.sample_weight(
        w, KEYS, clock, 1, 0, "e8m7", 0.0, noise, (32, 32), "floor", b, RULE, [], [], True, OPERATOR_VERSION
    ).to(torch.bfloat16)


def bits_gradient(grad: torch.Tensor, w: torch.Tensor, b: torch.Tensor, noise: str) -> torch.Tensor:
    return torch.ops.gws.bits_gradient(
        grad, w, KEYS, LEARNING, b, 1, 0, noise, (32, 32), RULE, [], [], OPERATOR_VERSION
    )


def extrema(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.amax(1), x.amin(1)


# --- The calls -------------------------------------------------------------------------------------------------------


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def all_kinds_of_blocks() -> torch.Tensor:
    """Blocks of 32 x 32, partial at both ends: usual values, a NaN, an Inf; zeros, subnormals, the largest floats."""
    w = randn(40, 70) * 0.02
    w[0, 40], w[3, 66] = torch.nan, -torch.inf
    w[32:, :32] = 0
    w[32:, 32:64] *= 1e-37
    w[32:, 64:] = (w[32:, 64:] * 1e41).clamp(-3e38, 3e38)
    return w


def sample_call(
    w: torch.Tensor,
    fmt: str = "e4m3",
    noise: str = "rounded_normal",
    scale: str = "floor",
    *,
    block: tuple[int, int] = (32, 32),
    batch_dims: int = 0,
    clock: torch.Tensor = ON,
    interpret: bool = True,
) -> Call:
    source = (None, None) if noise == "none" else (KEYS, clock)
    return Call(sample, (w, *source, fmt, noise, scale, block, batch_dims), interpret=interpret)


# Each format with each noise; the scale rules and dtypes go round so that each meets each format and each noise.
SAMPLES = {
    f"{fmt}-{noise}-{scale or 'unscaled'}-{dtype}".replace("torch.", ""): sample_call(
        all_kinds_of_blocks().to(dtype), fmt, noise, scale
    )
    for (i, fmt), (j, noise) in itertools.product(enumerate(BITS), enumerate(NOISES))
    for scale, dtype in [(SCALES[(i + j) % 3], DTYPES[(i + j) % 2])]
} | {
    "experts": sample_call(randn(3, 20, 33), block=(16, 16), batch_dims=1),
    "stacked experts": sample_call(randn(2, 2, 9, 17), block=(4, 7), batch_dims=2),
    "convolution": sample_call(randn(8, 5, 3, 3)),
    "convolution, channels last": sample_call(randn(8, 5, 3, 3).to(memory_format=torch.channels_last)),
    "transposed": sample_call(randn(40, 70).t()),
    "float16": sample_call(randn(40, 70).half()),
    "noise off": sample_call(all_kinds_of_blocks(), clock=OFF),
}
# Index arithmetic differs: a width that is a power of two is divided by shifts.
LINEARS = {
    f"linear {rows} x {cols}": Call(linear, (meta(16, cols, dtype=torch.bfloat16), meta(rows, cols)), interpret=False)
    for rows, cols in [(4096, 4096), (2304, 768)]
}
WIDTHS = torch.tensor([[1.0, -0.5, 0.0], [0.49, 2.4, 9.0]])  # 6, 3, 4, 4.98, 8.8 and 10 bits
LEARNED = {
    "learned": Call(learned, (all_kinds_of_blocks(), WIDTHS, LEARNING, "rounded_normal")),
    "learned, uniform": Call(learned, (randn(40, 70), WIDTHS, LEARNING, "uniform")),
    "learned, frozen": Call(learned, (randn(40, 70).bfloat16(), WIDTHS, FROZEN, "rounded_normal")),
    "learned, noise off": Call(learned, (all_kinds_of_blocks(), WIDTHS, OFF.new_tensor([7, 0, 0]), "rounded_normal")),
    "learned, a width per weight": Call(learned, (randn(40, 70), torch.tensor(0.3), LEARNING, "rounded_normal")),
}
GRADIENTS = {
    "gradient": Call(bits_gradient, (randn(40, 70, seed=1), randn(40, 70), WIDTHS, "rounded_normal")),
    "gradient, uniform": Call(bits_gradient, (randn(40, 70, seed=1), randn(40, 70), WIDTHS, "uniform")),
    "gradient of a weight": Call(bits_gradient, (randn(40, 70, seed=1), randn(40, 70), torch.tensor(0.3), "uniform")),
}
LARGE = {
    "learned 4096 x 4096": Call(
        learned, (meta(4096, 4096), meta(128, 128), LEARNING, "rounded_normal"), interpret=False
    ),
    "gradient 4096 x 4096": Call(
        bits_gradient, (meta(4096, 4096), meta(4096, 4096), meta(128, 128), "rounded_normal"), interpret=False
    ),
}
BEYOND_INT32, TRAIN, EXTREMA = "more than 2**31 elements", "training", "extrema"
CALLS = (SAMPLES | LINEARS | LEARNED | GRADIENTS | LARGE) | {
    BEYOND_INT32: sample_call(meta(2**16, 2**15 + 2, dtype=torch.bfloat16), interpret=False),
    TRAIN: Call(train_step, (randn(4, 40), "inductor"), compiled=False),
    EXTREMA: Call(extrema, (torch.tensor([[1.0, -3.0, 2.0], [5.0, torch.nan, -1.0], [-torch.inf, 0.0, 0.5]]),)),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return dict(zip(CALLS, run_calls(list(CALLS.values())), strict=True))


def code(outcome: Outcome, graph: int = 0) -> str:
    """The generated source without its comments, which quote the graph."""
    return re.sub(r"(?m)^\s*#.*\n", "", outcome.sources[graph])


compiled_kernels = cache(compile_kernels)


# --- Kernels ---------------------------------------------------------------------------------------------------------


def test_a_weight_costs_two_kernels_and_no_copy(outcomes):
    source = code(outcomes["linear 4096 x 4096"])
    maximum, sampling = kernel_sources(source).values()
    assert "@triton_heuristics.reduction(" in maximum
    assert "@triton_heuristics.pointwise(" in sampling
    # The block maxima, the sampled weight (once, as bf16: the cast behind the operator is fused into it), the result.
    buffers = re.findall(r"= empty_strided_cuda\(\(([\d, ]+)\), \([\d, ]+\), torch\.(\w+)\)", source)
    assert [shape for shape, _ in buffers] == ["1, 128, 128", "4096, 4096", "16, 4096"]
    assert [dtype for _, dtype in buffers[1:]] == ["bfloat16", "bfloat16"]
    assert re.findall(r"extern_kernels\.(\w+)\(", source) == ["mm"]


@pytest.mark.parametrize("name", SAMPLES)
def test_kernel_count(outcomes, name):
    fmt, noise, scale = SAMPLES[name].args[3:6]
    wanted = 1 + needs_block_maximum(FloatFormat.parse(fmt), scale or None, noise)
    if name == "convolution, channels last":
        wanted += 1  # Inductor splits a reduction over a dim that is not the innermost in memory into two kernels.
    assert len(kernel_sources(outcomes[name].sources[0])) == wanted


@pytest.mark.parametrize("name", [*SAMPLES, *LINEARS])
def test_no_call_outside_the_kernels(outcomes, name):
    assert "torch.ops.gws" not in code(outcomes[name])
    assert set(re.findall(r"\b(?:libdevice|tl_math)\.(\w+)", code(outcomes[name]))) <= {"abs"}


@pytest.mark.parametrize("name", [*SAMPLES, *LINEARS])
def test_indices_are_int32(outcomes, name):
    assert "tl.int64" not in code(outcomes[name])
    assert "'i64'" not in code(outcomes[name])


def test_a_weight_beyond_int32_is_indexed_by_int64(outcomes):
    """What the test above looks for does turn up where it has to."""
    assert "tl.int64" in code(outcomes[BEYOND_INT32])
    assert "'xnumel': 'i64'" in code(outcomes[BEYOND_INT32])


# --- Results ---------------------------------------------------------------------------------------------------------


def assert_same_bits(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    assert actual.dtype == wanted.dtype
    assert actual.stride() == wanted.stride()
    torch.testing.assert_close(actual.isnan(), wanted.isnan(), rtol=0, atol=0)
    integer = {2: torch.int16, 4: torch.int32}[wanted.element_size()]
    actual, wanted = (
        x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).view(integer) for x in (actual, wanted)
    )
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", SAMPLES)
def test_results_are_those_of_the_eager_kernel(outcomes, name):
    assert_same_bits(outcomes[name].result, sample(*SAMPLES[name].args))


@pytest.mark.parametrize("name", LEARNED)
def test_learned_widths_are_those_of_the_eager_kernel(outcomes, name):
    assert_same_bits(outcomes[name].result, learned(*LEARNED[name].args))


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_widths_are_those_of_the_eager_kernel(outcomes, name):
    """But for the order of a sum."""
    wanted = bits_gradient(*GRADIENTS[name].args)
    torch.testing.assert_close(outcomes[name].result, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_kernels_of_learned_widths(outcomes):
    """Sampling: the block maximum with what follows from it per block, and the weight's own loop. The gradient: one
    loop over the weight for both reductions. No spills, no calls, 32-bit integers."""
    counts = {name: len(kernel_sources(outcomes[name].sources[0])) for name in LARGE}
    assert counts == {"learned 4096 x 4096": 2, "gradient 4096 x 4096": 1}
    for name in LARGE:
        source = code(outcomes[name])
        assert "torch.ops.gws" not in source
        assert set(re.findall(r"\b(?:libdevice|tl_math)\.(\w+)", source)) <= {"abs"}
        assert "tl.int64" not in source
        for kernel in compiled_kernels(outcomes[name].sources[0], 90):
            assert (kernel.spills, kernel.stack) == (0, 0)
            assert ".ftz" not in kernel.ptx


def test_a_training_step_is_that_of_the_eager_kernel(outcomes):
    actual, wanted = outcomes[TRAIN].result, train_step(CALLS[TRAIN].args[0], "eager")
    for a, w in zip(actual, wanted, strict=True):
        assert_same_bits(a, w)
    forward, backward = (kernel_sources(source) for source in outcomes[TRAIN].sources)
    assert len([name for name in forward if "sample_weight" in name]) == 2 * 2
    assert not [name for name in backward if "sample_weight" in name]


def test_the_interpreter_hands_on_nan(outcomes):
    """Of the helper: its NumPy form of Inductor's reductions is the one that a NaN in a block relies on."""
    for actual, wanted in zip(outcomes[EXTREMA].result, extrema(*CALLS[EXTREMA].args), strict=True):
        assert_same_bits(actual, wanted)


# --- Instructions ----------------------------------------------------------------------------------------------------


def kernels(outcome: Outcome, capability: int = 90) -> list[Kernel]:
    """The kernel of the block maxima, and the sampling kernel."""
    return compiled_kernels(outcome.sources[0], capability)


EACH_GPU = pytest.mark.parametrize(
    ("name", "capability"), [(name, 90) for name in LINEARS] + [("linear 4096 x 4096", 80), ("linear 4096 x 4096", 100)]
)


@EACH_GPU
def test_kernels_compile_without_spills(outcomes, name, capability):
    maximum, sampling = kernels(outcomes[name], capability)
    for kernel in (maximum, sampling):
        assert kernel.spills == 0
        assert kernel.stack == 0
    assert sampling.registers <= 40  # an SM's 65536 registers hold three quarters of its 2048 threads


@EACH_GPU
def test_rounding_is_left_alone(outcomes, name, capability):
    """A fused multiply-add rounds once where the eager kernel rounds twice, unless the product is exact: by a power of
    two. And .ftz would drop subnormals."""
    for kernel in kernels(outcomes[name], capability):
        for operands in re.findall(r"\bFFMA\S* ([^;]*);", kernel.sass):
            factors = re.findall(r" -?([\d.]+(?:e[+-]?\d+)?)(?:,|$)", operands)
            assert [f for f in factors if math.frexp(float(f))[0] == 0.5], operands
        assert ".ftz" not in kernel.ptx


@pytest.mark.parametrize("name", LINEARS)
def test_64_bit_arithmetic_is_for_addresses_alone(outcomes, name):
    for kernel in kernels(outcomes[name]):
        arithmetic = r"(?m)^\s+(?:@%p\d+ )?((?:add|sub|mul|mad|div|rem|shl|shr|and|or|xor|min|max|cvt)\.[\w.]+) "
        wide = [opcode for opcode in re.findall(arithmetic, kernel.ptx) if re.search("64|wide", opcode)]
        assert set(wide) <= {"add.s64", "mul.wide.s32", "mad.wide.s32"}
        # One or two a load or store, each of several elements; the loads of single block maxima are the most.
        accesses = re.findall(r"\b(?:ld|st)\.global\b", kernel.ptx)
        assert len(wide) <= 2 * len(accesses)


def test_instructions_per_element(outcomes):
    """fp32 weight -> fp8_e4m3 grid -> bf16 on sm_90, in the first of the configurations that Inductor times."""
    limits = {"linear 4096 x 4096": (30, 60), "linear 2304 x 768": (30, 80)}
    for name, (maximum_limit, sampling_limit) in limits.items():
        maximum, sampling = kernels(outcomes[name])
        assert sampling.config.startswith("XBLOCK=1024, num_warps=4")
        assert maximum.instructions_per_element <= maximum_limit
        assert sampling.instructions_per_element <= sampling_limit
