"""The named recipes: each is what its source says."""

import re

import pytest

import gws_compile

WEIGHTS = {
    "mxfp8": ("mxfp8", (1, 32), "floor"),
    "mxfp4": ("mxfp4", (1, 32), "floor"),
    "nvfp4": ("nvfp4", (16, 16), "nvfp4"),
    "fp8_block": ("fp8_block", (128, 128), "amax"),
    "fp8_tensor": ("fp8_tensor", (None, None), "amax"),
    "exmy": ("fp6_e3m2", (1, None), "amax"),
}
OPERANDS = {  # activations, gradients
    "mxfp8": ("mxfp8, 1 x 32, floor", "mxfp8, 1 x 32, floor"),
    "mxfp4": ("mxfp4, 1 x 32, floor", "mxfp4, 1 x 32, ceil, stochastic, hadamard 32"),
    "nvfp4": ("nvfp4, 1 x 16, nvfp4", "nvfp4, 1 x 16, nvfp4, stochastic, hadamard 16"),
    "fp8_block": ("fp8_block, 1 x 128, amax",) * 2,
    "fp8_tensor": ("fp8_tensor, tensor, amax", "fp8_e5m2, tensor, amax"),
    "exmy": ("fp6_e3m2, channel, amax",) * 2,
}


@pytest.mark.parametrize("name", gws_compile.RECIPES)
def test_a_recipe_by_its_name(name):
    config = gws_compile.backend("e3m2" if name == "exmy" else None, recipe=name).config
    assert (config.weights.name, config.block, config.scale) == WEIGHTS[name]
    assert (config.activations.text, config.gradients.text) == OPERANDS[name]
    assert config.noise == "none"
    assert config.attention is None
    assert config.texts()["recipe"] == name


@pytest.mark.parametrize("rules", ["a.*=nvfp4", {"a.*": "nvfp4"}, 5])
def test_bad_rules_beside_a_recipe_are_named_as_they_were_given(rules):
    message = r"rules must be a list of \(glob, settings\), such as .*, got " + re.escape(repr(rules))
    with pytest.raises(ValueError, match=message):
        gws_compile.backend(recipe="mxfp8", rules=rules)
