"""The noise: its arithmetic against independent forms, its laws, and its independence.

Every draw is deterministic, so a statistical test either holds or it does not. Each asks for a p-value above 1e-6 after
counting its comparisons (Bonferroni); tests with all lags or all XOR shifts of 2**24 elements count them all.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import linalg, special, stats

from gws_compile.numerics import noise
from gws_compile.numerics.formats import FloatFormat
from gws_compile.numerics.keys import key_words
from gws_compile.numerics.noise import TAIL_COUNTS, add_noise, fixed_amplitude, random_word
from gws_compile.numerics.primitives import TorchPrimitives, wrap_int32
from gws_compile.numerics.spec import SampleSpec
from gws_compile.ops.eager import sample_eager

P = TorchPrimitives()
P_VALUE = 1e-6
PIECE = 2**16
KEY = key_words(0, "layers.0.weight")

# P(|R| = 0, 1, 2, 3) and moments of R. 4 and beyond has probability 2.6e-12, less than one word.
TAILS = [math.erfc((2 * k - 1) / math.sqrt(2)) for k in (1, 2, 3)]
MASS = [1 - TAILS[0], TAILS[0] - TAILS[1], TAILS[1] - TAILS[2], TAILS[2]]
VARIANCE, FOURTH = (sum(m * k**n for k, m in enumerate(MASS)) for n in (2, 4))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The pieces are small: on a busy machine a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bound(comparisons: int) -> float:
    """What the largest of so many standard normal scores passes with probability `P_VALUE`."""
    return float(stats.norm.isf(P_VALUE / 2 / comparisons))


def int32(value) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.int32)


def words(log2: int, key: tuple[int, int] = KEY, step: int = 0) -> torch.Tensor:
    """The words of the first 2**log2 elements."""
    index = torch.arange(2**log2, dtype=torch.int32).view(-1, min(PIECE, 2**log2))
    return torch.cat([random_word(P, i, key, int32(step)) for i in index])


def draw(word: torch.Tensor, law: str = "rounded_normal") -> torch.Tensor:
    """R: the noise of amplitude one on a weight of zero."""
    w, amax = torch.zeros(()), torch.ones(())
    return torch.cat(
        [add_noise(P, law, w, fixed_amplitude(P, amax, 1.0), piece, int32(-1)) for piece in word.split(PIECE)]
    )


def bits(word: torch.Tensor) -> torch.Tensor:
    """(words, 32) of 0 and 1, least significant first."""
    return torch.from_numpy(np.unpackbits(word.contiguous().numpy().view(np.uint8), bitorder="little")).view(-1, 32)


def ones(word: torch.Tensor) -> torch.Tensor:
    """How many of the words have each of the 32 bits."""
    return sum(bits(piece).sum(0) for piece in word.split(PIECE))


def signs(word: torch.Tensor) -> torch.Tensor:
    """(words, 32) of -1 and 1, float32."""
    return bits(word).float().mul_(2).sub_(1)


def bit_scores(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """32 x 32 correlations of the bits of two streams, as standard normal scores."""
    pieces = zip(x.split(PIECE), y.split(PIECE), strict=True)
    return sum(signs(a).t() @ signs(b) for a, b in pieces) / math.sqrt(x.numel())


def standard(word: torch.Tensor, view: str) -> torch.Tensor:
    """R, or whether R is zero, or U: standardised, so that a sum of N products has variance N."""
    if view == "zero":
        return ((draw(word) == 0).float() - MASS[0]) / math.sqrt(MASS[0] * (1 - MASS[0]))
    if view == "uniform":
        return draw(word, "uniform") * math.sqrt(12)
    return draw(word) / math.sqrt(VARIANCE)


def walsh(x: torch.Tensor) -> torch.Tensor:
    """Walsh-Hadamard transform, orthonormal: the correlation with every XOR of index bits."""
    log2, shape = x.numel().bit_length() - 1, x.shape
    while log2:
        k = min(log2, 8)
        log2 -= k
        x = (x.view(-1, 2**k) @ torch.from_numpy(linalg.hadamard(2**k)).float()).t().contiguous() / 2 ** (k / 2)
    return x.view(shape)


def shift_scores(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """From two Fourier transforms: sum_i x[i] y[i + s] / sqrt(N) at every circular shift s."""
    n = 2 * len(x) - 2
    return torch.fft.irfft(x.conj() * y, n=n) / math.sqrt(n)


def xor_scores(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """From two Walsh-Hadamard transforms: sum_i x[i] y[i ^ s] / sqrt(N) at every s."""
    return walsh(x * y)


def assert_white(x: torch.Tensor) -> torch.Tensor:
    """No correlation of a standardised stream with itself at any lag or XOR of the indices; the scores at the lags."""
    n = x.numel()
    fourier, hadamard = torch.fft.rfft(x), walsh(x)
    lags = shift_scores(fourier, fourier)[: n // 2]
    assert float(lags[1:].abs().max()) < bound(n // 2)
    # x[i] x[i ^ s] comes twice in each sum.
    assert float(xor_scores(hadamard, hadamard)[1:].abs().max()) / math.sqrt(2) < bound(n)
    # No mean, no period, and no linear function of the index bits.
    assert float(fourier[1:].abs().square().max()) / n < math.log(n / 2 / P_VALUE)
    assert float(hadamard.abs().max()) < bound(n)
    return lags


def triple32(x: int) -> int:
    """As published: https://github.com/skeeto/hash-prospector."""
    x ^= x >> 17
    x = x * 0xED5AD4BB & 0xFFFFFFFF
    x ^= x >> 11
    x = x * 0xAC4C1B51 & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x31848BAB & 0xFFFFFFFF
    x ^= x >> 14
    return x


