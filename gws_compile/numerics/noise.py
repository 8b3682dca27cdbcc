"""Counter-based noise: a random word for each (key, step, element), and the laws drawn from it.

The random word of element ``i`` of a weight is ``triple32(i)`` with the weight's two key words fed in before and after
the first multiplication:

    k0 = key[0] + step * 0x9E3779B9          k1 = key[1] + step * 0xBB67AE85        (mod 2**32)
    x = i ^ k0;  x ^= x >> 17;  x *= 0xED5AD4BB;  x ^= k1
    x ^= x >> 11;  x *= 0xAC4C1B51;  x ^= x >> 15;  x *= 0x31848BAB;  x ^= x >> 14

`triple32` is the three-round 32-bit mixer that C. Wellons found by search (hash-prospector, 2018,
https://github.com/skeeto/hash-prospector); the two Weyl constants are those of Philox's key schedule (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011). Feeding the second key word in behind the first round keeps two
weights (or steps) whose first words differ little from drawing shifted copies of one another's noise.

All of it is 32-bit integer arithmetic, so every device and every rank draws the same bits.
"""

from __future__ import annotations

from typing import Literal, get_args

from .float32 import MAGNITUDE, SIGN, nearest_float32
from .primitives import Primitives, Value, wrap_int32

Noise = Literal["rounded_normal", "uniform", "none"]
"""A law of R, or none."""

NOISES: tuple[Noise, ...] = get_args(Noise)

WEYL = (wrap_int32(0x9E3779B9), wrap_int32(0xBB67AE85))
_ROUND = (wrap_int32(0xED5AD4BB), wrap_int32(0xAC4C1B51), wrap_int32(0x31848BAB))

# P(|round(N(0,1) / 2)| >= k) = P(|N| >= 2k - 1) = erfc((2k - 1) / sqrt 2), in units of 2**-31; k = 4 is 2.6e-12 and
# has no word left. Written out, since a libm may differ in the last digit of erfc; a test checks them.
TAIL_COUNTS = (681419127, 5797768, 1231)


def random_word(p: Primitives, index: Value, key: tuple[Value, Value], step: Value) -> Value:
    """The 32 random bits of an element.

    Args:
        p: the operations to write it in.
        index: int32, the element's index in the whole weight, row-major, mod 2**32.
        key: two int32 words of the weight.
        step: int32, the draw's number.

    Returns:
        int32, uniform over all 2**32 words.
    """
    k0 = p.iadd(key[0], p.imul(step, WEYL[0]))
    k1 = p.iadd(key[1], p.imul(step, WEYL[1]))
    x = p.ixor(index, k0)
    x = p.imul(p.ixor(x, p.ishr(x, 17)), _ROUND[0])
    x = p.ixor(x, k1)
    x = p.imul(p.ixor(x, p.ishr(x, 11)), _ROUND[1])
    x = p.imul(p.ixor(x, p.ishr(x, 15)), _ROUND[2])
    return p.ixor(x, p.ishr(x, 14))


def fixed_amplitude(p: Primitives, amax: Value, bits: float) -> Value:
    """``a * 2**(1 - b)``, float32, for a width b that is the same everywhere."""
    return p.fmul(amax, nearest_float32(2.0 ** (1.0 - bits)))


def add_noise(p: Primitives, noise: str, w: Value, amplitude: Value, word: Value, enabled: Value) -> Value:
    """``w + R * amplitude`` with R drawn from the word.

    Args:
        p: the operations to write it in.
        noise: the law of R, see `draw`.
        w: float32 weight.
        amplitude: float32, ``a * 2**(1 - b)``.
        word: int32 from `random_word`.
        enabled: int32, -1 to draw, 0 to leave ``w`` untouched.

    Returns:
        float32; bit for bit ``w`` where R is 0.
    """
    hit, size = draw(p, noise, word, enabled, amplitude)
    # The sign goes on as a bit, not as a factor: nothing a compiler could contract with the addition into a fused
    # multiply-add, which would round differently from the eager kernel.
    return p.fselect(hit, p.fadd(w, _with_sign(p, size, word)), w)


def draw(p: Primitives, noise: str, word: Value, enabled: Value, amplitude: Value) -> tuple[Value, Value]:
    """Whether R is drawn and not 0, and ``|R| * amplitude``; the word's top bit is the sign of R.

    Args:
        p: the operations to write it in.
        noise: ``"rounded_normal"``: R = round(N(0,1) / 2), whose law is exact to 2**-31 (arXiv 2505.11170, and
            `TAIL_COUNTS` above). ``"uniform"``: R = U(-1/2, 1/2), on the odd multiples of 2**-25 (DiffQ, Defossez et
            al. 2021, arXiv 2104.09987).
        word: int32 from `random_word`: the top bit is the sign of R, the others its magnitude.
        enabled: int32, -1 to draw, 0 for R = 0.
        amplitude: float32, or 1.0.

    Returns:
        A mask, and float32.
    """
    magnitude = p.iand(word, MAGNITUDE)
    if noise == "rounded_normal":
        one, two, three = TAIL_COUNTS
        hit = p.ilt(magnitude, p.iand(enabled, one))
        # The multiples are the same for all elements of a block: selected, not multiplied.
        double, triple = p.fmul(amplitude, 2.0), p.fmul(amplitude, 3.0)
        return hit, p.fselect(p.ilt(magnitude, three), triple, p.fselect(p.ilt(magnitude, two), double, amplitude))
    if noise == "uniform":
        size = p.fmul(p.to_float(p.iadd(p.imul(p.ishr(magnitude, 8), 2), 1)), 2.0**-25)
        return p.ilt(enabled, 0), p.fmul(size, amplitude)
    raise AssertionError(noise)


def signed_draw(p: Primitives, noise: str, word: Value, enabled: Value) -> Value:
    """R itself, float32."""
    hit, size = draw(p, noise, word, enabled, 1.0)
    return p.fselect(hit, _with_sign(p, size, word), 0.0)


def _with_sign(p: Primitives, size: Value, word: Value) -> Value:
    return p.bits_float(p.ior(p.float_bits(size), p.iand(word, SIGN)))
