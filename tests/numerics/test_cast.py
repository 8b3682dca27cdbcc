import functools

import ml_dtypes
import numpy as np
import pytest
import torch
from support.narrow_cast import ml_dtypes_cast
from support.oracle import (
    ML_DTYPES_FORMATS,
    assert_bits_equal,
    grid_values,
    quantize_oracle,
    random_floats,
    sample,
    sample_oracle,
)

from gws_compile import FORMATS, FloatFormat, quantize
from gws_compile.numerics.primitives import TorchPrimitives
from gws_compile.numerics.scales import scale_bits, scale_exponent_range

NARROW = [name for name in ML_DTYPES_FORMATS if name != "bfloat16"]
OCP = ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "float6_e3m2fn", "float6_e2m3fn"]
SCALES = ["floor", "ceil", None]
MANTISSAS = (1, 2, 3, 7, 10, 15, 21, 22, 23)
FLOAT32_MAX = np.finfo(np.float32).max
# The common ones, and: one exponent bit, other biases, largest exponent 0, a smaller maximum, as many bits as float32.
SPREAD = [
    FloatFormat.parse(f) for f in ("e2m1", "e4m3", "e5m2", "e1m3", "e4m3b11", "e2m1b3", "e4m3x240", "e7m23", "e3m22")
]


def all_bfloat16() -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)


@functools.cache
def many_floats() -> np.ndarray:
    """2**24 float32 values: half spread over 2**-24 .. 2**18, a quarter with any bits, a quarter normal."""
    near = random_floats(2**23, 1, (-24, 17))
    rng = np.random.default_rng(2)
    anything = rng.integers(0, 2**32, 2**22, dtype=np.uint32).view(np.float32)
    normal = rng.standard_normal(2**22, dtype=np.float32) * np.float32(3)
    return np.concatenate([near, anything, normal])


# --- Against ml_dtypes and torch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ML_DTYPES_FORMATS)
def test_every_bfloat16_value_agrees_with_ml_dtypes(name, dtype):
    w = all_bfloat16()
    expected = torch.from_numpy(ml_dtypes_cast(w, name))
    # Every value of these formats is a bfloat16 value: the way back rounds nothing.
    assert_bits_equal(expected.to(torch.bfloat16).float(), expected)
    actual = quantize(torch.from_numpy(w).to(dtype), ML_DTYPES_FORMATS[name], scale=None)
    assert_bits_equal(actual, expected.to(dtype))


@pytest.mark.parametrize("name", NARROW)
def test_grid_values_and_ties_agree_with_ml_dtypes(name):
    grid = grid_values(ML_DTYPES_FORMATS[name])
    exact = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2]).astype(np.float32)
    w = np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))])
    w = np.concatenate([w, -w])
    actual = quantize(torch.from_numpy(w), ML_DTYPES_FORMATS[name], scale=None)
    assert_bits_equal(actual, ml_dtypes_cast(w, name))
    assert_bits_equal(actual[: len(grid)], grid.astype(np.float32))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "float8_e4m3fn" else pytest.mark.slow) for n in ML_DTYPES_FORMATS]
)
def test_2_to_the_24_values_agree_with_ml_dtypes(name):
    w = many_floats()
    assert_bits_equal(quantize(torch.from_numpy(w), ML_DTYPES_FORMATS[name], scale=None), ml_dtypes_cast(w, name))


@pytest.mark.parametrize("name", ML_DTYPES_FORMATS)
def test_values_beyond_the_maximum_saturate(name):
    fmt = ML_DTYPES_FORMATS[name]
    beyond = np.geomspace(fmt.max, min(8 * fmt.max, float(FLOAT32_MAX)), 50).astype(np.float32)
    beyond = np.append(np.nextafter(beyond[:-1], np.float32(np.inf)), FLOAT32_MAX)
    w = torch.from_numpy(np.stack([beyond, -beyond]))
    expected = torch.tensor([[fmt.max], [-fmt.max]]).expand(w.shape)
    assert_bits_equal(quantize(w, fmt, scale=None), expected)
    # ml_dtypes has no value to give there for a format with Inf or NaN codes: the comparisons above clip first.
    with np.errstate(invalid="ignore", over="ignore"):
        theirs = np.float32(FLOAT32_MAX).astype(getattr(ml_dtypes, name)).astype(np.float32)
    assert np.isfinite(theirs) == (fmt.storage_bits < 8)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
