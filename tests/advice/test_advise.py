"""What `advise` answers: its rows against the equation, its words against what was asked."""

import json
import math

import pytest

import gws_compile
from gws_compile import FORMATS, Advice, FloatFormat, ScalingLaw, advise
from gws_compile.advice.quantities import parse_quantity, quantity

SCOPE = "Fitted to training in which W is rounded in forward, W in backward and x in wgrad, to nearest, with"


def loss_of_format(params, tokens, exponent, mantissa, log2_block):
    """The last term of the published law."""
    strength = 11334.5197 * (exponent + 0.5) ** 3.1926 * (mantissa + 0.5) ** 2.9543
    return tokens**0.5162 / params**0.2368 * log2_block / strength


def plain_loss(params, tokens):
    return 69.2343 / params**0.2368 + 68973.0621 / tokens**0.5162 + 1.9061


def test_a_model_and_its_data():
    answer = advise(params=5e8, tokens=5e10, fmt="e4m3", block=32)
    assert isinstance(answer, Advice)
    assert [row.name for row in answer.formats] == ["fp8_e4m3", "none"]
    row = answer["fp8_e4m3"]
    cost, bf16 = (loss_of_format(5e8, 5e10, *pair, 5) for pair in ((4, 3), (8, 7)))
    assert row.terms.loss == pytest.approx(plain_loss(5e8, 5e10) + cost, rel=1e-12)
    assert row.terms.precision == pytest.approx(cost, rel=1e-12)
    assert row.cost_over_bf16 == pytest.approx(cost - bf16, rel=1e-12)
    assert row.critical_tokens == ScalingLaw().critical_tokens(5e8, 4, 3, 32)
    assert (row.bits, row.params, row.tokens, row.past_critical) == (8, 5e8, 5e10, False)
    plain = answer["none"]
    assert plain.terms.loss == pytest.approx(plain_loss(5e8, 5e10), rel=1e-12)
    assert plain.cost_over_bf16 == pytest.approx(-bf16, rel=1e-12)
    assert (plain.bits, plain.critical_tokens, plain.past_critical) == (None, None, None)
    assert "over bf16: the format's term less that of E8M7 at the same parameters, tokens and block\n" in str(answer)
    assert answer.best_bits == ScalingLaw().best_bits(5e10, 32)
    with pytest.raises(KeyError, match="the rows are fp8_e4m3, none"):
        answer["e4m3"]


def test_the_named_formats_by_default():
    answer = advise(1e9, 1e12)
    assert [row.name for row in answer.formats] == [*FORMATS, "none"]
    assert answer["bf16"].cost_over_bf16 == 0
    assert {row.name for row in answer.formats if row.past_critical} == {"fp4_e2m1"}


def test_past_the_critical_tokens_is_above_them():
    critical = ScalingLaw().critical_tokens(1e9, 2, 1)
    assert advise(1e9, critical, "e2m1").formats[0].past_critical is False
    assert advise(1e9, critical * (1 + 1e-9), "e2m1").formats[0].past_critical is True


def test_a_model_alone():
    answer = advise(1e9, fmt=["e2m1", "e4m3"])
    assert [row.terms for row in answer.formats] == [None, None]
    assert [row.critical_tokens for row in answer.formats] == pytest.approx([0.3928e12, 27.33e12], rel=5e-4)
    assert answer.best_bits is None
    assert "D_crit" in str(answer)
    assert "loss" not in str(answer)
    assert "bf16" not in str(answer)


def test_data_alone():
    answer = advise(tokens=1e11)
    assert answer.formats == ()
    assert answer.best_bits == pytest.approx(4.268, abs=5e-4)
    assert answer.best_format.spec == "e2m1"
    assert "4.268 bits; of whole numbers e2m1" in str(answer)


def test_compute_alone():
    answer = advise(compute=1e24, fmt=["e2m1", "e4m3"])
    assert answer.best_budget.bits == pytest.approx(5.005, abs=5e-4)
    for row in answer.formats:
        assert 6 / 16 * row.params * row.bits * row.tokens == pytest.approx(1e24, rel=1e-12)
        cost = loss_of_format(row.params, row.tokens, row.fmt.exponent_bits, row.fmt.mantissa_bits, 7)
        assert row.terms.loss == pytest.approx(plain_loss(row.params, row.tokens) + cost, rel=1e-12)
        assert row.terms.loss > answer.best_budget.loss
    assert "best for this compute: 5.005 bits" in str(answer)
    assert str(answer).startswith("1e+24 operations (6/16 N P D), a scale for 128 elements\n")


@pytest.mark.parametrize(("given", "follows"), [("params", "tokens"), ("tokens", "params")])
def test_compute_and_one_of_the_two(given, follows):
    answer = advise(**{given: 1e10}, compute=1e21, fmt=["e2m1", "e4m3"])
    assert answer.best_budget is None
    for row in answer.formats:
        assert getattr(row, given) == 1e10
        assert getattr(row, follows) == pytest.approx(1e21 / (6 / 16 * row.bits * 1e10), rel=1e-12)
        assert row.terms is not None


