"""Presets: each is its element format, block and scale, and nothing that contradicts its name is taken."""

import re

import pytest
import torch
from support.oracle import assert_bits_equal, random_floats

from gws_compile import PRESETS, quantize

TABLE = {
    "mxfp8": ("fp8_e4m3", (32, 32), "floor"),
    "mxfp6": ("fp6_e2m3", (32, 32), "floor"),
    "mxfp4": ("fp4_e2m1", (32, 32), "floor"),
    "nvfp4": ("fp4_e2m1", (16, 16), "nvfp4"),
    "fp8_block": ("fp8_e4m3", (128, 128), "amax"),
    "fp8_channel": ("fp8_e4m3", (1, None), "amax"),
    "fp8_tensor": ("fp8_e4m3", (None, None), "amax"),
    "int4_group": ("int4", (1, 128), "amax"),
    "int8_channel": ("int8", (1, None), "amax"),
}


@pytest.fixture
def weight():
    return torch.from_numpy(random_floats((150, 290), 1, (-14, 2)))


def test_the_presets_are_these():
    assert list(PRESETS) == list(TABLE)
    for name, (element, block, scale) in TABLE.items():
        preset = PRESETS[name]
        assert (preset.name, preset.element.name, preset.block, preset.scale) == (name, element, block, scale)


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_is_its_element_block_and_scale(name, weight):
    element, block, scale = TABLE[name]
    expected = quantize(weight, element, block, scale)
    assert_bits_equal(quantize(weight, name), expected)
    assert_bits_equal(quantize(weight, name, block, scale), expected)
    assert_bits_equal(quantize(weight, PRESETS[name].element, block, scale), expected)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("mxfp8", {"block": (1, 32)}),
        ("mxfp8", {"scale": "ceil"}),
        ("mxfp6", {"block": (1, 32), "scale": "ceil"}),
        ("mxfp4", {"block": (64, 96)}),
        ("nvfp4", {"block": (1, 16)}),
        ("nvfp4", {"block": (None, 16)}),
        ("fp8_block", {"scale": "floor"}),
        ("fp8_channel", {"scale": "ceil"}),
        ("fp8_tensor", {"scale": "floor"}),
        ("int4_group", {"block": (1, 64)}),
        ("int8_channel", {"scale": "floor"}),
    ],
)
def test_what_keeps_to_the_name_is_taken(name, given, weight):
    """Blocks that hold whole groups, and the rules that the field writes by the same name."""
    element, block, scale = TABLE[name]
    expected = quantize(weight, element, given.get("block", block), given.get("scale", scale))
    assert_bits_equal(quantize(weight, name, **given), expected)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("mxfp8", {"scale": "amax"},
         "scale='amax' contradicts fmt='mxfp8', whose scale is 'floor' or 'ceil': "
         "write fmt='fp8_e4m3' with this scale"),
        ("mxfp4", {"scale": "nvfp4"},
         "scale='nvfp4' contradicts fmt='mxfp4', whose scale is 'floor' or 'ceil': "
         "write fmt='fp4_e2m1' with this scale"),
        ("nvfp4", {"scale": "floor"},
         "scale='floor' contradicts fmt='nvfp4', whose scale is 'nvfp4': write fmt='fp4_e2m1' with this scale"),
        ("int4_group", {"scale": None},
         "scale=None contradicts fmt='int4_group', whose scale is 'amax' or 'floor' or 'ceil': "
         "write fmt='int4' with this scale"),
        ("mxfp8", {"block": (32, 16)},
         "block=(32, 16) contradicts fmt='mxfp8', of which each 1 x 32 elements have a scale: "
         "write fmt='fp8_e4m3' with this block and scale='floor'"),
        ("nvfp4", {"block": (16, 8)},
         "block=(16, 8) contradicts fmt='nvfp4', of which each 1 x 16 elements have a scale: "
         "write fmt='fp4_e2m1' with this block and scale='nvfp4'"),
        ("fp8_block", {"block": (256, 256)},
         "block=(256, 256) contradicts fmt='fp8_block', of which each 128 x 128 elements have a scale: "
         "write fmt='fp8_e4m3' with this block and scale='amax'"),
        ("fp8_channel", {"block": (32, 32)},
         "block=(32, 32) contradicts fmt='fp8_channel', of which each row, (1, None), has a scale: "
         "write fmt='fp8_e4m3' with this block and scale='amax'"),
        ("fp8_tensor", {"block": (1, None)},
         "block=(1, None) contradicts fmt='fp8_tensor', of which the whole matrix, (None, None), has a scale: "
         "write fmt='fp8_e4m3' with this block and scale='amax'"),
        ("int4_group", {"block": (2, 128)},
         "block=(2, 128) contradicts fmt='int4_group', of which a part of a row, (1, n), has a scale: "
         "write fmt='int4' with this block and scale='amax'"),
        ("int8_channel", {"block": (1, 128)},
         "block=(1, 128) contradicts fmt='int8_channel', of which each row, (1, None), has a scale: "
         "write fmt='int8' with this block and scale='amax'"),
    ],
)  # fmt: skip
def test_what_contradicts_the_name_is_said(name, given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        quantize(torch.ones(2, 2), name, **given)


def test_the_scale_of_nvfp4_is_of_its_elements():
    with pytest.raises(ValueError, match=r"^scale='nvfp4' is that of fp4_e2m1 elements, got fmt='fp8_e4m3'$"):
        quantize(torch.ones(2, 2), "fp8_e4m3", scale="nvfp4")


@pytest.mark.parametrize("text", ["fp4", "nvfp8", "NVFP4", "int", "uint8", "int-4"])
def test_an_unknown_name_is_told_the_presets(text):
    with pytest.raises(ValueError) as raised:
        quantize(torch.ones(2, 2), text)
    message = str(raised.value)
    assert message.startswith(f"unknown format {text!r}; accepted: fp4_e2m1, ")
    assert message.endswith(f"; or 'int2' to 'int8'; or a preset: {', '.join(TABLE)}")
