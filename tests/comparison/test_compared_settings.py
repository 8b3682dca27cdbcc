"""What is compared."""

import pytest

import gws_compile
from gws_compile.comparison.compared_settings import METHODS, ComparedSetting, grid_label, own_settings, usual_settings
from gws_compile.comparison.comparing import listed, seeds_of
from gws_compile.config import Config


def test_the_usual_ones():
    made = list(usual_settings(["fp4_e2m1", "int3"], METHODS, ["mxfp8"], {"exclude": ("head",)}))
    assert [one.name for one in made] == [
        "plain",
        "fp4_e2m1, cast afterwards",
        "int3, cast afterwards",
        "fp4_e2m1, straight-through",
        "int3, straight-through",
        "fp4_e2m1, rounded normal noise",
        "int3, rounded normal noise",
        "fp4_e2m1, uniform noise",
        "int3, uniform noise",
        "fp4_e2m1, no master weights",
        "int3, no master weights",
        "learned widths, average 3",  # of both formats
        "recipe mxfp8",
    ]
    by_name = {one.name: one.config for one in made}
    assert all(config.exclude == ("head",) for config in by_name.values())
    assert by_name["int3, straight-through"] == Config.make("int3", noise="none", exclude="head")
    assert by_name["int3, rounded normal noise"] == Config.make("int3", exclude="head")
    assert by_name["fp4_e2m1, uniform noise"] == Config.make("fp4_e2m1", noise="uniform", exclude="head")
    assert by_name["int3, no master weights"] == Config.make("int3", master=False, exclude="head")
    assert by_name["learned widths, average 3"].learned == gws_compile.LearnedBits(average=3.0)
    assert by_name["recipe mxfp8"] == Config.make(recipe="mxfp8", exclude="head")
    assert [one.name for one in made if one.trains_plain] == [one.name for one in made[:3]]


@pytest.mark.parametrize(
    ("arguments", "label"),
    [
        ({}, "fp8_e4m3"),
        ({"fmt": "int3", "bits": 2.0}, "int3"),
        ({"fmt": "nvfp4"}, "nvfp4"),
        ({"fmt": "int3", "block": (1, None)}, "int3, row, amax"),
        ({"fmt": "fp4_e2m1", "scale": "amax"}, "fp4_e2m1, 32 x 32, amax"),
        ({"fmt": "mxfp4", "block": (1, 32)}, "mxfp4, 1 x 32, floor"),
        ({"recipe": "mxfp8"}, "mxfp8, 1 x 32, floor"),
        ({"bits": gws_compile.LearnedBits()}, ""),
        ({"sparsity": "2:4"}, ""),
        ({"rules": [("a", {"fmt": gws_compile.Levels((-1.0, 0.0, 1.0))})]}, ""),
        ({"fmt": "int4", "rules": [("a", "int3"), ("b", None)]}, "int4; a: int3 32 x 32, amax; b: none"),
    ],
)
def test_labels_of_grids(arguments, label):
    found = grid_label(Config.make(**arguments))
    if "rules" in arguments and label:
        assert found == "; ".join(["int4", *(rule.text for rule in Config.make(**arguments).rules)])
    else:
        assert found == label


def test_labels_beside_what_is_common():
    """What all settings say is not said in a label; what one says by itself is, as it has another cast."""
    common = {"exclude": ("head.*",), "rules": (("a", None),)}
    same, other = own_settings({"same": {"fmt": "int3"}, "other": {"fmt": "int3", "exclude": ("b", "c")}}, common)
    assert same.grid == "int3"
    assert other.grid == "int3, exclude b c"
    assert grid_label(Config.make("int3", exclude=None)) == "int3, exclude nothing"


def test_own_settings():
    made = list(
        own_settings(
            {"longer": {"training": {"steps": 5}}, "b = 4": {"fmt": "fp4_e2m1", "bits": 4}}, {"inner": "eager"}
        )
    )
    longer, wide = made
    assert longer.method == "plain"
    assert longer.trains_plain
    assert dict(longer.training) == {"steps": 5}
    assert wide.method == ""
    assert wide.config == Config.make("fp4_e2m1", bits=4, inner="eager")
    assert wide.text != ComparedSetting("b = 4", "", {"fmt": "fp4_e2m1", "bits": 5, "inner": "eager"}).text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["straight"]}, "unknown method 'straight': did you mean 'straight-through'"),
        ({"fmts": ["fp3"]}, "setting 'fp3, cast afterwards': unknown format 'fp3'"),
        ({"recipes": ["mx"]}, "setting 'recipe mx': "),
        ({"settings": {"a": {"bit": 3}}}, "setting 'a': .*unexpected keyword argument 'bit'"),
        ({"settings": {"a": {"bits": 99}}}, "setting 'a': bits must"),
        ({"settings": {"a": 3}}, "setting 'a' must have arguments of gws_compile.backend by name, got 3"),
        ({"settings": {"a": {"training": 3}}}, "setting 'a' must have arguments"),
        ({"common": {"sparsity": "2:4"}}, "setting 'int4, cast afterwards': learned widths, .* are no cast of a plain"),
        ({"settings": {"plain": {}}}, "two settings have the name 'plain'"),
        ({"common": {"seed": 1}}, "common: seed is not the same in all settings"),
    ],
)
def test_messages(arguments, message):
    given = {"fmts": ["int4"], "methods": ["cast-afterwards"], "recipes": [], "settings": {}, "common": {}}
    with pytest.raises(ValueError, match=message):
        listed(**{**given, **arguments})


def test_seeds():
    assert seeds_of(3) == [0, 1, 2]
    assert seeds_of([5, 1]) == [5, 1]
    for bad in (0, [], [1, 1], [-1], ["1"]):
        with pytest.raises(ValueError, match="seeds must be how many"):
            seeds_of(bad)
