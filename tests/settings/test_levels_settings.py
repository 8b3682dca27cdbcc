"""`Levels`: tables, bad ones, and what is said beside them."""

import math

import pytest

import gws_compile
from gws_compile import Levels
from gws_compile.config import Config

# "QLoRA" (arXiv 2305.14314), appendix E.
NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def test_tables():
    assert Levels.uniform(1).table == (-1.0, 1.0)
    assert Levels.uniform(2).table == pytest.approx((-1, -1 / 3, 1 / 3, 1), abs=1e-7)
    assert len(Levels.uniform(8).table) == 256
    assert Levels((-1, 0, 0.1)).table == (-1.0, 0.0, 0.10000000149011612)  # as float32
    assert Levels([1, 2]) == Levels((1.0, 2.0))


def test_normal_is_nf4():
    """NF4's numbers were made with an offset of seven digits, 0.9677083, for 1 - (1/32 + 1/30) / 4."""
    assert Levels.normal(4).table == pytest.approx(NF4, abs=3e-7)
    for bits in range(2, 9):
        table = Levels.normal(bits).table
        assert len(table) == 2**bits
        assert (table[0], table[-1]) == (-1.0 if bits > 1 else 0.0, 1.0)
        assert sum(level > 0 for level in table) == 2 ** (bits - 1)
        assert 0.0 in table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((0, 1, 0.5), "must ascend, and be different as float32 values, got 0.5 at place 2, behind 1"),
        ((0, 1, 1), "must ascend, and be different as float32 values, got 1 at place 2, behind 1"),
        ((1, 1 + 1e-9), "must ascend, and be different as float32 values, got 1 at place 1, behind 1"),
        ((0, math.nan), "Levels takes finite numbers, got nan at place 1"),
        ((-math.inf, 0), "Levels takes finite numbers, got -inf at place 0"),
        ((0, "1"), "Levels takes finite numbers, got '1' at place 1"),
        ((0, True), "Levels takes finite numbers, got True at place 1"),
        ((1,), "Levels takes 2 to 256 numbers, got 1"),
        (range(257), "Levels takes 2 to 256 numbers, got 257"),
        ("int4", r"Levels takes a table of numbers, such as \(-1, 0, 1\), got 'int4'"),
        (3, r"Levels takes a table of numbers, such as \(-1, 0, 1\), got 3"),
        ((0, 1e-12), r"largest magnitude of Levels must lie within 2\*\*-32 and 2\*\*32, got 1e-12"),
        ((0, 1e12), r"largest magnitude of Levels must lie within 2\*\*-32 and 2\*\*32, got 1e\+12"),
    ],
)
def test_bad_tables(table, message):
    with pytest.raises(ValueError, match=message):
        Levels(table)


@pytest.mark.parametrize(("function", "bits"), [("uniform", 0), ("uniform", 9), ("normal", 1), ("normal", 2.0)])
def test_bad_bits(function, bits):
    with pytest.raises(ValueError, match=rf"Levels.{function} takes . to 8 bits, got {bits}"):
        getattr(Levels, function)(bits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": "uniform"}, "without noise: noise must be 'none' or left out, got 'uniform'"),
        ({"bits": 4}, "has no noise, and so no bit width: bits must be left out, got 4"),
        ({"bits": gws_compile.LearnedBits()}, "bits must be left out, got LearnedBits"),
        ({"sparsity": "2:4"}, r"with fmt=Levels\(...\) weights are dense: sparsity must be None, got '2:4'"),
        ({"scale": "floor"}, r"with fmt=Levels\(...\) scale must be 'amax', 'auto' or None, got 'floor'"),
        ({"scale": "nvfp4"}, r"with fmt=Levels\(...\) scale must be 'amax', 'auto' or None, got 'nvfp4'"),
        ({"scale": "max"}, "scale must be one of .*, got 'max'"),
        ({"block": (0, 1)}, "block must be two positive ints"),
        ({"activations": "mxfp8"}, r"fmt=Levels\(...\) is not multiplied with rounded operands: leave out activations"),
        ({"recipe": "mxfp8"}, "leave out activations and gradients"),
    ],
)
def test_what_does_not_go_with_levels(settings, message):
    with pytest.raises(ValueError, match=message):
        gws_compile.backend(Levels.uniform(2), **settings)


def test_settings():
    config = Config.make(Levels.normal(2))
    assert (config.noise, config.scale, config.block, config.weights.name) == ("none", "amax", (32, 32), "levels4")
    assert config.weights.spec == "levels(-1, 0, 0.435818166, 1)"
    assert Config.make(Levels.normal(2), scale=None, block=(1, None), noise="none").scale is None
    # 96 x 64 codes of 2 bits, 3 x 2 scales, 4 levels.
    assert config.weights.stored_bytes(1, 96, 64) == 96 * 64 // 4 + 4 * 6 + 4 * 4


def test_rules():
    """A rule with levels has no noise and a scale of its own; one without, its format's noise."""
    config = Config.make("fp8_e4m3", noise="uniform", scale="ceil", rules=[("a.*", Levels.uniform(2))])
    assert [config.settings_of("a.w").noise, config.settings_of("a.w").scale] == ["none", "amax"]
    assert config.settings_of("b.w").noise == "uniform"
    config = Config.make(
        Levels.uniform(2), rules=[("a.*", "fp8_e4m3"), ("b.*", {"fmt": Levels((0, 1)), "scale": None})]
    )
    assert [config.settings_of("a.w").noise, config.settings_of("a.w").scale] == ["rounded_normal", "floor"]
    assert config.tables == (Levels.uniform(2), Levels((0, 1)))
    with pytest.raises(ValueError, match=r"rules\[0\], 'a': fmt=Levels.*got 'uniform'"):
        Config.make(rules=[("a", {"fmt": Levels.uniform(2), "noise": "uniform"})])


def test_references_say_that_they_know_formats_alone():
    import torch

    with pytest.raises(ValueError, match="its levels are trained, and differ from weight to weight"):
        gws_compile.quantize(torch.ones(4, 4), Levels.uniform(2))