def test_agrees_with_torch_float8(dtype):
    fmt = ML_DTYPES_FORMATS[str(dtype).removeprefix("torch.")]
    assert fmt.max == torch.finfo(dtype).max
    assert fmt.min_normal == torch.finfo(dtype).smallest_normal
    w = torch.from_numpy(np.concatenate([all_bfloat16(), random_floats(2**18, 3, (fmt.emin - 6, fmt.emax))]))
    expected = w.clamp(-fmt.max, fmt.max).to(dtype).float()
    if "fnuz" in str(dtype):
        expected = expected.copysign(w)
    assert_bits_equal(quantize(w, fmt, scale=None), torch.where(w.isfinite(), expected, torch.nan))


def test_bf16_is_torch_bfloat16():
    w = torch.from_numpy(random_floats(2**20, 4))
    expected = w.to(torch.bfloat16).float()
    overflow = expected.isinf()
    assert overflow.any()
    expected = torch.where(overflow, w.sign() * FORMATS["bf16"].max, expected)
    for scale in SCALES:
        assert_bits_equal(quantize(w, "bf16", scale=scale), expected)


@pytest.mark.parametrize("scale", ["floor", "ceil"])
@pytest.mark.parametrize("name", NARROW)
def test_block_scales_times_ml_dtypes(name, scale):
    fmt = ML_DTYPES_FORMATS[name]
    rows, side = 200, 32
    # A magnitude for each row, from 2**-80 to 2**119: none that the range of the scale limits.
    w = random_floats((rows, 4 * side), 5, (fmt.emin - fmt.mantissa_bits - 3, fmt.emax + 1)).astype(np.float64)
    w = (w * 2.0 ** (np.arange(rows)[:, None] - 80 - fmt.emax)).astype(np.float32)
    blocks = w.reshape(rows, 4, side)
    amax = np.abs(blocks).max(axis=2, keepdims=True).astype(np.float64)
    x = 2.0 ** (np.floor(np.log2(amax)) - fmt.emax)
    if scale == "ceil":
        x = np.where(amax / x > fmt.max, 2 * x, x)
        assert (amax / x <= fmt.max).all()
        assert (amax / x > fmt.max / 2).all()
    expected = ml_dtypes_cast((blocks / x).astype(np.float32), name) * x
    actual = quantize(torch.from_numpy(w), fmt, block=(1, side), scale=scale)
    assert_bits_equal(actual, expected.astype(np.float32).reshape(w.shape))


