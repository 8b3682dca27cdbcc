import dataclasses

import ml_dtypes
import numpy as np
import pytest
from support.oracle import ML_DTYPES_FORMATS, grid_values

from gws_compile import FORMATS, FloatFormat

# name: emax, max, smallest normal, smallest subnormal, the bit width b it stands for
TABLE = {
    "fp4_e2m1": (2, 6.0, 1.0, 0.5, 3.0),
    "fp6_e2m3": (2, 7.5, 1.0, 0.125, 5.0),
    "fp6_e3m2": (4, 28.0, 0.25, 0.0625, 4.0),
    "fp8_e4m3": (8, 448.0, 2.0**-6, 2.0**-9, 5.0),
    "fp8_e5m2": (15, 57344.0, 2.0**-14, 2.0**-16, 4.0),
    "fp12_e4m7": (8, 510.0, 2.0**-6, 2.0**-13, 9.0),
    "bf16": (127, 255 * 2.0**120, 2.0**-126, 2.0**-133, 9.0),
}
WIDTHS = [(e, m) for e in range(1, 9) for m in range(1, 24)]


@pytest.mark.parametrize("name", TABLE)
def test_named_format_has_the_values_of_its_standard(name):
    fmt = FORMATS[name]
    assert (fmt.emax, fmt.max, fmt.min_normal, fmt.min_subnormal, fmt.noise_bits) == TABLE[name]
    assert fmt.name == str(fmt) == name
    assert fmt.min_normal == 2.0**fmt.emin
    assert FloatFormat.parse(name) == fmt


def test_the_named_formats_are_these():
    assert list(FORMATS) == list(TABLE)
    assert [fmt.storage_bits for fmt in FORMATS.values()] == [4, 6, 6, 8, 8, 12, 16]
    assert [fmt.scaled for fmt in FORMATS.values()] == [True] * 6 + [False]


@pytest.mark.parametrize("alias", ["bf16", "bfloat16", "e8m7", "fp16_e8m7"])
def test_aliases_of_bfloat16(alias):
    assert FloatFormat.parse(alias) == FORMATS["bf16"]
    assert FloatFormat.parse(alias).name == "bf16"


def test_every_width_round_trips_through_its_names():
    for e, m in WIDTHS:
        fmt = FloatFormat.make(e, m)
        assert fmt.spec == f"e{e}m{m}"
        assert fmt.storage_bits == 1 + e + m
        for text in (f"e{e}m{m}", f"fp{1 + e + m}_e{e}m{m}", fmt.name, fmt.spec):
            assert FloatFormat.parse(text) == fmt
        if (e, m) != (8, 7):
            assert FloatFormat.parse(fmt.spec).name == f"fp{1 + e + m}_e{e}m{m}"


def test_every_width_has_the_standard_bias_and_largest_code():
    for e, m in WIDTHS:
        fmt = FloatFormat.make(e, m)
        assert fmt.bias == 2 ** (e - 1) - 1
        # With 8 exponent bits the top exponent is reserved; e4m3 and e5m2 spend codes on NaN and Inf.
        top = 254 if e == 8 else 2**e - 1
        largest = {(4, 3): 448.0, (5, 2): 57344.0}.get((e, m), (2 - 2.0**-m) * 2.0 ** (top - fmt.bias))
        assert fmt.max == largest
        assert np.float32(fmt.max) == fmt.max
        assert fmt.noise_bits == min(m + 2, 24)


@pytest.mark.parametrize(
    ("fmt", "spec"),
    [
        (FloatFormat.make(4, 3, bias=7, max=448), "e4m3"),
        (FloatFormat.make(4, 3, bias=8), "e4m3b8"),
        (FloatFormat.make(4, 3, max=240), "e4m3x240"),
        (FloatFormat.make(4, 3, bias=8, max=240), "e4m3b8"),
        (FloatFormat.make(4, 3, bias=8, max=224), "e4m3b8x224"),
        (FloatFormat.make(4, 3, max=480), "e4m3x480"),
        (FloatFormat.make(5, 2, bias=-3), "e5m2b-3"),
        (FloatFormat.make(6, 1, bias=-1, max=2.0**64), "e6m1b-1x1.8446744073709552e+19"),
        (FloatFormat.make(4, 22, max=3 + 5 * 2.0**-21), "e4m22x3.000002384185791"),
    ],
)
def test_spec_keeps_bias_and_maximum(fmt, spec):
    assert fmt.spec == spec
    assert fmt.name == f"fp{fmt.storage_bits}_{spec}"
    assert FloatFormat.parse(spec) == FloatFormat.parse(fmt.name) == fmt


def test_parse_returns_a_format_as_it_is():
    fmt = FloatFormat.make(3, 2, name="mine")
    assert FloatFormat.parse(fmt) is fmt


def test_equality_and_hash_ignore_the_name():
    mine, theirs = FloatFormat.make(3, 2, name="mine"), FloatFormat.make(3, 2)
    assert mine == theirs
    assert hash(mine) == hash(theirs)
    assert str(mine) == "mine"
    for other in (
        FloatFormat.make(2, 3),
        FloatFormat.make(3, 3),
        FloatFormat.make(3, 2, bias=4),
        FloatFormat.make(3, 2, max=24),
    ):
        assert other != mine


def test_formats_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FORMATS["fp8_e4m3"].max = 240.0  # type: ignore[misc]


def test_ml_dtypes_table_is_complete():
    # float8_e8m0fnu holds scales: no sign, no mantissa, hence no FloatFormat.
    theirs = {name for name in dir(ml_dtypes) if name.startswith(("float", "bfloat"))}
    assert theirs - {"float8_e8m0fnu"} == set(ML_DTYPES_FORMATS)