def triple32_inverse(x: np.ndarray, key1: int) -> np.ndarray:
    """The published inverse, with the second key word taken out where it went in."""
    x = x ^ x >> 14 ^ x >> 28
    x = x * np.uint32(0x32B21703)
    x = x ^ x >> 15 ^ x >> 30
    x = x * np.uint32(0x469E0DB1)
    x = x ^ x >> 11 ^ x >> 22
    x = x ^ np.uint32(key1)
    x = x * np.uint32(0x79A85073)
    return x ^ x >> 17


def numpy_word(index: np.ndarray, key: tuple[int, int], step: int) -> np.ndarray:
    """The docstring's formula in uint32."""
    k0 = np.uint32((key[0] + step * 0x9E3779B9) % 2**32)
    k1 = np.uint32((key[1] + step * 0xBB67AE85) % 2**32)
    x = index ^ k0
    x = x ^ (x >> 17)
    x = x * np.uint32(0xED5AD4BB)
    x = x ^ k1
    x = x ^ (x >> 11)
    x = x * np.uint32(0xAC4C1B51)
    x = x ^ (x >> 15)
    x = x * np.uint32(0x31848BAB)
    return x ^ (x >> 14)


EDGES = np.array([0, 1, 2, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1], dtype=np.uint32)
KEYS = ((0, 0), (1, -1), (-(2**31), 2**31 - 1), (2**31 - 1, -(2**31)), (-1, 12345), KEY)


@pytest.mark.parametrize("step", [0, 1, 2, 123456, 2**31 - 1, -(2**31), -1])
@pytest.mark.parametrize("key", KEYS)
def test_random_word_is_the_formula(key, step):
    index = np.concatenate([EDGES, np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)])
    got = random_word(P, torch.from_numpy(index.view(np.int32)), (int32(key[0]), int32(key[1])), int32(step))
    assert got.dtype == torch.int32
    np.testing.assert_array_equal(got.numpy().view(np.uint32), numpy_word(index, key, step))


def test_random_word_without_a_key_is_triple32():
    index = np.concatenate([EDGES, np.random.default_rng(1).integers(0, 2**32, 1000, dtype=np.uint32)])
    got = random_word(P, torch.from_numpy(index.view(np.int32)), (int32(0), int32(0)), int32(0))
    assert got.numpy().view(np.uint32).tolist() == [triple32(int(i)) for i in index]


@pytest.mark.parametrize(("key", "step"), [((0, 0), 0), (KEY, 7), ((-1, 2**31 - 1), 2**31 - 1)])
def test_no_two_elements_share_a_word(key, step):
    """The published inverse takes 2**24 words back to their indices."""
    k0, k1 = ((k + step * int(weyl)) % 2**32 for k, weyl in zip(key, noise.WEYL, strict=True))
    for start in (0, 2**31 - 2**22):
        for index in np.arange(start, start + 2**23, dtype=np.uint32).reshape(-1, PIECE):
            word = random_word(P, torch.from_numpy(index.view(np.int32)), key, int32(step))
            np.testing.assert_array_equal(triple32_inverse(word.numpy().view(np.uint32), k1) ^ np.uint32(k0), index)


