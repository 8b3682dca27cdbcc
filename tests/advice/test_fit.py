"""Fits of the scaling law to runs made of known coefficients."""

import itertools
import json
import math

import numpy as np
import pytest

from gws_compile import FloatFormat, GwsWarning, IntFormat, ScalingLaw
from gws_compile.advice.runs import Run, check_runs, read_runs
from gws_compile.advice.terms import NAMES, Points, log_gradient, terms

TRUE = {"n": 40.0, "alpha": 0.21, "d": 2e4, "beta": 0.46, "eps": 1.7, "gamma": 8e3, "delta": 2.7, "nu": 3.3}
PARAMS, TOKENS = (4e7, 1e8, 2e8, 7e8), (2e9, 1e10, 3e10, 1e11)
FORMATS = (None, (1, 1), (1, 3), (2, 1), (3, 1), (2, 2))


def loss(params, tokens, fmt, block=64):
    c = TRUE
    found = c["n"] / params ** c["alpha"] + c["d"] / tokens ** c["beta"] + c["eps"]
    if fmt is not None:
        strength = c["gamma"] * (fmt[0] + 0.5) ** c["delta"] * (fmt[1] + 0.5) ** c["nu"]
        found += tokens ** c["beta"] / params ** c["alpha"] * math.log2(block) / strength
    return found


def made(noise=0.0, seed=0, params=PARAMS, tokens=TOKENS, formats=FORMATS):
    random = np.random.default_rng(seed)
    return [
        {
            "params": n,
            "tokens": d,
            "loss": loss(n, d, fmt) * math.exp(noise * random.standard_normal()),
            "fmt": fmt and f"e{fmt[0]}m{fmt[1]}",
            "block": 64,
        }
        for n, d, fmt in itertools.product(params, tokens, formats)
    ]


def values(law):
    return {name: getattr(law, name) for name in NAMES}


def begun_at_the_truth(*names):
    """A published law but for the coefficients that cannot be determined, which are right."""
    return ScalingLaw(**{name: TRUE[name] for name in names})


def test_the_derivatives():
    """Against central differences."""
    random = np.random.default_rng(1)
    at = Points(
        random.uniform(1e8, 1e9, 7),
        random.uniform(1e9, 1e11, 7),
        random.integers(1, 5, 7).astype(float),
        random.integers(1, 5, 7).astype(float),
        np.array([7.0, 5.0, 0.0, 13.0, 7.0, 4.0, 6.0]),
    )
    coefficients = np.array(list(TRUE.values()))
    found = log_gradient(coefficients, at)
    for i in range(8):
        ahead, behind = (coefficients * np.where(np.arange(8) == i, math.exp(h), 1) for h in (1e-5, -1e-5))
        expected = np.log(terms(ahead, at).loss / terms(behind, at).loss) / 2e-5
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-6, atol=1e-10)


def test_without_noise_the_coefficients_come_back():
    law = ScalingLaw.fit(made())
    assert values(law) == pytest.approx(TRUE, rel=1e-6)
    assert law.fitted.held == {}
    assert law.fitted.runs == 96
    assert law.fitted.error < 1e-9
    assert law.log2_channel == 13.1567


