"""Bad settings: one clear error that names the value and what is accepted, before anything is compiled."""

import inspect
from dataclasses import fields

import pytest

import gws_compile
from gws_compile.config import Config
from gws_compile.settings.arguments import Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fmt": "fp8_e4m4"}, r"'fp8_e4m4' says 8 bits, but e4m4 has 1 \+ 4 \+ 4 = 9"),
        (
            {"fmt": "int8x"},
            r"unknown format 'int8x'; accepted: fp4_e2m1, .*any 'eXmY'.*'int2' to 'int8'.*preset: mxfp8, ",
        ),
        ({"fmt": 8}, "unknown format 8; accepted"),
        ({"noise": "gaussian"}, "noise must be one of 'rounded_normal', 'uniform', 'none', got 'gaussian'"),
        ({"noise": "normal"}, "noise must be one of .*, got 'normal'"),
        ({"scale": "round"}, "scale must be one of 'floor', 'ceil', 'amax', 'nvfp4', None, 'auto', got 'round'"),
        ({"resample": "epoch"}, "resample must be one of 'step', 'forward', got 'epoch'"),
        ({"backward": "keep"}, "backward must be one of 'save', 'recompute', got 'keep'"),
        ({"inner": "nvfuser"}, "inner must be one of 'inductor', 'aot_eager', 'eager' or a callable, got 'nvfuser'"),
        ({"bits": 1.9}, "bits must be a number from 2 to 24, got 1.9"),
        ({"bits": 25}, "bits must be a number from 2 to 24, got 25"),
        ({"bits": float("nan")}, "bits must be a number from 2 to 24, got nan"),
        ({"bits": True}, "bits must be a number from 2 to 24, got True"),
        ({"bits": "5"}, "bits must be a number from 2 to 24, got '5'"),
        (
            {"block": ()},
            r"block must be two positive ints \(rows, columns\), such as \(32, 32\), .*\(1, None\) .*, got \(\)",
        ),
        ({"block": (0, 32)}, r"block must be two positive ints .*, got \(0, 32\)"),
        ({"block": (32, -1)}, r"block must be two positive ints .*, got \(32, -1\)"),
        ({"block": 32}, "block must be two positive ints .*, got 32"),
        ({"block": (32.0, 32)}, r"block must be two positive ints .*, got \(32.0, 32\)"),
        ({"include": 3}, "include must be a glob or a list of globs on weight names, got 3"),
        ({"include": ["a", 3]}, "include takes globs on weight names, such as .*, got 3"),
        ({"include": []}, r"include=\[\] matches no weight; give globs on weight names, or None for all"),
        ({"exclude": [b"head"]}, "exclude takes globs on weight names, such as .*, got b'head'"),
        ({"exclude": ""}, None),
        ({"include": ""}, "include takes globs on weight names, such as .*, got ''"),
        ({"seed": -1}, r"seed must be an int in 0 .. 2\*\*64 - 1, got -1"),
        ({"seed": 1.0}, "seed must be an int in .*, got 1.0"),
        ({"strict": 1}, "strict must be True or False, got 1"),
    ],
)
def test_bad_settings(settings, message):
    if message is None:  # no pattern excludes nothing, as None and () do
        assert gws_compile.backend(**settings).config.exclude == ()
        return
    with pytest.raises(ValueError, match=message):
        gws_compile.backend(**settings)


@pytest.mark.parametrize("function", [gws_compile.backend, Config.make])
def test_arguments_are_the_settings(function):
    arguments = inspect.signature(function).parameters.values()
    assert [(a.name, a.annotation, a.default) for a in arguments] == [
        (f.name, f.type, f.default) for f in fields(Settings)
    ]


def test_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="formt"):
        gws_compile.backend(formt="fp8_e4m3")


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [
        ("fp4_e2m1", 3),
        ("fp6_e3m2", 4),
        ("fp8_e4m3", 5),
        ("fp8_e5m2", 4),
        ("fp6_e2m3", 5),
        ("fp12_e4m7", 9),
        ("bf16", 9),
    ],
)
def test_default_bits_are_those_of_the_format(fmt, bits):
    assert Config.make(fmt).bits == bits


def test_widest_formats_take_24_bits():
    assert Config.make("e8m23").bits == 24


def test_a_single_pattern_is_a_list_of_one():
    config = Config.make(include="*.mlp.*", exclude="head")
    assert config.include == ("*.mlp.*",)
    assert config.exclude == ("head",)


def test_configuration_is_frozen_and_hashable():
    config = Config.make()
    with pytest.raises(AttributeError):
        config.seed = 1
    assert hash(config) == hash(Config.make("e4m3"))