def test_constants():
    assert [round(special.erfc((2 * k - 1) / math.sqrt(2)) * 2**31) for k in (1, 2, 3, 4)] == [*TAIL_COUNTS, 0]
    assert [w % 2**32 for w in noise.WEYL] == [int((math.sqrt(5) - 1) / 2 * 2**32), int((math.sqrt(3) - 1) * 2**32)]


def test_rounded_normal_has_the_exact_number_of_words():
    """R changes at the tail counts, on both sides. Each word comes once in 2**32 elements: this is the law."""
    one, two, three = TAIL_COUNTS
    cases = [(0, 3), (three - 1, 3), (three, 2), (two - 1, 2), (two, 1), (one - 1, 1), (one, 0), (2**31 - 1, 0)]
    for magnitude, r in cases:
        word = int32([magnitude, wrap_int32(magnitude + 2**31)])
        assert draw(word).tolist() == [r, -r]
    ramp = torch.arange(2**31 // 509, dtype=torch.int32) * 509
    r = draw(ramp)
    assert bool((r[1:] <= r[:-1]).all())


def test_rounded_normal_law():
    """Chi-square of R over -3..3 on 2**25 draws, and mean and variance of each stream."""
    streams = list(itertools.product((0, 1), ("layers.0.weight", "layers.1.weight"), (0, 1)))
    n, r = 2**22, np.arange(-3, 4)
    total = np.zeros(7)
    for seed, name, step in streams:
        pieces = words(22, key_words(seed, name), step).split(PIECE)
        counts = sum(torch.bincount(draw(piece).int() + 3, minlength=7) for piece in pieces).numpy()
        assert abs((counts * r).sum()) / math.sqrt(VARIANCE * n) < bound(2 * len(streams))
        spread = math.sqrt((FOURTH - VARIANCE**2) * n)
        assert abs((counts * r**2).sum() - n * VARIANCE) / spread < bound(2 * len(streams))
        total += counts
    expected = n * len(streams) * np.array([m / 2 for m in MASS[:0:-1]] + [MASS[0]] + [m / 2 for m in MASS[1:]])
    assert expected.min() > 9
    p_value = stats.chi2.sf(((total - expected) ** 2 / expected).sum(), 6)
    # Too good a fit would be as telling.
    assert P_VALUE < p_value < 1 - P_VALUE


def test_uniform_law():
    """Chi-square on 256 bins, mean, variance and fourth moment, on 2**24 draws."""
    n, bins, moments = 2**24, torch.zeros(256), torch.zeros(3, dtype=torch.float64)
    for piece in words(24).split(PIECE):
        u = draw(piece, "uniform")
        bins += torch.histc(u, 256, -0.5, 0.5)
        square = u * u
        moments += torch.stack([u.sum(), square.sum(), (square * square).sum()])
    assert P_VALUE < stats.chisquare(bins.numpy()).pvalue < 1 - P_VALUE
    exact = [(0, 1 / 12), (1 / 12, 1 / 180), (1 / 80, 1 / 2304 - 1 / 6400)]
    for moment, (mean, variance) in zip(moments.tolist(), exact, strict=True):
        assert abs(moment - n * mean) / math.sqrt(variance * n) < bound(3)


def test_uniform_grid():
    """The odd multiples of 2**-25: symmetric, never zero, inside (-1/2, 1/2)."""
    magnitude = torch.cat([torch.arange(0, 2**31 - 1, 4099, dtype=torch.int32), int32([255, 256, 2**31 - 1])])
    u = draw(magnitude, "uniform")
    assert torch.equal(u, ((magnitude // 256) * 2 + 1).float() * 2.0**-25)
    assert torch.equal(draw(magnitude + wrap_int32(2**31), "uniform"), -u)
    assert u.min() == 2.0**-25
    assert u.max() == 0.5 - 2.0**-25


@pytest.mark.parametrize("step", [0, 1000])
def test_every_bit_is_balanced(step):
    n = 2**24
    assert float(((ones(words(24, step=step)) - n / 2).abs() / math.sqrt(n / 4)).max()) < bound(32)


@pytest.mark.parametrize(("view", "log2"), [("rounded_normal", 24), ("zero", 22), ("uniform", 22)])
def test_elements_of_a_weight_are_uncorrelated(view, log2):
    """At every distance: neighbours along rows, columns and in blocks are among them."""
    lags = assert_white(standard(words(log2), view))
    near = torch.tensor([*range(1, 65), *(2**k for k in range(7, log2 - 1)), *(4096 * k for k in range(2, 65))])
    assert float(lags[near].abs().max()) < bound(len(near))


def test_bits_of_neighbours_are_uncorrelated():
    """All 32 x 32 pairs of bits, within a word, at lags 1..64 and at powers of two."""
    x, n = words(22), 2**18
    near = signs(x[: n + 64])
    limit = bound(1024 * (65 + 15))
    for lag in range(65):
        scores = near[:n].t() @ near[lag : lag + n] / math.sqrt(n)
        assert float((scores - scores.diag().diag() * (lag == 0)).abs().max()) < limit, lag
    for lag in (2**k for k in range(7, 22)):
        assert float((near[:n].t() @ signs(x[lag : lag + n])).abs().max()) / math.sqrt(n) < limit, lag


@pytest.mark.parametrize("element", [0, 2**24 - 1, wrap_int32(2**32 - 1)])
def test_steps_of_an_element_are_uncorrelated(element):
    word = random_word(P, int32(element), KEY, torch.arange(2**20, dtype=torch.int32))
    for view in ("rounded_normal", "zero"):
        assert_white(standard(word, view))
    n = len(word)
    assert float((ones(word) - n / 2).abs().max()) / math.sqrt(n / 4) < bound(32)
    assert float(bit_scores(word[: n // 2], word[1 : n // 2 + 1]).abs().max()) < bound(1024)


A, B = KEY
OTHERS = {
    **{f"step {s}": (KEY, s) for s in (1, 2, 233, 75025, 2**20)},
    **{f"weight {i}": (key_words(0, f"layers.{i}.weight"), s) for i, s in ((1, 0), (2, 0), (3, 1))},
    **{f"seed {i}": (key_words(i, "layers.0.weight"), 0) for i in (1, 2)},
    **{f"first word, bit {b}": ((A ^ wrap_int32(1 << b), B), 0) for b in (20, 31)},
    **{f"second word, bit {b}": ((A, B ^ 1 << b), 0) for b in (0, 14, 27)},
    "second word, plus 1": ((A, wrap_int32(B + 1)), 0),
    "both words, plus 1": ((wrap_int32(A + 1), wrap_int32(B + 1)), 0),
}


@functools.cache
def spectra(key: tuple[int, int], step: int, view: str) -> tuple[torch.Tensor, ...]:
    x = standard(words(20, key, step), view)
    return x, torch.fft.rfft(x), walsh(x)


@pytest.mark.parametrize("other", OTHERS)
def test_streams_are_uncorrelated(other):
    """Two steps, weights or seeds: at every shift and XOR of the indices, and bit by bit at the same index."""
    for view in ("rounded_normal", "zero"):
        (x, *transforms), (y, *others) = spectra(KEY, 0, view), spectra.__wrapped__(*OTHERS[other], view)
        n = x.numel()
        assert abs(float(x @ y)) / math.sqrt(n) < bound(2 * len(OTHERS))
        assert float(shift_scores(transforms[0], others[0]).abs().max()) < bound(2 * n * len(OTHERS))
        assert float(xor_scores(transforms[1], others[1]).abs().max()) < bound(2 * n * len(OTHERS))
    assert float(bit_scores(words(20), words(20, *OTHERS[other])).abs().max()) < bound(1024 * len(OTHERS))


def test_first_key_word_permutes_the_elements():
    """What the first word does alone, and why there is a second: the same noise, the indices XORed."""
    index = torch.arange(2**16, dtype=torch.int32)
    for difference in (1, 255, 2**15):
        assert torch.equal(words(16, (A ^ difference, B)), words(16)[(index ^ difference).long()])
        mixed = words(16, (A ^ difference, B ^ 0x5555))
        assert float(bit_scores(mixed, words(16)[(index ^ difference).long()]).abs().max()) < bound(1024)


# How far a bit of the second key word, which goes in one round later, may be from flipping half of the time.
# Measured on 2**24 draws: below 0.002 up to bit 27, then 0.0047, 0.0068, 0.0090 and 0.0079.
SECOND_WORD = {28: 0.005, 29: 0.007, 30: 0.009, 31: 0.008}


@pytest.mark.parametrize("source", ["index", "first word", "second word", "step"])
def test_avalanche(source):
    """Flipping an input bit flips every output bit half of the time."""
    n = 2**19
    draws = np.random.default_rng(2).integers(-(2**31), 2**31, (4, n), dtype=np.int32)
    inputs = dict(zip(("index", "first word", "second word", "step"), map(torch.from_numpy, draws), strict=True))

    def word() -> torch.Tensor:
        return random_word(P, inputs["index"], (inputs["first word"], inputs["second word"]), inputs["step"])

    before, kept = word(), inputs[source]
    limit = bound(4 * 1024) / math.sqrt(4 * n)
    for bit in range(32):
        inputs[source] = kept ^ wrap_int32(1 << bit)
        deviation = (ones(before ^ word()) / n - 0.5).abs()
        allowed = SECOND_WORD.get(bit, 0.0) if source == "second word" else 0.0
        assert float(deviation.max()) < limit + allowed, bit


@pytest.mark.parametrize("law", ["rounded_normal", "uniform"])
@pytest.mark.parametrize("enabled", [0, -1])
def test_untouched_weights_keep_their_bits(law, enabled):
    """Noise switched off, and R = 0: not even the sign of a zero or the payload of a NaN changes."""
    special = [0.0, -0.0, 1e-45, -1e-45, 1.0, -3.0, 3.4e38, math.inf, -math.inf, math.nan]
    payload = int32([0x7FC00123, wrap_int32(0xFFC00001)]).view(torch.float32)
    w = torch.cat([torch.tensor(special), payload]).repeat(4096)
    word = words(20)[: w.numel()]
    for amax in (0.0, 1.0, math.inf, math.nan):
        y = add_noise(P, law, w, fixed_amplitude(P, torch.full_like(w, amax), 4.0), word, int32(enabled))
        same = y.view(torch.int32) == w.view(torch.int32)
        if not enabled:
            assert bool(same.all())
        elif law == "rounded_normal":
            untouched = draw(word) == 0
            assert bool(same[untouched].all())
            assert 0.6 < float(untouched.float().mean()) < 0.75


@pytest.mark.parametrize("law", ["rounded_normal", "uniform"])
@pytest.mark.parametrize(("shape", "batch_dims"), [((70, 100), 0), ((3, 40, 33), 1), ((8, 5, 3, 3), 0)])
def test_the_operator_draws_by_row_major_index(law, shape, batch_dims):
    """w + R a 2**(1-b) in numpy, from the kernel's key, clock and block maxima; the format keeps all of float32."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal(shape).astype(np.float32)
    key, step, b, block = int32(key_words(0, "b")), 5, 5.0, (32, 16)
    spec = SampleSpec(FloatFormat.parse("e8m23"), law, b, None, None, torch.float32)
    got = sample_eager(torch.from_numpy(w), spec, batch_dims, block, key, int32([step, -1]))
    word = numpy_word(np.arange(w.size, dtype=np.uint32), key_words(0, "b"), step)
    magnitude, sign = (word & 0x7FFFFFFF).astype(np.int64), np.where(word >> 31, -1, 1)
    if law == "uniform":
        r = ((magnitude // 256) * 2 + 1) / 2**25 * sign
    else:
        r = sum(magnitude < tail for tail in TAIL_COUNTS) * sign
    view = w.reshape(-1, *w.shape[batch_dims : batch_dims + 1], w[(0,) * (batch_dims + 1)].size)
    amax = np.empty_like(view)
    for m, i, j in itertools.product(*(range(0, n, s) for n, s in zip(view.shape, (1, *block), strict=True))):
        tile = (m, slice(i, i + block[0]), slice(j, j + block[1]))
        amax[tile] = np.abs(view[tile]).max()
    shift = r.reshape(view.shape).astype(np.float32) * (amax * np.float32(2 ** (1 - b)))
    np.testing.assert_array_equal(got.numpy(), (view + shift).reshape(shape))
