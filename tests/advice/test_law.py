"""The scaling law: published figures, and every optimum against a search that knows only the loss."""

import dataclasses
import math

import pytest
from scipy import optimize

from gws_compile import FloatFormat, ScalingLaw
from gws_compile.advice.law import COMPUTE_PER_BIT, splits

LAW = ScalingLaw()
OTHER = ScalingLaw(n=31.0, alpha=0.31, d=900.0, beta=0.37, eps=1.2, gamma=50.0, delta=2.2, nu=3.4)


def written_out(law, params, tokens, exponent, mantissa, log2_block):
    """The loss in the paper's words, term by term."""
    model = law.n / params**law.alpha
    data = law.d / tokens**law.beta
    format_part = (exponent + 0.5) ** law.delta * (mantissa + 0.5) ** law.nu
    precision = tokens**law.beta / params**law.alpha * log2_block / (law.gamma * format_part)
    return model, data, law.eps, precision


def lowest(function, low, high):
    """Where a function of one valley has its minimum."""
    found = optimize.minimize_scalar(function, bounds=(low, high), method="bounded", options={"xatol": 1e-10})
    return float(found.x)


def at_fixed_compute(law, compute, tokens, bits, exponent, mantissa, log2_block):
    params = compute / (6 / 16 * bits * tokens)
    return sum(written_out(law, params, tokens, exponent, mantissa, log2_block))


def real_split(law, bits):
    """E and M of P bits, by search."""
    exponent = lowest(lambda e: -law.delta * math.log(e + 0.5) - law.nu * math.log(bits - e - 0.5), -0.49, bits - 0.51)
    return exponent, bits - 1 - exponent


# --- The loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [LAW, OTHER], ids=["published", "other"])
@pytest.mark.parametrize(
    ("exponent", "mantissa", "block", "log2_block"), [(4, 3, 128, 7), (2, 1, 32, 5), (1.5, 0, 2, 1)]
)
def test_the_terms(law, exponent, mantissa, block, log2_block):
    found = law.terms(3e8, 2e10, exponent, mantissa, block)
    expected = written_out(law, 3e8, 2e10, exponent, mantissa, log2_block)
    assert dataclasses.astuple(found) == pytest.approx(expected, rel=1e-12)
    assert law.loss(3e8, 2e10, exponent, mantissa, block) == pytest.approx(sum(expected), rel=1e-12)


def test_without_quantization_the_last_term_is_none():
    found = LAW.terms(3e8, 2e10)
    assert found.precision == 0
    assert found.loss == pytest.approx(69.2343 / 3e8**0.2368 + 68973.0621 / 2e10**0.5162 + 1.9061, rel=1e-12)


def test_a_scale_a_channel():
    found = LAW.terms(3e8, 2e10, 4, 3, "channel").precision
    assert found == pytest.approx(written_out(LAW, 3e8, 2e10, 4, 3, 13.1567)[3], rel=1e-12)


# --- D_crit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exponent", "mantissa", "block", "tokens"),
    [
        (8, 7, 128, 1730e12),
        (4, 3, 128, 27.33e12),
        (2, 1, 128, 0.3928e12),
        (8, 7, 32, 2396e12),
        (4, 3, 32, 37.86e12),
        (2, 1, 32, 0.544e12),
    ],
)
def test_published_critical_tokens(exponent, mantissa, block, tokens):
    assert LAW.critical_tokens(1e9, exponent, mantissa, block) == pytest.approx(tokens, rel=5e-4)


@pytest.mark.parametrize("law", [LAW, OTHER], ids=["published", "other"])
@pytest.mark.parametrize(("exponent", "mantissa", "block", "log2_block"), [(4, 3, 128, 7), (2, 1, "channel", 13.1567)])
def test_the_loss_is_lowest_at_the_critical_tokens(law, exponent, mantissa, block, log2_block):
    found = lowest(
        lambda log: sum(written_out(law, 1e9, math.exp(log), exponent, mantissa, log2_block)),
        math.log(1e3),
        math.log(1e18),
    )
    assert math.log(law.critical_tokens(1e9, exponent, mantissa, block)) == pytest.approx(found, abs=1e-4)


# --- The best split ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "name"), [(4, "e2m1"), (6, "e3m2"), (8, "e4m3"), (16, "e8m7")])
def test_the_best_whole_splits(bits, name):
    split = LAW.best_split(bits)
    assert split.fmt == FloatFormat.parse(name)
    assert split.exponent_bits + split.mantissa_bits + 1 == pytest.approx(bits)


@pytest.mark.parametrize("law", [LAW, OTHER], ids=["published", "other"])
@pytest.mark.parametrize("bits", [3, 4.27, 8, 11.5])
def test_the_best_real_split(law, bits):
    split = law.best_split(bits)
    assert (split.exponent_bits, split.mantissa_bits) == pytest.approx(real_split(law, bits), abs=1e-4)
    assert (split.fmt is None) == (bits != int(bits))


@pytest.mark.parametrize("bits", range(3, 17))
def test_the_best_whole_split_has_the_least_loss(bits):
    pairs = [(e, bits - 1 - e) for e in range(1, 9) if bits - 1 - e >= 1]
    best = min(pairs, key=lambda pair: sum(written_out(OTHER, 1e9, 1e11, *pair, 7)))
    fmt = OTHER.best_split(bits).fmt
    assert (fmt.exponent_bits, fmt.mantissa_bits) == best


def test_all_splits_of_so_many_bits():
    assert [fmt.spec for fmt in splits(6)] == ["e1m4", "e2m3", "e3m2", "e4m1"]
    assert [fmt.spec for fmt in splits(3)] == ["e1m1"]
    assert [fmt.exponent_bits for fmt in splits(32)] == [8]