def test_a_scale_a_channel_counts_as_the_law_says():
    runs = [run | {"block": "channel"} for run in made()]
    for run, (n, d, fmt) in zip(runs, itertools.product(PARAMS, TOKENS, FORMATS), strict=True):
        run["loss"] = loss(n, d, fmt, 2**10.5)
    law = ScalingLaw.fit(runs, ScalingLaw(log2_channel=10.5))
    assert values(law) == pytest.approx(TRUE, rel=1e-6)
    assert law.scope.channel
    assert law.scope.block is None


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 20 x 8 intervals at 95 %, 152 are expected; those of one fit go together, so the bounds are wide."""
    inside = np.zeros(8)
    for seed in range(20):
        fitted = ScalingLaw.fit(made(2e-3, seed, params=(4e7, 2e8, 7e8), tokens=(2e9, 1e10, 1e11))).fitted
        assert fitted.held == {}
        inside += [one.low <= TRUE[one.name] <= one.high for one in fitted.coefficients]
    assert 0.88 <= inside.sum() / 160 < 1
    assert (inside >= 16).all()


def test_with_few_runs_intervals_hold_the_truth_nearly_as_often():
    """Nine runs without quantization, for five coefficients: 90 of 100 in docs/advice.md."""
    inside = []
    for seed in range(20):
        runs = made(1e-3, seed, params=(2e7, 6e7, 2e8), tokens=(1e9, 4e9, 2e10), formats=(None,))
        fitted = ScalingLaw.fit(runs, begun_at_the_truth("gamma", "delta", "nu")).fitted
        inside += [one.low <= TRUE[one.name] <= one.high for one in fitted.coefficients if one.held is None]
    assert len(inside) == 100
    assert sum(inside) >= 84


def test_intervals_shrink_as_the_noise_does():
    def widths(noise):
        fitted = ScalingLaw.fit(made(noise, 3)).fitted
        return np.array([math.log(one.high / one.low) for one in fitted.coefficients])

    np.testing.assert_allclose(widths(2e-3) / widths(2e-4), 10, rtol=0.2)


def test_one_bad_run_changes_little():
    """Least squares would follow it: eps alone by a fortieth of 40 %."""
    runs = made(5e-4, 4)
    before = values(ScalingLaw.fit(runs))
    runs[17]["loss"] *= 1.4
    law = ScalingLaw.fit(runs)
    assert values(law) == pytest.approx(before, rel=0.05)
    for one in law.fitted.coefficients:
        assert one.low <= before[one.name] <= one.high


@pytest.mark.parametrize(
    ("design", "held", "reason"),
    [
        ({"params": (1e8,)}, ("n", "alpha"), "3 or more numbers of parameters, far apart; there are 1 (100M)"),
        ({"tokens": (1e10,)}, ("d", "beta"), "3 or more numbers of tokens, far apart; there are 1 (10B)"),
        ({"formats": (None,)}, ("gamma", "delta", "nu"), "; there are 0"),
        ({"formats": (None, (2, 1))}, ("delta", "nu"), "bits; there are 1"),
        ({"formats": ((2, 1),)}, ("delta", "nu"), "bits; there are 1"),
        ({"formats": (None, (1, 1), (1, 2), (1, 3))}, ("delta",), "several numbers of exponent bits; there are 1 (1)"),
        ({"formats": (None, (1, 1), (2, 1), (3, 1))}, ("nu",), "several numbers of mantissa bits; there are 1 (1)"),
        ({"params": (1e8, 4e8), "formats": (None,)}, ("alpha", "gamma", "delta", "nu"), "; there are "),
    ],
    ids=["one N", "one D", "plain", "one format", "one format alone", "one E", "one M", "two N"],
)
def test_what_the_runs_cannot_determine_is_kept(design, held, reason):
    """And the rest comes back where what is kept is right."""
    law = ScalingLaw.fit(made(**design), begun_at_the_truth(*held))
    assert set(law.fitted.held) == set(held)
    assert all(reason in text for text in law.fitted.held.values())
    assert values(law) == pytest.approx(TRUE, rel=1e-5)
    for one in law.fitted.coefficients:
        assert (one.low is None) == (one.high is None) == (one.name in held)
    assert f"It keeps {', '.join(name for name in NAMES if name in held)} of the law" in law.scope.text
    assert "held as before: " in str(law.fitted)


def test_a_format_that_costs_less_than_the_noise_says_nothing():
    law = ScalingLaw.fit(made(1e-3, 1, formats=(None, (8, 7), (8, 10))))
    assert set(law.fitted.held) == {"gamma", "delta", "nu"}
    assert (law.gamma, law.delta, law.nu) == (11334.5197, 3.1926, 2.9543)
    assert law.eps == pytest.approx(1.7, rel=0.05)


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 8, 9])
def test_with_few_runs_two_more_than_is_freed(count):
    runs = made(1e-3, 2)
    fitted = ScalingLaw.fit([runs[i] for i in np.random.default_rng(5).permutation(96)[:count]]).fitted
    free = 8 - len(fitted.held)
    assert 1 <= free <= count - 2
    assert any("too few" in text for text in fitted.held.values())
    assert math.isfinite(fitted.error)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_runs(count):
    with pytest.raises(
        ValueError, match=f"a fit takes 3 runs or more, 2 beyond the free coefficients; there are {count}"
    ):
        ScalingLaw.fit(made()[:count])


def test_runs_that_the_law_does_not_describe():
    random = np.random.default_rng(0)
    runs = [run | {"loss": float(random.uniform(1, 5))} for run in made()]
    assert "the law does not describe these runs" in str(ScalingLaw.fit(runs).fitted)


def test_the_fits_scope():
    law = ScalingLaw.fit(made())
    assert law.scope.params == (4e7, 7e8)
    assert law.scope.tokens == (2e9, 1e11)
    assert law.scope.exponent_bits == (1, 3)
    assert law.scope.mantissa_bits == (1, 3)
    assert law.scope.block == (64, 64)
    assert law.scope.text.startswith(
        "Fitted to 96 runs of one's own, 40M to 700M parameters and 2B to 100B tokens. It holds"
    )
    assert law.scope.beyond([7e8], [1e11], [FloatFormat.parse("e3m3")], 64) == ()


def test_a_fit_without_scipy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"a fit needs scipy: pip install 'gws-compile\[advice\]'"):
        ScalingLaw.fit(made())


# --- Runs -------------------------------------------------------------------------------------------------------------

RUN = {"params": 1e8, "tokens": 1e9, "loss": 3.0}


def test_what_a_run_may_be():
    found = check_runs(
        [
            RUN,
            RUN | {"fmt": "fp6_e3m2", "block": 32, "name": "of no concern"},
            RUN | {"fmt": FloatFormat.parse("e4m3"), "block": [1, 128]},
            RUN | {"fmt": "bf16", "block": "channel", "params": 100},
            Run(1e8, 1e9, 3.0),
        ]
    )
    assert found == [
        Run(1e8, 1e9, 3.0, None, 128),
        Run(1e8, 1e9, 3.0, FloatFormat.make(3, 2), 32),
        Run(1e8, 1e9, 3.0, FloatFormat.make(4, 3), 128),
        Run(100, 1e9, 3.0, FloatFormat.make(8, 7), "channel"),
        Run(1e8, 1e9, 3.0),
    ]
    assert check_runs([RUN | {"block": (32, 32)}])[0].block == 1024


def test_runs_that_are_left_out_are_counted():
    strange = [
        *({"fmt": name} for name in ("int4", "int4", "mxfp8", "?")),
        {"fmt": IntFormat(8)},
        {"fmt": 3},
        {"loss": math.nan},
        {"loss": math.inf},
    ]
    with pytest.warns(GwsWarning, match="8 of 9 runs are left out of the fit: ") as caught:
        assert len(check_runs([RUN, *(RUN | one for one in strange)])) == 1
    message = str(caught[0].message)
    for text in (
        "2 in the integer format int4",
        "1 in 'mxfp8', which is no float format",
        "1 in '?'",
        "1 in the integer format int8",
        "1 in 3",
        "1 with loss nan",
        "1 with loss inf",
    ):
        assert text in message


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([{"params": 1e8, "loss": 3.0}], "run 0 has no 'tokens'; it has params, loss"),
        ([RUN, RUN | {"loss": -1.0}], "run 1: loss is -1.0; accepted: a finite number above 0"),
        ([RUN | {"params": "1e8"}], "run 0: params is '1e8'"),
        ([RUN | {"fmt": "e4m3", "block": "all"}], "run 0: block is 'all'"),
        ([RUN | {"block": [32, 0]}], r"run 0: block is \[32, 0\]"),
        ([3], "run 0 is 3; accepted: an object with params"),
        ({"losses": []}, "an object without the key 'runs'"),
        ({"runs": 3}, "the runs are 3; accepted: a list of objects"),
        ("runs.json", "the runs are 'runs.json'"),
    ],
)
def test_runs_that_are_none(runs, message):
    with pytest.raises(ValueError, match=message):
        check_runs(runs)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_of_runs(tmp_path, wrapped):
    path = tmp_path / "runs.json"
    path.write_text(json.dumps({"runs": [RUN], "settings": {}} if wrapped else [RUN]))
    assert read_runs(path) == [RUN]


@pytest.mark.parametrize(("text", "message"), [("{", "runs.json: Expecting"), ("3", "runs.json: the runs are 3")])
def test_a_file_without_runs(tmp_path, text, message):
    path = tmp_path / "runs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_runs(path)


def test_runs_of_a_comparison():
    """Of its methods those that the law is about are fitted to; runs without a loss say nothing."""
    of_one = {"params": 1e8, "tokens": 1e9, "loss": 3.0, "fmt": "fp4_e2m1", "block": [32, 32]}
    given = [
        {**of_one, "fmt": None, "method": "plain"},
        {**of_one, "method": "straight-through"},
        {**of_one, "method": "rounded-normal"},
        {**of_one, "method": "straight-through", "fmt": "nvfp4"},
        {**of_one, "method": "straight-through", "loss": None},
    ]
    with pytest.warns(GwsWarning, match="3 of 5 runs are left out of the fit: 1 of other methods than a straight-thr"):
        kept = check_runs(given)
    assert [(run.fmt is None, run.block) for run in kept] == [(True, 1024), (False, 1024)]
