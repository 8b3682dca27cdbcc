"""The cast and the noise a second time, from their definitions: numpy, float64 and unsigned 32-bit integers.

Of `FloatFormat` only the four numbers that define it are read; exponents are those of `numpy.frexp`, ties go to even by
`numpy.rint`, and everything after the noise is exact in float64. Slow, and meant to be obviously right.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from gws_compile.numerics.formats import FloatFormat
from gws_compile.numerics.spec import SampleSpec
from gws_compile.ops.eager import sample_eager

# The element types of ml_dtypes, by their name there.
ML_DTYPES_FORMATS = {
    "bfloat16": FloatFormat.make(8, 7),
    "float4_e2m1fn": FloatFormat.make(2, 1),
    "float6_e2m3fn": FloatFormat.make(2, 3),
    "float6_e3m2fn": FloatFormat.make(3, 2),
    "float8_e3m4": FloatFormat.make(3, 4, max=15.5),
    "float8_e4m3": FloatFormat.make(4, 3, max=240),
    "float8_e4m3b11fnuz": FloatFormat.make(4, 3, bias=11),
    "float8_e4m3fn": FloatFormat.make(4, 3),
    "float8_e4m3fnuz": FloatFormat.make(4, 3, bias=8),
    "float8_e5m2": FloatFormat.make(5, 2),
    "float8_e5m2fnuz": FloatFormat.make(5, 2, bias=16),
}

_MASK = 0xFFFFFFFF


def grid_values(fmt: FloatFormat) -> np.ndarray:
    """Every value of the format from 0 to its maximum, ascending, float64."""
    fractions = np.arange(2**fmt.mantissa_bits) / 2.0**fmt.mantissa_bits
    subnormal = fractions * 2.0 ** (1 - fmt.bias)
    normal = [(1 + fractions) * 2.0 ** (code - fmt.bias) for code in range(1, 2**fmt.exponent_bits)]
    values = np.concatenate([subnormal, *normal])
    return values[values <= fmt.max]


def block_maximum_oracle(w: np.ndarray, block: tuple[int | None, int | None]) -> np.ndarray:
    """The block maximum of ``|w|`` at every element of a (matrices, rows, columns) array; NaN wins."""
    if w.size == 0:
        return np.zeros_like(w)
    rows, cols = (size if side is None else side for side, size in zip(block, w.shape[1:], strict=True))
    maximum = np.maximum.reduceat(np.abs(w), np.arange(0, w.shape[1], rows), axis=1)
    maximum = np.maximum.reduceat(maximum, np.arange(0, w.shape[2], cols), axis=2)
    return maximum.repeat(rows, axis=1)[:, : w.shape[1]].repeat(cols, axis=2)[:, :, : w.shape[2]]


def scale_oracle(amax: np.ndarray, fmt: FloatFormat, scale: str) -> np.ndarray:
    """The block scale X for finite block maxima, float64."""
    amax = amax.astype(np.float64)
    emax = int(np.frexp(fmt.max)[1]) - 1
    smallest = 2.0 ** (1 - fmt.bias - fmt.mantissa_bits)
    exponent = np.where(amax > 0, np.frexp(amax)[1] - 1 - emax, -1000)
    if scale == "ceil":
        exponent = exponent + (amax > fmt.max * 2.0**exponent)
    # X and 1 / X are normal float32 values, the grid's smallest value is at least 2**-124, its largest is finite.
    allowed = [k for k in range(-126, 127) if smallest * 2.0**k >= 2.0**-124 and fmt.max * 2.0**k < 2.0**128]
    return 2.0 ** np.clip(exponent, allowed[0], allowed[-1])


def _cast(y: np.ndarray, amax: np.ndarray | None, fmt: FloatFormat, scale: str | None) -> np.ndarray:
    broken = ~np.isfinite(y if amax is None else amax)
    y = np.where(broken, np.float32(0), y).astype(np.float64)
    x = np.float64(1)
    if amax is not None and scale is not None and fmt.exponent_bits < 8:
        x = scale_oracle(np.where(broken, 0, amax), fmt, scale)
    # Noise can overflow float32 in a block that is finite: such a value saturates.
    q = np.minimum(np.abs(y) / x, 2 * fmt.max)
    exponent = np.maximum(np.frexp(q)[1] - 1, 1 - fmt.bias)
    spacing = 2.0 ** (exponent - fmt.mantissa_bits)
    q = np.minimum(np.rint(q / spacing) * spacing, fmt.max)
    exact = np.copysign(q * x, y)
    result = exact.astype(np.float32)
    assert (result == exact).all(), "the grid has to lie in float32"
    return np.where(broken, np.float32(np.nan), result)


def as_matrices(w: np.ndarray, batch_dims: int | None = None) -> np.ndarray:
    """A float32 array as (matrices, rows, columns); ``batch_dims`` as in `sample_oracle`."""
    assert w.dtype == np.float32
    if w.ndim < 2:
        return w.reshape(1, 1, w.size)
    dims = int(w.ndim == 3) if batch_dims is None else batch_dims
    return w.reshape(math.prod(w.shape[:dims]), w.shape[dims], math.prod(w.shape[dims + 1 :]))


def quantize_oracle(
    w: np.ndarray, fmt: FloatFormat, block: tuple[int, int] = (32, 32), scale: str | None = "floor"
) -> np.ndarray:
    """`gws_compile.quantize` of a float32 array."""
    matrices = as_matrices(w, None)
    amax = block_maximum_oracle(matrices, block) if scale is not None and fmt.exponent_bits < 8 else None
    return _cast(matrices, amax, fmt, scale).reshape(w.shape)


def random_words(index: np.ndarray, key: tuple[int, int], step: int) -> np.ndarray:
    """The random word of each element index: triple32, keyed. All uint32."""
    x = index.astype(np.uint32) ^ np.uint32((key[0] + step * 0x9E3779B9) & _MASK)
    x = (x ^ (x >> np.uint32(17))) * np.uint32(0xED5AD4BB)
    x = x ^ np.uint32((key[1] + step * 0xBB67AE85) & _MASK)
    x = (x ^ (x >> np.uint32(11))) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x31848BAB)
    return x ^ (x >> np.uint32(14))


def noise_oracle(words: np.ndarray, noise: str) -> np.ndarray:
    """R of each random word, float32."""
    sign = np.where(words >= 2**31, -1, 1)
    magnitude = (words % 2**31).astype(np.int64)
    if noise == "rounded_normal":
        tails = [round(math.erfc((2 * k - 1) / math.sqrt(2)) * 2**31) for k in (1, 2, 3)]
        r = sum((magnitude < tail).astype(np.int64) for tail in tails)
    else:
        assert noise == "uniform"
        r = (2 * (magnitude >> 8) + 1) * 2.0**-25
    return (sign * r).astype(np.float32)


def sample_oracle(
    w: np.ndarray,
    key: tuple[int, int],
    step: int,
    fmt: FloatFormat,
    bits: float,
    noise: str = "rounded_normal",
    block: tuple[int, int] = (32, 32),
    scale: str | None = "floor",
    *,
    enabled: bool = True,
    batch_dims: int | None = None,
) -> np.ndarray:
    """The sample of a float32 array; ``batch_dims`` defaults to 1 for three dims and to 0 for others."""
    matrices = as_matrices(w, batch_dims)
    if noise == "none":
        amax = block_maximum_oracle(matrices, block) if scale is not None and fmt.exponent_bits < 8 else None
        return _cast(matrices, amax, fmt, scale).reshape(w.shape)
    amax = block_maximum_oracle(matrices, block)
    y = matrices
    if enabled:
        r = noise_oracle(random_words(np.arange(w.size), key, step), noise).reshape(matrices.shape)
        with np.errstate(over="ignore", invalid="ignore"):
            moved = matrices + r * (amax * np.float32(2.0 ** (1.0 - bits)))
        assert moved.dtype == np.float32
        y = np.where(r == 0, matrices, moved)
    return _cast(y, amax, fmt, scale).reshape(w.shape)


def sample(
    w: torch.Tensor,
    fmt: str | FloatFormat,
    *,
    key: tuple[int, int] = (0x243F6A88, 0x85A308D3),
    step: int = 0,
    bits: float | None = None,
    noise: str = "rounded_normal",
    block: tuple[int, int] = (32, 32),
    scale: str | None = "floor",
    enabled: bool = True,
    batch_dims: int | None = None,
) -> torch.Tensor:
    """The eager kernel, called as `sample_oracle` is."""
    fmt = FloatFormat.parse(fmt)
    words = torch.from_numpy(np.array([*key, step, -int(enabled)], np.int64).astype(np.uint32).view(np.int32))
    dims = int(w.ndim == 3) if batch_dims is None else batch_dims
    width = fmt.noise_bits if bits is None else bits
    spec = SampleSpec(fmt, noise, width, scale, None, w.dtype)
    return sample_eager(w, spec, dims, block, words[:2], words[2:])


def random_floats(shape: int | tuple[int, ...], seed: int, exponents: tuple[int, int] = (-127, 127)) -> np.ndarray:
    """Finite float32 values with random bits, their exponents uniform over a range (-127: subnormals, zeros).

    Half of the fractions keep all 23 bits, the others end in a random number of zeros: ties and grid values are common.
    """
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, shape, dtype=np.uint32)
    zeros = rng.integers(0, 48, shape, dtype=np.uint8)
    zeros[zeros > 23] = 0
    fraction = (words & np.uint32(0x7FFFFF)) >> zeros << zeros
    exponent = rng.integers(exponents[0] + 127, exponents[1] + 128, shape, dtype=np.uint8)
    return (words & np.uint32(0x80000000) | exponent.astype(np.uint32) << np.uint32(23) | fraction).view(np.float32)


def assert_bits_equal(actual: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> None:
    """Same shape, same dtype, same bits; a NaN equals any NaN, -0.0 does not equal 0.0."""
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype}, expected {expected.dtype}"
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    a, e = actual.contiguous().view(integer), expected.contiguous().view(integer)
    if torch.equal(a, e):
        return
    wrong = (a != e) & ~(actual.isnan() & expected.isnan())
    count = int(wrong.sum())
    if count:
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{count} of {a.numel()} differ, the first at {at}: {actual[at].item()!r}, expected {expected[at].item()!r}"
        )
