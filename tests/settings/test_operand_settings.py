"""`Operand`, `AttentionOperands`, `Recipe`: what is accepted, what follows from what, and what is refused."""

import pickle

import pytest

import gws_compile
from gws_compile import AttentionOperands, FloatFormat, GwsWarning, Operand, Recipe, Schedule
from gws_compile.settings.operands import ProductSettings


@pytest.mark.parametrize(
    ("operand", "element", "sides", "rule"),
    [
        (Operand("mxfp8"), "e4m3", (1, 32), "floor"),
        (Operand("mxfp4", scale="ceil"), "e2m1", (1, 32), "ceil"),
        (Operand("mxfp8", block=(32, 32)), "e4m3", (32, 32), "floor"),
        (Operand("nvfp4"), "e2m1", (1, 16), "nvfp4"),
        (Operand("fp8_block"), "e4m3", (1, 128), "amax"),
        (Operand("fp8_channel"), "e4m3", (1, None), "amax"),
        (Operand("fp8_tensor"), "e4m3", (None, None), "amax"),
        (Operand("int4_group", block=(1, 64)), "int4", (1, 64), "amax"),
        (Operand("fp8_e5m2"), "e5m2", (1, 32), "floor"),
        (Operand("int8"), "int8", (1, 32), "amax"),
        (Operand(FloatFormat.parse("e3m2"), scale="none"), "e3m2", (1, 32), ""),
    ],
)
def test_what_follows_from_a_format(operand, element, sides, rule):
    assert (operand.element.spec, operand.sides, operand.rule) == (element, sides, rule)
    across, along = (side or 0 for side in sides)
    assert operand.side_block(rows=False) == [across, along]
    assert operand.side_block(rows=True) == [along, across]
    settings = ProductSettings(
        operand, Operand("mxfp8", rounding="stochastic", hadamard=128, products="wgrad"), True, 7
    )
    again = ProductSettings.parse(settings.spec)
    assert (again.spec, again.number) == (settings.spec, 7)
    assert pickle.loads(pickle.dumps(operand)) == operand


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fmt": "mx8"}, r"Operand.fmt: unknown format 'mx8'; accepted: .* mxfp8"),
        ({"fmt": "mxfp8", "scale": "round"}, r"Operand.scale must be one of 'floor', .*'unit', 'none', got 'round'"),
        ({"fmt": "mxfp8", "rounding": "up"}, r"Operand.rounding must be one of 'nearest', 'stochastic', got 'up'"),
        ({"fmt": "mxfp8", "hadamard": 8}, r"Operand.hadamard must be one of None, 16, 32, 128, got 8"),
        (
            {"fmt": "fp8_e4m3", "block": (32, 1)},
            r"run along what a product sums over, .* got \(32, 1\); write \(1, 32\)",
        ),
        ({"fmt": "fp8_e4m3", "block": 32}, r"Operand.block must be two positive ints"),
        (
            {"fmt": "mxfp8", "block": (1, 16)},
            r"contradict fmt='mxfp8', whose blocks are \(1, 32\) .* write fmt='fp8_e4m3'",
        ),
        ({"fmt": "nvfp4", "scale": "amax"}, r"contradict fmt='nvfp4', .* with the scale 'nvfp4'"),
        (
            {"fmt": "fp8_e4m3", "scale": "nvfp4"},
            r"Operand.scale='nvfp4' is that of fp4_e2m1 elements, got fmt='fp8_e4m3'",
        ),
        ({"fmt": "int4", "scale": "none"}, r"Operand.scale must not be 'none' with int4"),
        (
            {"fmt": "mxfp8", "products": "backward"},
            r"Operand.products must be some of 'forward', 'dgrad', 'wgrad', got",
        ),
    ],
)
def test_bad_operands(settings, message):
    with pytest.raises(ValueError, match=message):
        Operand(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activations": 8}, r"activations must be an Operand, a format such as 'mxfp8', or None, got 8"),
        ({"gradients": "fp7"}, r"^gradients: unknown format 'fp7'"),
        (
            {"activations": Operand("mxfp8", rounding="stochastic")},
            r"activations: rounding='stochastic' is for gradients",
        ),
        (
            {"activations": Operand("mxfp8", products="dgrad")},
            r"activations: products must be some of 'forward', 'wgrad'",
        ),
        ({"gradients": Operand("mxfp8", products="forward")}, r"gradients: products must be some of 'dgrad', 'wgrad'"),
        (
            {"attention": "fp8_tile"},
            r"attention: unknown format 'fp8_tile'.*; or AttentionOperands, or one of 'fp8_tiles'",
        ),
        ({"attention": Operand("mxfp8", rounding="stochastic")}, r"attention: queries must have rounding='nearest'"),
        ({"attention": Operand("mxfp8", hadamard=16)}, r"attention: queries must have hadamard=None, got 16"),
        ({"recipe": "mxfp9"}, r"recipe 'mxfp9' is not known: did you mean 'mxfp8'\?"),
        ({"recipe": 8}, r"recipe must be a Recipe, one of 'mxfp8', .*'exmy', or None, got 8"),
        ({"recipe": "exmy"}, r"recipe='exmy' needs the format of its operands: fmt='e3m2'"),
        ({"recipe": "exmy", "fmt": "mxfp8"}, r"recipe='exmy': unknown format 'mxfp8'"),
        ({"recipe": "nvfp4", "inner": "eager"}, r"inner='eager' has no graph of the products in which activations and"),
        ({"schedule": "x"}, r"schedule must be a Schedule"),
        ({"activations": "mxfp8", "block": (32, 1)}, r"block: with activations .* got \(32, 1\); write \(1, 32\)"),
        ({"recipe": "mxfp8", "rules": [("a", {"block": (64, 32)})]}, r"a=block=64x32: .* got \(64, 32\); write"),
    ],
)
def test_bad_settings_of_a_backend(settings, message):
    with pytest.raises(ValueError, match=message):
        gws_compile.backend(**settings)