def test_bits_ask_for_every_split():
    answer = advise(1e9, 1e11, bits=6)
    assert [row.name for row in answer.formats] == ["fp6_e1m4", "fp6_e2m3", "fp6_e3m2", "fp6_e4m1", "none"]
    assert answer.split.fmt.spec == "e3m2"
    assert "best split of 6 bits: 2.62 exponent and 2.38 mantissa bits; of whole numbers e3m2" in str(answer)
    assert [row.name for row in advise(1e9, 1e11, "e4m3", bits=6).formats] == ["fp8_e4m3", "none"]
    assert advise(bits=6).formats == ()


def test_another_law():
    law = ScalingLaw(eps=3.0)
    assert advise(1e9, 1e11, "e4m3", law=law).formats[0].terms.floor == 3.0


ASKED = [
    {"params": 1e9},
    {"tokens": 1e11},
    {"params": 1e9, "tokens": 1e11},
    {"compute": 1e22},
    {"compute": 1e22, "params": 1e9},
    {"bits": 8},
]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: "+".join(asked))
def test_every_answer_has_its_scope(asked):
    answer = advise(**asked)
    assert SCOPE in str(answer)
    assert "weight-only quantization nor of 32 x 32 blocks" in " ".join(str(answer).split())
    content = json.loads(json.dumps(answer.to_dict(), allow_nan=False))
    assert SCOPE in content["scope"]
    assert content["law"]["gamma"] == 11334.5197
    assert {key: content[key] for key in asked if key != "bits"} == {key: asked[key] for key in asked if key != "bits"}
    assert len(content["formats"]) == len(answer.formats)


def test_json_has_the_rows():
    answer = advise(1e9, 1e11, "e4m3", bits=8)
    content = answer.to_dict()
    assert content["formats"][0]["terms"]["loss"] == answer.formats[0].terms.loss
    assert content["formats"][0]["fmt"] == "fp8_e4m3"
    assert content["formats"][1]["fmt"] is None
    assert content["split"]["fmt"] == "fp8_e4m3"
    assert content["best_format"] == "fp4_e2m1"
    assert content["fit"] is None


# --- What is extrapolated ---------------------------------------------------------------------------------------------


def test_inside_the_fit_nothing_is_extrapolated_but_bf16():
    """Which the costs are compared with."""
    for params, tokens in ((41e6, 10e9), (679e6, 105e9)):
        (only,) = advise(params, tokens, "e4m3", block="channel").extrapolated
        assert only.startswith("bf16, exponent bits 8: 1.33 times the most of the fit, 6; mantissa bits 7: 1.17 times")
    assert advise(5e8, fmt="e4m3").extrapolated == ()


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"params": 1e9}, "params 1B: 1.47 times the most of the fit, 679M"),
        ({"params": 1e7}, "params 10M: the least of the fit, 40.9M, is 4.09 times as much"),
        ({"tokens": 1e14}, "tokens 100T: 954 times the most of the fit, 105B"),
        ({"tokens": 1e9}, "tokens 1B: the least of the fit, 10.5B, is 10.5 times as much"),
        (
            {"params": 5e8, "fmt": "e8m7"},
            "bf16, exponent bits 8: 1.33 times the most of the fit, 6; mantissa bits 7: 1.17",
        ),
        ({"params": 5e8, "fmt": "e2m10"}, "fp13_e2m10, mantissa bits 10: 1.67 times the most of the fit, 6"),
        ({"tokens": 5e10, "block": 16}, "block 16: the least of the fit, 32, is 2 times as much"),
        ({"tokens": 5e10, "block": 4096}, "block 4,096: 8 times the most of the fit, 512"),
        ({"compute": 1e27, "fmt": "e4m3"}, "params "),
    ],
    ids=str,
)
def test_what_is_extrapolated_is_said(asked, text):
    answer = advise(**asked)
    assert any(one.startswith(text) for one in answer.extrapolated), answer.extrapolated
    assert f"extrapolated: {text}" in " ".join(str(answer).split())


def test_a_fit_without_formats_or_channels():
    runs = [{"params": n, "tokens": d, "loss": plain_loss(n, d)} for n in (1e8, 2e8, 4e8) for d in (1e10, 2e10, 4e10)]
    answer = advise(2e8, 2e10, "e4m3", block="channel", law=ScalingLaw.fit(runs))
    assert "block channel: no run of the fit had a scale a channel" in answer.extrapolated
    assert "fp8_e4m3, exponent bits 4: the fit has none; mantissa bits 3: the fit has none" in answer.extrapolated
    assert answer.scope.startswith("Fitted to 9 runs of one's own")
    assert answer.to_dict()["fit"]["coefficients"]["gamma"]["held"].startswith(
        "it takes runs with float formats narrow"
    )


