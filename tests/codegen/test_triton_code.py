"""The code that Inductor generates for a GPU: how many kernels, of which instructions, and that they compute the eager
kernel's bits. No GPU is needed, see `offline_gpu`.

All generated code comes from one worker process, started by the first test that needs it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from functools import cache

import codegen
import pytest
import torch
from offline_gpu import Call, Outcome, compile_kernels, kernel_sources, run_calls
from torch import nn

import gws_compile
import gws_compile.codegen.lowering
import gws_compile.codegen.masks
from gws_compile.numerics.formats import FloatFormat
from gws_compile.numerics.scales import needs_block_maximum
from gws_compile.ops.masks import VERSION
from gws_compile.ops.sample_arguments import OPERATOR_VERSION

pytest.importorskip("triton")

KEY = torch.tensor([123456789, -987654321], dtype=torch.int32)
ON = torch.tensor([7, -1, 0, 0, 0], dtype=torch.int32)
OFF = torch.tensor([7, 0, 0, 0, 0], dtype=torch.int32)
FROZEN = torch.tensor([7, -1, -1, 0, 0], dtype=torch.int32)
RULE = gws_compile.LearnedBits().rule.spec
BITS = {"e4m3": 5.0, "e2m1": 3.0, "e5m2": 4.0, "e8m7": 9.0, "e8m23": 24.0, "e7m23": 24.0}
NOISES = ("rounded_normal", "uniform", "none")
SCALES = ("floor", "ceil", "")
DTYPES = (torch.float32, torch.bfloat16)


# --- The functions that are compiled, in the worker -------------------------------------------------------------------


def sample(
    w: torch.Tensor,
    key: torch.Tensor | None,
    clock: torch.Tensor | None,
    fmt: str,
    noise: str,
    scale: str,
    block: tuple[int, int],
    batch_dims: int,
    out_dtype: torch.dtype | None = None,
    shard: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
) -> torch.Tensor:
    weight = (w, key, clock, batch_dims)
    rest = (None, "", *shard, None, out_dtype, True, 0, "", OPERATOR_VERSION)
    return torch.ops.gws.sample_weight(*weight, fmt, {**BITS, "int4": 4.0}[fmt], noise, block, scale, *rest)


def moved_width(w: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
    """A weight whose width is the clock's fourth word."""
    rest = (None, "", [], [], None, None, True, 0, "", OPERATOR_VERSION)
    return torch.ops.gws.sample_weight(w, KEY, clock, 0, "e4m3", None, "rounded_normal", (16, 32), "amax", *rest)


def weight_maximum(w: torch.Tensor, block: tuple[int, int], batch_dims: int, finite: bool) -> torch.Tensor:
    return torch.ops.gws.weight_maximum(w, batch_dims, block, finite, OPERATOR_VERSION)