def test_bad_recipes_and_schedules():
    with pytest.raises(ValueError, match=r"Recipe.weights: unknown key 'format'; accepted: fmt, bits, block"):
        Recipe({"format": "mxfp8"})
    for window in ((3,), (0, -1), (5, 4), "all", (0.5, None)):
        with pytest.raises(ValueError, match=r"Schedule.forward takes \(first, last\), .* such as \(0, 9000\), got"):
            Schedule(forward=window)


def test_a_recipe_is_the_other_arguments_and_they_win():
    own = Recipe("mxfp8", activations="mxfp8", rules=(("*.first.*", None),))
    config = gws_compile.backend(recipe=own, rules=[("*.head", "int8")]).config
    assert [rule.text for rule in config.rules] == ["*.head=int8", "*.first.*=none"]
    assert (config.weights.name, config.noise) == ("mxfp8", "rounded_normal")
    named = gws_compile.backend(recipe="nvfp4", noise="uniform", activations="mxfp8", block=(32, 32)).config
    assert (named.weights.name, named.noise, named.block, named.scale) == ("nvfp4", "uniform", (32, 32), "nvfp4")
    assert (named.activations, named.gradients.hadamard) == (Operand("mxfp8"), 16)
    other = gws_compile.backend("mxfp8", recipe="nvfp4").config
    assert (other.weights.name, other.block, other.noise) == ("mxfp8", (32, 32), "none")


def test_settings_without_effect_are_told():
    with pytest.warns(GwsWarning, match=r"changes nothing: give start, stop, bits, or the steps of a product"):
        gws_compile.backend(schedule=Schedule(), recipe="mxfp8")
    gws_compile.backend(schedule=Schedule(forward=(0, 5)), recipe="mxfp8")
    with pytest.warns(GwsWarning, match=r"Schedule.attention has no effect with attention=None"):
        gws_compile.backend(schedule=Schedule(attention=(0, 5)), recipe="mxfp8")
    with pytest.warns(GwsWarning, match=r"Schedule.wgrad has no effect: neither activations nor gradients are rounded"):
        gws_compile.backend(schedule=Schedule(wgrad=(0, 5)))


def test_schedule_of_products():
    schedule = Schedule(forward=(2, 5), wgrad=(3, None), attention=(0, 4))
    assert [schedule.unrounded(step) for step in (0, 2, 3, 4, 5)] == [1 + 4, 4, 0, 8, 1 + 8]
    assert str(schedule) == (
        "forward rounded from step 2 to 5; wgrad rounded from step 3; attention rounded from step 0 to 4"
    )
    assert schedule.moves_products
    assert not Schedule(attention=(0, 4)).moves_products


def test_attention_operands():
    one = Operand("mxfp8")
    assert gws_compile.backend(attention="mxfp8").config.attention == AttentionOperands(one, one, one, one)
    mixed = AttentionOperands(queries="mxfp8", values=Operand("nvfp4"))
    assert mixed.text == "queries mxfp8, 1 x 32, floor; values nvfp4, 1 x 16, nvfp4"