@pytest.mark.parametrize("name", ML_DTYPES_FORMATS)
def test_format_agrees_with_ml_dtypes(name):
    fmt, info = ML_DTYPES_FORMATS[name], ml_dtypes.finfo(getattr(ml_dtypes, name))
    assert fmt.max == float(info.max)
    assert fmt.min_normal == float(info.smallest_normal)
    assert fmt.min_subnormal == float(info.smallest_subnormal)
    assert (fmt.exponent_bits, fmt.mantissa_bits) == (info.nexp, info.nmant)
    assert (fmt.emin, fmt.emax + 1) == (info.minexp, info.maxexp)
    assert fmt.storage_bits == int(name.removeprefix("b").removeprefix("float").split("_")[0])
    storage = np.uint16 if fmt.storage_bits == 16 else np.uint8
    codes = np.arange(2 ** (fmt.storage_bits - 1)).astype(storage).view(getattr(ml_dtypes, name))
    with np.errstate(invalid="ignore"):
        values = codes.astype(np.float64)
    np.testing.assert_array_equal(values[np.isfinite(values)], grid_values(fmt))


ACCEPTED = "accepted: fp4_e2m1, fp6_e2m3, fp6_e3m2, fp8_e4m3, fp8_e5m2, fp12_e4m7, bf16, or any 'eXmY' with 1 to 8"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("fp8_e4m4", "format 'fp8_e4m4' says 8 bits, but e4m4 has 1 + 4 + 4 = 9"),
        ("fp9_e4m3", "format 'fp9_e4m3' says 9 bits, but e4m3 has 1 + 4 + 3 = 8"),
    ],
)
def test_a_wrong_total_width_is_spelled_out(text, fault):
    with pytest.raises(ValueError) as raised:
        FloatFormat.parse(text)
    assert str(raised.value) == fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("e9m1", "a float format has 1 to 8 exponent bits, got 9"),
        ("e0m3", "a float format has 1 to 8 exponent bits, got 0"),
        ("e4m0", "a float format has 1 to 23 mantissa bits, got 0"),
        ("e4m24", "a float format has 1 to 23 mantissa bits, got 24"),
        ("e8m7b126", "a format with 8 exponent bits is held in float32 and has bias 127, got 126"),
        ("e4m3b90", "bias 90 puts the values of fp8_e4m3b90 outside 2**-85 .. 2**65"),
        ("e4m3b-60", "bias -60 puts the values of fp8_e4m3b-60 outside 2**-85 .. 2**65"),
        ("e4m3x500", "max 500.0 is not a normal value of e4m3 with bias 7; the largest is 480.0"),
        ("e4m3x440", "max 440.0 is not a normal value of e4m3 with bias 7; the largest is 480.0"),
        ("e4m3x0", "max 0.0 is not a normal value of e4m3 with bias 7"),
        ("e4m3x-3", "max -3.0 is not a normal value of e4m3 with bias 7"),
        ("e4m3x0.001953125", "max 0.001953125 is not a normal value of e4m3 with bias 7"),
        ("e4m3x1e400", "max inf is not a normal value of e4m3 with bias 7"),
        ("e4m3x1.0.0", "'1.0.0'"),
        *[(text, "") for text in ("", "int8", "E4M3", " e4m3", "e4m3 ", "fp_e4m3", "e4m3fn", "e4m3x", "e4", "e-4m3")],
        *[(value, "") for value in (None, 4, 1.5, b"e4m3", ["e4m3"])],
    ],
)
def test_a_bad_format_is_named_with_what_is_accepted(text, fault):
    with pytest.raises(ValueError) as raised:
        FloatFormat.parse(text)
    message = str(raised.value)
    assert message.startswith(f"unknown format {text!r}")
    assert fault in message
    assert ACCEPTED in message


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"exponent_bits": 0}, "a float format has 1 to 8 exponent bits, got 0"),
        ({"exponent_bits": 4.0}, "a float format has 1 to 8 exponent bits, got 4.0"),
        ({"mantissa_bits": 24}, "a float format has 1 to 23 mantissa bits, got 24"),
        ({"bias": 84}, "bias 84 puts the values of x outside 2**-85 .. 2**65"),
        ({"max": 465.0}, "max 465.0 is not a normal value of e4m3 with bias 7; the largest is 480.0"),
        ({"max": 512.0}, "max 512.0 is not a normal value of e4m3 with bias 7; the largest is 480.0"),
        ({"max": 2.0**-7}, "max 0.0078125 is not a normal value of e4m3 with bias 7; the largest is 480.0"),
        ({"max": float("nan")}, "max nan is not a normal value of e4m3 with bias 7; the largest is 480.0"),
    ],
)
def test_the_constructor_checks_too(arguments, fault):
    good = {"exponent_bits": 4, "mantissa_bits": 3, "bias": 7, "max": 448.0, "name": "x"}
    assert FloatFormat(**good) == FORMATS["fp8_e4m3"]
    with pytest.raises(ValueError) as raised:
        FloatFormat(**(good | arguments))
    assert fault in str(raised.value)


def test_the_limits_themselves_are_accepted():
    assert FloatFormat.make(4, 3, bias=83).min_subnormal == 2.0**-85
    assert FloatFormat.make(4, 3, bias=-49).emax == 64
    assert FloatFormat.make(7, 23).min_subnormal == 2.0**-85
    assert FloatFormat.make(4, 3, max=2.0**-6).max == 2.0**-6
    assert FloatFormat.make(4, 3, max=480).max == 480
    with pytest.raises(ValueError, match="bias 84"):
        FloatFormat.make(4, 3, bias=84)
    with pytest.raises(ValueError, match="bias -50"):
        FloatFormat.make(4, 3, bias=-50)
