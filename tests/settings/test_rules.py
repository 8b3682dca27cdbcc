"""Rules: what they say of a weight, as the settings of a backend have it, and what is wrong with bad ones."""

import pytest

import gws_compile
from gws_compile import FORMATS, PRESETS, IntFormat, LearnedBits, Schedule
from gws_compile.config import Config


def of(name, fmt=None, **settings):
    return Config.make(fmt, **settings).settings_of(name)


def test_the_first_that_matches_wins():
    config = Config.make(rules=[("a.*", "fp4_e2m1"), ("*", None), ("b.*", "int4")])
    assert config.settings_of("a.weight").fmt == FORMATS["fp4_e2m1"]
    assert config.settings_of("b.weight") is None
    assert [rule.text for rule in config.rules] == ["a.*=fp4_e2m1", "*=none", "b.*=int4"]


def test_a_weight_without_a_rule_is_as_without_rules():
    assert of("c.weight", "nvfp4", bits=2.5, rules=[("a.*", None)]) == Config.make("nvfp4", bits=2.5).weights


def test_several_globs_share_a_rule():
    config = Config.make(rules=[(["a.*", "b.*"], "int8")])
    assert {config.settings_of(name).name for name in ("a.w", "b.w")} == {"int8"}
    assert config.rules[0].text == "a.*,b.*=int8"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_brings_its_block_and_scale(name):
    settings = of("a.w", "fp6_e3m2", block=(8, 64), scale="ceil", rules=[("a.*", name)])
    assert settings == Config.make(name).weights


def test_a_format_keeps_block_and_scale_of_the_backend_and_has_its_own_width():
    settings = of("a.w", "fp8_e4m3", block=(8, 64), scale="ceil", bits=7, rules=[("a.*", {"fmt": "fp4_e2m1"})])
    assert settings == Config.make("fp4_e2m1", block=(8, 64), scale="ceil").weights
    # Of a backend whose preset says them, nothing was given.
    assert of("a.w", "nvfp4", rules=[("a.*", "fp8_e4m3")]) == Config.make("fp8_e4m3").weights
    assert of("a.w", "fp4_e2m1", scale="nvfp4", rules=[("a.*", "fp8_e4m3")]) == Config.make("fp8_e4m3").weights
    assert of("a.w", rules=[("a.*", "int4")]) == Config.make("int4").weights
    assert of("a.w", rules=[("a.*", IntFormat(4))]).scale == "amax"


def test_what_a_rule_does_not_say_is_the_backends():
    base = {"fmt": "fp6_e3m2", "noise": "uniform", "bits": 6.5, "block": (16, 16), "scale": "ceil"}
    for key, value in (("noise", "none"), ("bits", 3.0), ("block", (1, None)), ("scale", None)):
        assert of("a.w", **base, rules=[("a.*", {key: value})]) == Config.make(**{**base, key: value}).weights
    assert of("a.w", **base, rules=[("a.*", {"bits": None})]).bits == FORMATS["fp6_e3m2"].noise_bits


def test_a_rule_that_names_format_or_width_leaves_learned_widths():
    learned = LearnedBits()
    config = Config.make(
        bits=learned, rules=[("a.*", "fp8_e4m3"), ("b.*", {"bits": 5}), ("c.*", {"block": (8, 8)}), ("d.*", None)]
    )
    assert config.settings_of("a.w").learned is None
    assert config.settings_of("b.w").learned is None
    assert (config.settings_of("b.w").bits, config.settings_of("b.w").fmt) == (5.0, Config.make().fmt)
    assert (config.settings_of("c.w").learned, config.settings_of("c.w").block) == (learned, (8, 8))


def test_a_rule_that_names_format_or_width_leaves_the_schedules_width():
    config = Config.make(
        schedule=Schedule(bits=((0, 8), (10, 5))), rules=[("a.*", "fp6_e3m2"), ("b.*", {"block": (8, 8)})]
    )
    widths = [config.bits_at(5, config.settings_of(name)) for name in ("a.w", "b.w", "c.w")]
    assert widths == [4.0, 6.5, 6.5]


def test_configurations_with_rules_are_hashable():
    """Backends by name are found by their settings."""
    rules = [("a.*", {"block": [1, None], "fmt": "fp8_e4m3"})]
    assert hash(Config.make(rules=rules)) == hash(Config.make(rules=[("a.*", {"block": (1, None), "fmt": "fp8_e4m3"})]))
    assert Config.make(rules=rules) != Config.make()


def test_texts_of_a_report():
    config = Config.make(rules=[("a.*", {"fmt": "fp8_e4m3", "block": (1, None), "bits": 4.5}), ("b.*", None)])
    assert config.texts()["rules"] == "a.*=fp8_e4m3,block=1xall,bits=4.5, b.*=none"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("a.*=nvfp4", r"rules must be a list of \(glob, settings\), such as .*, got 'a.\*=nvfp4'"),
        ({"a.*": "nvfp4"}, r"rules must be a list of \(glob, settings\)"),
        (["a.*"], r"rules\[0\] must be \(glob, settings\), such as .*, got 'a.\*'"),
        (
            [("a.*", "int4"), (3, "int4")],
            r"rules\[1\] must begin with a glob on weight names, or a list of them, got 3",
        ),
        ([([], "int4")], r"rules\[0\] must begin with a glob"),
        ([("a.*", {"width": 4})], r"rules\[0\], 'a.\*': unknown key 'width': accepted: fmt, bits, block"),
        ([("a.*", {"blocks": 3})], r"rules\[0\], 'a.\*': unknown key 'blocks': did you mean 'block'\?"),
        (
            [("a.*", {})],
            r"rules\[0\], 'a.\*': it says nothing; give some of fmt, bits, block, scale, noise, sparsity, or None",
        ),
        ([("a.*", "fp9")], r"rules\[0\], 'a.\*': unknown format 'fp9'; accepted"),
        ([("a.*", {"bits": 30})], r"rules\[0\], 'a.\*': bits must be a number from 2 to 24, got 30"),
        ([("a.*", {"bits": LearnedBits()})], r"bits must be a number or None, got LearnedBits"),
        ([("a.*", {"noise": "x"})], r"rules\[0\], 'a.\*': noise must be one of"),
        ([("a.*", {"block": (0, 1)})], r"rules\[0\], 'a.\*': block must be two positive ints"),
        ([("a.*", {"fmt": "mxfp8", "scale": "amax"})], r"'a.\*': scale='amax' contradicts fmt='mxfp8'"),
        ([("a.*", {"fmt": "int4", "bits": 6})], r"'a.\*': with int4 bits must be from 2 to 4, got 6"),
    ],
)
def test_bad_rules(rules, message):
    with pytest.raises(ValueError, match=message):
        gws_compile.backend(rules=rules)


def test_learning_from_no_noise_is_refused_in_a_rule_too():
    with pytest.raises(ValueError, match=r"rules\[0\], 'a': bits=LearnedBits.* noise must not be 'none'"):
        gws_compile.backend(bits=LearnedBits(), rules=[("a", {"noise": "none"})])