def train_step(x: torch.Tensor, inner: str) -> list[torch.Tensor]:
    """Output and gradients of a model under the backend. No biases: their gradients are sums, in no fixed order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 70, bias=False), nn.ReLU(), nn.Linear(70, 8, bias=False))
    y = torch.compile(model, backend=gws_compile.backend(inner=inner, exclude=(), strict=True))(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


def learned(w: torch.Tensor, b: torch.Tensor, clock: torch.Tensor, noise: str, scale: str = "floor") -> torch.Tensor:
    """A weight with learned widths, and the cast of autocast behind it."""
    return torch.ops.gws.sample_weight(
        w,
        KEY,
        clock,
        0,
        "e8m7",
        0.0,
        noise,
        (32, 32),
        scale,
        b,
        RULE,
        [],
        [],
        None,
        None,
        True,
        0,
        "",
        OPERATOR_VERSION,
    ).to(torch.bfloat16)


def bits_gradient(grad: torch.Tensor, w: torch.Tensor, b: torch.Tensor, noise: str) -> torch.Tensor:
    return torch.ops.gws.bits_gradient(grad, w, KEY, ON, b, 0, noise, (32, 32), RULE, [], [], None, OPERATOR_VERSION)


def rounded(x: torch.Tensor, settings: tuple, batch_dims: int = 0) -> torch.Tensor:
    """An operand behind a pointwise operation; the settings are format, block, scale, rounding."""
    fmt, block, scale, rounding = settings
    source = (KEY, ON) if rounding == "stochastic" else (None, None)
    return torch.ops.gws.round_operand(x * 2, *source, batch_dims, fmt, block, scale, rounding, 3, 0, OPERATOR_VERSION)


def transformed(x: torch.Tensor, size: int, rows: bool) -> torch.Tensor:
    return torch.ops.gws.hadamard(x, size, 0, rows, OPERATOR_VERSION)


def masked(w: torch.Tensor, batch_dims: int, over_rows: bool, kept: int, of: int) -> torch.Tensor:
    """A sparse weight, as the backend masks it."""
    mask = torch.ops.gws.element_mask(w, batch_dims, over_rows, kept, of, VERSION)
    held = torch.ops.gws.apply_mask(w, mask, None, VERSION)
    sampled = sample(held, KEY, ON, "e4m3", "rounded_normal", "floor", (32, 32), batch_dims)
    return torch.ops.gws.apply_mask(sampled, mask, w, VERSION)


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


def whole_blocks() -> torch.Tensor:
    """The same, but that all blocks are whole."""
    w = randn(64, 96, seed=3) * 0.02
    w[3, 40], w[40, 66] = torch.nan, -torch.inf
    w[32:, :32] = 0
    w[32:, 32:64] *= 1e-37
    w[:32, 64:] = (w[:32, 64:] * 1e41).clamp(-3e38, 3e38)
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
    out_dtype: torch.dtype | None = None,
    shard: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
) -> Call:
    source = (None, None) if noise == "none" else (KEY, clock)
    return Call(sample, (w, *source, fmt, noise, scale, block, batch_dims, out_dtype, shard), interpret=interpret)


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
# Weights of whole blocks, which are read once: each format and noise; scale rules and dtypes going round, results in
# the weight's dtype and in bfloat16 by turns.
ONCE = {
    f"whole blocks {name}": dataclasses.replace(
        call, args=(whole_blocks().to(call.args[0].dtype), *call.args[1:8], (None, torch.bfloat16)[i % 2])
    )
    for i, (name, call) in enumerate(list(SAMPLES.items())[: len(BITS) * len(NOISES)])
    if needs_block_maximum(FloatFormat.parse(call.args[3]), call.args[5] or None, call.args[4])
} | {
    "whole blocks of experts": sample_call(randn(3, 32, 48), block=(16, 16), batch_dims=1),
    "whole blocks of stacked experts": sample_call(randn(2, 2, 8, 16), block=(4, 8), batch_dims=2),
    "whole blocks of a convolution": sample_call(randn(16, 8, 3, 3), block=(8, 24)),
    "one row a block": sample_call(randn(24, 64), block=(1, 32), out_dtype=torch.bfloat16),
    "part of a weight": sample_call(randn(32, 64), shard=((96, 128), (32, 64))),
    "part of experts": sample_call(randn(2, 32, 32), batch_dims=1, shard=((6, 64, 96), (2, 32, 64))),
}
# Exact scales and those of two levels, integers, blocks as long as a row or a matrix, also beyond what a program keeps.
EXACT = {
    "amax": sample_call(all_kinds_of_blocks(), scale="amax"),
    "amax, whole blocks": sample_call(whole_blocks(), "e5m2", "uniform", "amax", out_dtype=torch.bfloat16),
    "amax, bf16 weight as float32": sample_call(randn(32, 64).bfloat16(), scale="amax", out_dtype=torch.float32),
    "amax, rows": sample_call(randn(12, 72), scale="amax", block=(1, 0)),
    "amax, long rows": sample_call(randn(6, 1100), scale="amax", block=(1, 0)),
    "amax, a matrix": sample_call(randn(40, 70), noise="none", scale="amax", block=(0, 0)),
    "nvfp4": sample_call(all_kinds_of_blocks(), "e2m1", scale="nvfp4", block=(16, 16)),
    "nvfp4, whole blocks": sample_call(
        whole_blocks(), "e2m1", "uniform", "nvfp4", block=(16, 16), out_dtype=torch.bfloat16
    ),
    "nvfp4, experts": sample_call(randn(3, 32, 48), "e2m1", scale="nvfp4", block=(16, 16), batch_dims=1),
    "int4, groups": sample_call(randn(12, 160), "int4", scale="amax", block=(1, 64)),
}
MOVED_CLOCK = torch.cat([ON[:3], torch.tensor([2.0**-2.7]).view(torch.int32), ON[4:]])
MOVED = {"amax, a width from the clock": Call(moved_width, (randn(40, 70), MOVED_CLOCK))}
MAXIMA = {
    "maxima of blocks": Call(weight_maximum, (all_kinds_of_blocks(), (16, 32), 0, False)),
    "maxima of rows": Call(weight_maximum, (randn(6, 1100).bfloat16(), (1, 0), 0, False)),
    "finite maxima of matrices": Call(weight_maximum, (all_kinds_of_blocks().view(2, 20, 70), (0, 0), 1, True)),
}
# Index arithmetic differs: a width that is a power of two is divided by shifts.
LINEARS = {name: codegen.call(codegen.CASES[name]) for name in ("4096 x 4096", "2304 x 768")}
TWICE = {f"{name}, read twice": codegen.call(codegen.CASES[f"{name}, read twice"]) for name in LINEARS}
WIDTHS = torch.tensor([[1.0, -0.5, 0.0], [0.49, 2.4, 9.0]])  # 6, 3, 4, 4.98, 8.8 and 10 bits
LEARNED = {
    "learned": Call(learned, (all_kinds_of_blocks(), WIDTHS, ON, "rounded_normal")),
    "learned, uniform": Call(learned, (randn(40, 70), WIDTHS, ON, "uniform")),
    "learned, frozen": Call(learned, (randn(40, 70).bfloat16(), WIDTHS, FROZEN, "rounded_normal")),
    "learned, noise off": Call(learned, (all_kinds_of_blocks(), WIDTHS, OFF, "rounded_normal")),
    "learned, amax": Call(learned, (all_kinds_of_blocks(), WIDTHS, FROZEN, "rounded_normal", "amax")),
    "learned, a width per weight": Call(learned, (randn(40, 70), torch.tensor(0.3), ON, "rounded_normal")),
}
GRADIENTS = {
    "gradient": Call(bits_gradient, (randn(40, 70, seed=1), randn(40, 70), WIDTHS, "rounded_normal")),
    "gradient, uniform": Call(bits_gradient, (randn(40, 70, seed=1), randn(40, 70), WIDTHS, "uniform")),
    "gradient of a weight": Call(bits_gradient, (randn(40, 70, seed=1), randn(40, 70), torch.tensor(0.3), "uniform")),
}
LARGE = {
    "learned 4096 x 4096": Call(learned, (meta(4096, 4096), meta(128, 128), ON, "rounded_normal"), interpret=False),
    "gradient 4096 x 4096": Call(
        bits_gradient, (meta(4096, 4096), meta(4096, 4096), meta(128, 128), "rounded_normal"), interpret=False
    ),
}
OPERANDS = {
    f"operand {' '.join(map(str, settings))} {tuple(x.shape)}": Call(rounded, (x, settings, x.ndim - 2))
    for x, settings in (
        (randn(40, 96), ("e4m3", (1, 32), "floor", "nearest")),
        (randn(96, 40), ("e4m3", (32, 1), "floor", "nearest")),
        (randn(32, 64).bfloat16(), ("e2m1", (1, 16), "nvfp4", "stochastic")),
        (randn(64, 24).bfloat16(), ("e2m1", (16, 1), "nvfp4", "stochastic")),
        (randn(2, 24, 64), ("e5m2", (1, 0), "amax", "stochastic")),
        (randn(24, 40), ("e5m2", (0, 0), "amax", "nearest")),
        (randn(24, 64).half(), ("e4m3", (1, 32), "unit", "nearest")),
        (randn(24, 200), ("e4m3", (1, 128), "amax", "nearest")),
    )
}
TRANSFORMS = {
    "rotated features": Call(transformed, (randn(24, 64), 16, False)),
    "rotated tokens": Call(transformed, (randn(64, 24).bfloat16(), 32, True)),
}
MASKED = {
    f"masked {kept}:{of}{', rows' if over_rows else ''}, {tuple(w.shape)}": Call(
        masked, (w, batch_dims, over_rows, kept, of)
    )
    for w, batch_dims, over_rows, kept, of in (
        (randn(40, 72), 0, False, 2, 4),
        (randn(72, 40).bfloat16(), 0, True, 2, 4),
        (randn(3, 16, 24), 1, True, 1, 8),
        (randn(8, 4, 3, 3), 0, False, 4, 6),
    )
}
BEYOND_INT32, TRAIN, EXTREMA = "more than 2**31 elements", "training", "extrema"
CALLS = (
    SAMPLES
    | ONCE
    | EXACT
    | MOVED
    | MAXIMA
    | LINEARS
    | TWICE
    | LEARNED
    | GRADIENTS
    | LARGE
    | OPERANDS
    | TRANSFORMS
    | MASKED
) | {
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


@pytest.mark.parametrize("name", LINEARS)
def test_a_weight_costs_one_kernel_that_reads_it_once(outcomes, name):
    source = code(outcomes[name])
    (kernel,) = kernel_sources(source).values()
    assert "@triton_heuristics.persistent_reduction(" in kernel
    assert len(re.findall(r"tl\.load\(in_ptr0 \+", kernel)) == 1
    # The sampled weight, as bf16, and the result: not even the block maxima are stored.
    rows, cols = map(int, name.split()[::2])
    buffers = re.findall(r"= empty_strided_cuda\(\(([\d, ]+)\), \([\d, ]+\), torch\.(\w+)\)", source)
    assert buffers == [(f"1, {rows}, {cols}", "bfloat16"), (f"16, {rows}", "bfloat16")]
    assert re.findall(r"extern_kernels\.(\w+)\(", source) == ["mm"]


def test_a_cast_behind_the_operator_costs_two_kernels_and_no_copy(outcomes):
    source = code(outcomes["4096 x 4096, read twice"])
    maximum, sampling = kernel_sources(source).values()
    assert re.search(r"@triton_heuristics\.(persistent_)?reduction\(", maximum)  # the first up to torch 2.14
    assert "@triton_heuristics.pointwise(" in sampling
    # The block maxima, the sampled weight (once, as bf16: the cast behind the operator is fused into it), the result.
    buffers = re.findall(r"= empty_strided_cuda\(\(([\d, ]+)\), \([\d, ]+\), torch\.(\w+)\)", source)
    assert [shape for shape, _ in buffers] == ["1, 128, 128", "4096, 4096", "16, 4096"]
    assert [dtype for _, dtype in buffers[1:]] == ["bfloat16", "bfloat16"]
    assert re.findall(r"extern_kernels\.(\w+)\(", source) == ["mm"]


@pytest.mark.parametrize("name", ONCE)
def test_weights_of_whole_blocks_cost_one_kernel(outcomes, name):
    assert len(kernel_sources(outcomes[name].sources[0])) == 1


@pytest.mark.parametrize("name", SAMPLES)
def test_kernel_count(outcomes, name):
    fmt, noise, scale = SAMPLES[name].args[3:6]
    wanted = 1 + needs_block_maximum(FloatFormat.parse(fmt), scale or None, noise)
    if name == "convolution, channels last":
        wanted += 1  # Inductor splits a reduction over a dim that is not the innermost in memory into two kernels.
    assert len(kernel_sources(outcomes[name].sources[0])) == wanted


@pytest.mark.parametrize("name", [*SAMPLES, *ONCE, *EXACT, *MOVED, *MAXIMA, *LINEARS, *TWICE, *OPERANDS, *TRANSFORMS])
def test_no_call_outside_the_kernels(outcomes, name):
    assert "torch.ops.gws" not in code(outcomes[name])
    assert set(re.findall(r"\b(?:libdevice|tl_math)\.(\w+)", code(outcomes[name]))) <= {"abs"}


@pytest.mark.parametrize("name", [*SAMPLES, *ONCE, *EXACT, *MOVED, *MAXIMA, *LINEARS, *TWICE])
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


@pytest.mark.parametrize("name", [*SAMPLES, *ONCE, *EXACT, *MOVED, *OPERANDS, *TRANSFORMS])
def test_results_are_those_of_the_eager_kernel(outcomes, name):
    assert_same_bits(outcomes[name].result, CALLS[name].fn(*CALLS[name].args))


@pytest.mark.parametrize("name", MASKED)
def test_masks_are_those_of_the_eager_kernel(outcomes, name):
    """Elementwise code beside the block maxima: no sort, and nothing outside the kernels."""
    assert_same_bits(outcomes[name].result, CALLS[name].fn(*CALLS[name].args))
    source = code(outcomes[name])
    assert "sort" not in source
    assert "torch.ops.gws" not in source


def test_operands_are_fused_with_what_precedes(outcomes):
    """Whole blocks along features: one kernel behind a pointwise operation, which stores what is needed elsewhere."""
    (name,) = (name for name in OPERANDS if "e4m3 (1, 32) floor" in name)
    (kernel,) = kernel_sources(outcomes[name].sources[0]).values()
    assert len(re.findall(r"tl\.load\(in_ptr0 \+", kernel)) == 1


@pytest.mark.parametrize("name", MAXIMA)
def test_maxima_are_those_of_the_eager_kernel(outcomes, name):
    """As bits, among which those of a NaN may be any."""
    got, wanted = outcomes[name].result, weight_maximum(*MAXIMA[name].args)
    assert got.dtype == torch.int32
    assert_same_bits(got.view(torch.float32), wanted.view(torch.float32))


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


KEPT = json.loads(codegen.KEPT.read_text())
# Each case for sm_90; the plain one for the others too.
MEASURED = [(name, 90) for name in codegen.CASES] + [("4096 x 4096", 80), ("4096 x 4096", 100)]


@pytest.fixture(scope="module")
def figures(outcomes) -> dict[tuple[str, int], list[codegen.Figure]]:
    rest = [name for name in codegen.CASES if name not in outcomes]
    found = outcomes | dict(zip(rest, run_calls([codegen.call(codegen.CASES[name]) for name in rest]), strict=True))
    return {(name, capability): codegen.figures(name, found[name], capability) for name, capability in MEASURED}


@pytest.mark.parametrize(("name", "capability"), MEASURED)
def test_instructions_do_not_grow(figures, name, capability):
    """By more than a tenth over the figures that are kept; `python benchmarks/codegen.py --write` keeps new ones."""
    kept = [f for f in KEPT["figures"] if (f["case"], f["capability"]) == (name, capability)]
    measured = figures[name, capability]
    assert len(measured) == len(kept)
    if KEPT["triton"] != codegen.versions()["triton"]:
        pytest.skip(f"the figures are those of triton {KEPT['triton']}")
    for now, before in zip(measured, kept, strict=True):
        assert now.instructions <= 1.1 * before["instructions"]
        assert now.bytes <= before["bytes"]


def test_wide_arithmetic_is_told_from_bits_that_are_read():
    bit = "\tshr.u64 \t%rd34, %rd31, 30;\n\tand.b64 \t%rd35, %rd34, 1;\n\tsetp.ne.b64 \t%p99, %rd35, 0;\n"
    assert codegen.wide_arithmetic(f"\tadd.s64 \t%rd1, %rd2, %rd3;\n{bit}{bit}") == []
    assert codegen.wide_arithmetic(bit.replace("setp.ne.b64", "cvt.u32.u64")) == ["shr.u64", "and.b64"]
    assert codegen.wide_arithmetic(bit + "\tmul.lo.s64 \t%rd1, %rd2, %rd3;\n") == ["mul.lo.s64"]


@pytest.mark.parametrize(("name", "capability"), MEASURED)
def test_kernels_spill_nothing_and_call_nothing(figures, name, capability):
    for kernel in figures[name, capability]:
        assert (kernel.spills, kernel.libdevice, kernel.wide) == (0, 0, 0)


def test_budget(figures):
    """40 instructions an element for the sampling kernel; where it also finds the block maximum, no more than both."""
    maximum, sampling = (kernel.instructions for kernel in figures["4096 x 4096, read twice", 90])
    (both,) = (kernel.instructions for kernel in figures["4096 x 4096", 90])
    assert sampling <= 40
    assert both <= maximum + sampling
    assert [kernel.bytes for kernel in figures["4096 x 4096", 90]] == [4 + 2]  # those of the cast that it replaces
    assert [kernel.bytes for kernel in figures["4096 x 4096, read twice", 90]] == [4, 4 + 2]


ROUNDED = [(name, capability) for name in (*LINEARS, *TWICE) for capability in (80, 90, 100)]
ROUNDED += [("amax, whole blocks", 90), ("nvfp4, whole blocks", 90)]


@pytest.mark.parametrize(("name", "capability"), ROUNDED)
def test_rounding_is_left_alone(outcomes, name, capability):
    """A fused multiply-add rounds once where the eager kernel rounds twice, unless the product is exact: by a power of
    two. And .ftz would drop subnormals."""
    for kernel in compiled_kernels(outcomes[name].sources[0], capability):
        assert (kernel.spills, kernel.stack) == (0, 0)
        for operands in re.findall(r"\bFFMA\S* ([^;]*);", kernel.sass):
            factors = re.findall(r" -?([\d.]+(?:e[+-]?\d+)?)(?:,|$)", operands)
            assert [f for f in factors if math.frexp(float(f))[0] == 0.5], operands
        assert ".ftz" not in kernel.ptx