@pytest.mark.parametrize("bits", [2, 33, True, "8", math.nan])
def test_bits_that_are_none(bits):
    with pytest.raises(ValueError, match=r"bits is .*; accepted: 3 to 32"):
        LAW.best_split(bits)


# --- The best precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "bits"), [(1e11, 4.268), (1e14, 7.624)])
def test_published_best_bits(tokens, bits):
    assert LAW.best_bits(tokens, 128) == pytest.approx(bits, abs=5e-4)


@pytest.mark.parametrize("law", [LAW, OTHER], ids=["published", "other"])
@pytest.mark.parametrize("compute", [1e20, 1e25])
def test_the_best_bits_have_the_least_loss_at_any_compute(law, compute):
    tokens = 1e12

    def loss(bits):
        return at_fixed_compute(law, compute, tokens, bits, *real_split(law, bits), 5)

    assert law.best_bits(tokens, 32) == pytest.approx(lowest(loss, 1.1, 40), abs=1e-3)


@pytest.mark.parametrize("tokens", [1e9, 1e11, 1e13, 1e16])
@pytest.mark.parametrize("compute", [1e21, 1e26])
def test_the_best_format_has_the_least_loss_at_any_compute(tokens, compute):
    pairs = [(e, m) for e in range(1, 9) for m in range(1, 24) if e + m >= 2]
    best = min(pairs, key=lambda pair: at_fixed_compute(LAW, compute, tokens, sum(pair) + 1, *pair, 7))
    found = LAW.best_format(tokens)
    assert (found.exponent_bits, found.mantissa_bits) == best


@pytest.mark.parametrize(("compute", "bits"), [(1e21, 4.190), (1e24, 5.005), (1e31, 7.578)])
def test_published_best_budgets(compute, bits):
    best = LAW.best_budget(compute, 128)
    assert best.bits == pytest.approx(bits, abs=5e-4)
    assert COMPUTE_PER_BIT * best.params * best.bits * best.tokens == pytest.approx(compute, rel=1e-12)


@pytest.mark.parametrize("law", [LAW, OTHER], ids=["published", "other"])
@pytest.mark.parametrize("compute", [1e21, 1e24])
def test_the_best_budget_has_the_least_loss(law, compute):
    """A search over D and P, which begins elsewhere."""

    def loss(at):
        log_tokens, bits = at
        both = law.delta + law.nu
        split = law.delta * bits / both - 0.5, law.nu * bits / both - 0.5  # held to a search above
        return at_fixed_compute(law, compute, math.exp(log_tokens), bits, *split, 7)

    options = {"xatol": 1e-9, "fatol": 1e-15, "maxiter": 5000, "maxfev": 5000}
    found = optimize.minimize(loss, [math.log(1e9), 9.0], method="Nelder-Mead", options=options)
    best = law.best_budget(compute, 128)
    assert math.log(best.tokens) == pytest.approx(found.x[0], abs=1e-4)
    assert best.bits == pytest.approx(found.x[1], abs=1e-4)
    assert best.loss == pytest.approx(found.fun, rel=1e-12)


@pytest.mark.parametrize("law", [LAW, OTHER], ids=["published", "other"])
@pytest.mark.parametrize("name", ["e2m1", "e4m3", "bf16"])
def test_the_best_budget_of_a_format(law, name):
    fmt = FloatFormat.parse(name)
    pair = fmt.exponent_bits, fmt.mantissa_bits
    bits = sum(pair) + 1
    found = lowest(
        lambda log: at_fixed_compute(law, 1e23, math.exp(log), bits, *pair, 7), math.log(1e5), math.log(1e18)
    )
    best = law.format_budget(1e23, fmt)
    assert math.log(best.tokens) == pytest.approx(found, abs=1e-4)
    assert best.loss == pytest.approx(at_fixed_compute(law, 1e23, best.tokens, bits, *pair, 7), rel=1e-12)


def test_the_best_budget_of_real_bits_is_best_at_the_best_bits():
    best = LAW.best_budget(1e24)
    assert LAW.real_budget(1e24, best.bits).loss == pytest.approx(best.loss, rel=1e-12)
    assert LAW.real_budget(1e24, best.bits).tokens == pytest.approx(best.tokens, rel=1e-6)


def test_a_law_without_a_best_precision():
    with pytest.raises(ValueError, match=r"alpha=7 above delta \+ nu = 6.147 has no best precision"):
        ScalingLaw(alpha=7).best_bits(1e11)


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, True, "1e9", None])
def test_numbers_that_are_none(value):
    with pytest.raises(ValueError, match=r"params is .*; accepted: a finite number above 0"):
        LAW.loss(value, 1e11)
    with pytest.raises(ValueError, match=r"gamma is .*; accepted: a finite number above 0"):
        ScalingLaw(gamma=value)


@pytest.mark.parametrize("block", [1, 0, 2.0, True, "32", None, (1, 32)])
def test_blocks_that_are_none(block):
    with pytest.raises(ValueError, match=r"block is .*; accepted: a whole number from 2 on"):
        LAW.critical_tokens(1e9, 4, 3, block)


def test_a_scale_for_the_whole_matrix_is_not_known():
    with pytest.raises(ValueError, match=r"block is 'tensor', for which no log2\(B\) is known"):
        LAW.log2_block("tensor")


def test_half_a_format():
    with pytest.raises(ValueError, match="exponent_bits is 4 and mantissa_bits None: give both, or none"):
        LAW.loss(1e9, 1e11, 4)