@pytest.mark.parametrize("scale", ["floor", "ceil"])
def test_every_block_scale_is_an_e8m0_value(scale):
    patterns = np.arange(0, 0x7F800000, 2**23 // 8, dtype=np.int64)
    amax = np.concatenate([patterns, patterns + 2**23 // 8 - 1]).astype(np.int32).view(np.float32)
    for fmt in [f for f in [*ML_DTYPES_FORMATS.values(), *SPREAD] if f.scaled]:
        x = scale_bits(TorchPrimitives(), torch.from_numpy(amax), fmt, scale).view(torch.float32).numpy()
        assert_bits_equal(x.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32), x)
        low, high = scale_exponent_range(fmt)
        assert (x.min(), x.max()) == (2.0**low, 2.0 ** min(high, 127 - fmt.emax + (scale == "ceil")))


# --- Against the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("exponent_bits", range(1, 9))
def test_every_exponent_width_agrees_with_the_definition(exponent_bits, scale):
    for mantissa_bits in MANTISSAS:
        fmt = FloatFormat.make(exponent_bits, mantissa_bits)
        exponents = max(fmt.emin - mantissa_bits - 3, -127), min(fmt.emax + 2, 127)
        w = random_floats((97, 130), 100 * exponent_bits + mantissa_bits, exponents)
        assert_bits_equal(quantize(torch.from_numpy(w), fmt, (16, 16), scale), quantize_oracle(w, fmt, (16, 16), scale))
        on_grid = quantize(torch.from_numpy(w), fmt, (16, 16), scale)
        assert_bits_equal(quantize(on_grid, fmt, (16, 16), scale), on_grid)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("fmt", SPREAD, ids=str)
def test_every_magnitude_agrees_with_the_definition(fmt, scale):
    # Subnormals, and the largest values: one block per binade, and blocks that mix them all.
    exponents = np.arange(-127, 128)
    w = np.stack([random_floats(64, 600 + int(e), (int(e), int(e))) for e in exponents])
    edges = np.array([0, -0.0, 1e-45, -1e-45, 2.0**-126, 2.0**-127, FLOAT32_MAX, -FLOAT32_MAX], np.float32)
    w[:, :8] = np.where(np.arange(255)[:, None] % 16 == 0, edges, w[:, :8])
    for block in ((1, 8), (1, 64), (300, 300)):
        assert_bits_equal(quantize(torch.from_numpy(w), fmt, block, scale), quantize_oracle(w, fmt, block, scale))


@pytest.mark.parametrize(("bias", "scale"), [(4, "ceil"), (5, "floor"), (80, "floor"), (80, "ceil")])
def test_the_range_of_the_scale_holds_for_large_biases(bias, scale):
    fmt = FloatFormat.make(2, 1, bias=bias)
    w = random_floats((255, 2), 14)
    w[:, 0] = 1.75 * 2.0 ** np.clip(np.arange(255.0) - 127, -126, 127)
    assert_bits_equal(quantize(torch.from_numpy(w), fmt, (1, 1), scale), quantize_oracle(w, fmt, (1, 1), scale))


@pytest.mark.parametrize("block", [(32, 32), (1, 16), (16, 1), (7, 5), (1, 1), (1000, 3), (1000, 1000)], ids=str)
@pytest.mark.parametrize("shape", [(64, 96), (50, 33), (3, 40, 21), (20, 5, 3, 3), (6, 4, 2, 3, 2), (77,), (1, 1), ()])
def test_shapes_and_blocks(shape, block):
    w = random_floats(shape, 7, (-12, 2))
    for name, scale in (("fp8_e4m3", "floor"), ("fp6_e3m2", "ceil"), ("fp4_e2m1", None)):
        actual = quantize(torch.from_numpy(np.asarray(w)), name, block, scale)
        assert_bits_equal(actual, quantize_oracle(w, FORMATS[name], block, scale))


@pytest.mark.parametrize("scale", ["floor", None])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3), (0, 2, 3), (0, 3, 2, 2)])
def test_empty_tensors(shape, scale):
    assert_bits_equal(
        quantize(torch.empty(shape, dtype=torch.bfloat16), "fp8_e4m3", scale=scale),
        torch.empty(shape, dtype=torch.bfloat16),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", SCALES)
def test_narrow_weights_are_cast_in_float32(dtype, scale):
    w = torch.from_numpy(random_floats((70, 45), 8, (-24, 13))).to(dtype)
    for fmt in ("e2m1", "e4m3", "e5m2", "e3m7", "e5m10", "e8m3", "e6m23"):
        expected = torch.from_numpy(quantize_oracle(w.float().numpy(), FloatFormat.parse(fmt), (7, 5), scale))
        actual = quantize(w, fmt, (7, 5), scale)
        assert_bits_equal(actual.float(), expected)
        assert actual.dtype == dtype


@pytest.mark.parametrize(("fmt", "scale"), [("e4m3", "ceil"), ("e2m1", "ceil"), ("bf16", "floor"), ("e6m3", None)])
def test_the_largest_float16_weights_stay_finite(fmt, scale):
    w = torch.tensor([[65504.0, -65504.0]], dtype=torch.float16)
    assert quantize(w, fmt, scale=scale).isfinite().all()


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.t(),
        lambda w: w[:, ::3],
        lambda w: w[5:, 7],
        lambda w: w.flip(0)[1::2],
        lambda w: w.view(4, 15, 36).transpose(1, 2),
        lambda w: w.view(30, 8, 3, 3).contiguous(memory_format=torch.channels_last),
        lambda w: w[0].expand(9, 72),
    ],
)
def test_strides_change_no_value(view):
    w = view(torch.from_numpy(random_floats((30, 72), 9, (-12, 2))))
    before = w.clone()
    actual = quantize(w, "fp8_e4m3", (7, 5))
    assert_bits_equal(actual, quantize_oracle(w.contiguous().numpy(), FORMATS["fp8_e4m3"], (7, 5)))
    assert actual.stride() == torch.empty_like(w).stride()
    assert_bits_equal(w, before)


def test_result_is_new_and_outside_autograd():
    w = torch.nn.Parameter(torch.tensor([[1.0, 2.0]]))
    result = quantize(w, "fp8_e4m3")
    assert type(result) is torch.Tensor
    assert not result.requires_grad
    assert result.data_ptr() != w.data_ptr()
    assert_bits_equal(result, w)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("fmt", "scale"), [("e4m3", "floor"), ("e4m3", "ceil"), ("e4m3", None), ("bf16", "floor")])