def test_bias_and_maximum_do_not_count():
    answer = advise(1e9, 1e11, ["e4m3", "e4m3b8x240"])
    assert answer.formats[0].terms == answer.formats[1].terms
    assert answer.notes == (
        "fp8_e4m3b8: the law knows the numbers of exponent and mantissa bits; bias and largest value do not count",
    )
    assert "note: fp8_e4m3b8:" in str(answer)


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["fp8_e4m3", "e4m3", FloatFormat.make(4, 3), ("e4m3", "fp8_e4m3")])
def test_how_a_format_may_be_given(fmt):
    assert [row.fmt for row in advise(1e9, fmt=fmt).formats] == [FloatFormat.make(4, 3)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "nothing to answer: give params, tokens, compute or bits"),
        ({"params": 1e9, "tokens": 1e9, "compute": 1e20}, "compute with both params and tokens"),
        ({"tokens": 1e9, "fmt": "e4m3"}, "fmt='e4m3' has no effect without params or compute"),
        ({"params": 1e9, "fmt": "int4"}, "fmt is 'int4', an integer format: the law is of float formats alone"),
        ({"params": 1e9, "fmt": gws_compile.IntFormat(8)}, "an integer format"),
        (
            {"params": 1e9, "fmt": "nvfp4"},
            "fmt is 'nvfp4', a preset .*: give an element format such as 'e2m1', and block=",
        ),
        ({"params": 1e9, "fmt": "int8_channel"}, "fmt is 'int8_channel', a preset .* element format such as 'e4m3'$"),
        ({"params": 1e9, "fmt": "e4"}, "unknown format 'e4'"),
        ({"params": 1e9, "fmt": 4}, "unknown format 4"),
        ({"params": 1e9, "fmt": []}, "fmt is empty"),
        ({"params": -1}, "params is -1; accepted: a finite number above 0"),
        ({"tokens": math.inf}, "tokens is inf"),
        ({"compute": "1e20"}, "compute is '1e20'"),
        ({"bits": 6.5}, "bits is 6.5; accepted: a whole number"),
        ({"bits": 2}, "bits is 2; accepted: 3 to 32"),
        ({"params": 1e9, "block": "tensor"}, "block is 'tensor', for which no"),
        ({"params": 1e9, "block": 1}, "block is 1; accepted: a whole number from 2 on"),
    ],
    ids=str,
)
def test_what_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        advise(**asked)


# --- Pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked", [a for a in ASKED if "params" in a or "compute" in a], ids=lambda asked: "+".join(asked)
)
def test_a_picture(asked, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "advice.png"
    advise(**asked).plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_what_the_picture_shows(monkeypatch, tmp_path):
    """The curves' points are the law's, and the dots lie at D_crit."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, dpi: drawn.append(self))
    advise(5e8, 1e11, ["e2m1", "e3m2"]).plot(tmp_path / "advice.png")
    (axis,) = drawn[0].axes
    curves = {line.get_label(): line for line in axis.lines}
    across, losses = curves["fp4_e2m1"].get_data()
    for i in (0, 200, 399):
        expected = plain_loss(5e8, across[i]) + loss_of_format(5e8, across[i], 2, 1, 7)
        assert losses[i] == pytest.approx(expected, rel=1e-12)
    across, losses = curves["no quantization"].get_data()
    assert losses[100] == pytest.approx(plain_loss(5e8, across[100]), rel=1e-12)
    dots = [float(line.get_xdata()[0]) for line in axis.lines if line.get_marker() == "o"]
    assert dots == [ScalingLaw().critical_tokens(5e8, 2, 1), ScalingLaw().critical_tokens(5e8, 3, 2)]


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw of tokens without params"):
        advise(tokens=1e11).plot(tmp_path / "advice.png")


def test_a_picture_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'gws-compile\[advice\]'"):
        advise(1e9).plot(tmp_path / "advice.png")


# --- Quantities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("1e9", 1e9), ("1.3B", 1.3e9), ("15t", 15e12), ("350M", 350e6), (" 2K ", 2e3), ("7", 7.0)]
)
def test_quantities_are_read(text, value):
    assert parse_quantity("--params", text) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize("text", ["", "B", "1G", "-1", "0", "nan", "inf", "1e9 tokens"])
def test_quantities_that_are_none(text):
    with pytest.raises(ValueError, match=r"--tokens is .*; accepted: a number above 0, such as 1e9, or with a unit"):
        parse_quantity("--tokens", text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e9, "1B"),
        (679477248, "679M"),
        (1.7295e15, "1,730T"),
        (4e18, "4e+18"),
        (6, "6"),
        (4096, "4,096"),
        (27.33e12, "27.3T"),
        (999.9e9, "1T"),
    ],
)
def test_quantities_are_written(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize(("asked", "bits"), [({"tokens": 1e4}, "1.103"), ({"compute": 1e12}, "2.459")])
def test_fewer_bits_than_a_format_has(asked, bits):
    found = advise(**asked)
    assert found.notes == (
        f"{bits} bits are fewer than a sign, an exponent and a mantissa bit take: no format is like it",
    )
    assert f"note: {bits} bits" in str(found).replace("\n  ", " ")
    assert not advise(tokens=1e11).notes