def test_nan_and_inf_stay_in_their_block(fmt, scale, bad):
    w = random_floats((10, 13), 10, (-5, 2))
    clean = quantize(torch.from_numpy(w), fmt, (4, 5), scale)
    for row, col in ((0, 0), (5, 7), (9, 12), (3, 10)):
        broken = w.copy()
        broken[row, col] = bad
        expected = clean.clone()
        if scale is None or fmt == "bf16":
            expected[row, col] = torch.nan
        else:
            expected[row // 4 * 4 : row // 4 * 4 + 4, col // 5 * 5 : col // 5 * 5 + 5] = torch.nan
        assert_bits_equal(quantize(torch.from_numpy(broken), fmt, (4, 5), scale), expected)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("fmt", [*SPREAD, FORMATS["bf16"]], ids=str)
def test_zeros_keep_their_sign(fmt, scale):
    w = torch.tensor([[0.0, -0.0], [-0.0, 0.0]])
    assert_bits_equal(quantize(w, fmt, (1, 2), scale), w)
    tiny = torch.tensor([[1e-45, -1e-45, fmt.min_subnormal, -fmt.min_subnormal]])
    if fmt.scaled:
        tiny[0, 2:] /= 2  # a tie between 0 and the smallest value goes to 0
        assert_bits_equal(quantize(tiny, fmt, scale=None), torch.tensor([[0.0, -0.0, 0.0, -0.0]]))


# --- Against the state of the process --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", SCALES)
def test_flushing_subnormals_changes_nothing(scale, dtype):
    # One thread computes tensors of this size, the one whose mode is set. Rows reach from subnormals to float32's end.
    w = np.stack([random_floats(48, 1100 + e, (max(e - 20, -127), e)) for e in range(-127, 128, 3)])
    w = torch.from_numpy(w).to(dtype)
    w = torch.where(w.isfinite() & (w.abs() < 2**15 if dtype == torch.float16 else True), w, 1)
    expected = [quantize(w, fmt, (1, 16), scale) for fmt in SPREAD]
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor does not flush subnormals")
        assert (torch.tensor([1e-40]) * 1.0).item() == 0.0
        actual = [quantize(w, fmt, (1, 16), scale) for fmt in SPREAD]
    finally:
        torch.set_flush_denormal(False)
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)


def test_default_dtype_changes_nothing():
    w = torch.from_numpy(random_floats((40, 50), 12, (-30, 30)))
    cases = [(fmt, scale) for fmt in [*SPREAD, FORMATS["bf16"]] for scale in SCALES]
    expected = [quantize(w, fmt, (7, 5), scale) for fmt, scale in cases]
    torch.set_default_dtype(torch.float64)
    try:
        actual = [quantize(w, fmt, (7, 5), scale) for fmt, scale in cases]
    finally:
        torch.set_default_dtype(torch.float32)
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)


# --- With noise, and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["rounded_normal", "uniform"])
@pytest.mark.parametrize(
    ("fmt", "scale"), [("e4m3", "floor"), ("e2m1", "ceil"), ("e3m2", None), ("e6m23", "floor"), ("bf16", None)]
)
def test_noise_is_cast_on_the_grid_of_the_weight_itself(fmt, scale, noise):
    # Half a block maximum of noise: a block scale read from the noisy values would be another one.
    w = random_floats((64, 96), 13, (-8, 1))
    w[:32, 32:64] *= np.float32(2.0**126)  # noise overflows float32 here, and saturates
    fmt = FloatFormat.parse(fmt)
    actual = sample(
        torch.from_numpy(w), fmt, key=(1, 2**32 - 1), step=3, bits=2.5, noise=noise, block=(8, 8), scale=scale
    )
    assert_bits_equal(actual, sample_oracle(w, (1, 2**32 - 1), 3, fmt, 2.5, noise, (8, 8), scale))
    assert actual.isfinite().all()


@pytest.mark.parametrize(
    "w", [torch.ones(2, 2, dtype=torch.int32), torch.ones(2, 2, dtype=torch.float64), [[1.0]], None]
)
def test_wrong_weights_are_named(w):
    got = str(w.dtype) if isinstance(w, torch.Tensor) else type(w).__name__
    with pytest.raises(TypeError, match=f"takes a tensor of torch.float32, torch.bfloat16, torch.float16, got {got}"):
        quantize(w, "fp8_e4m3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fmt": "fp8"}, "unknown format 'fp8'; accepted: fp4_e2m1"),
        ({"scale": "round"}, "scale must be one of 'floor', 'ceil', 'amax', 'nvfp4', None, 'auto', got 'round'"),
        ({"block": (0, 32)}, r"block must be two positive ints .*, or None for a whole side: .* got \(0, 32\)$"),
        ({"block": 32}, r"block must be two positive ints .*, or None for a whole side: .* got 32$"),
    ],
)
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(2, 2), **({"fmt": "fp8_e4m3"} | arguments))
