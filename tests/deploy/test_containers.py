"""What fits into a container."""

import pytest

from gws_compile.deploy.containers import CONTAINERS
from gws_compile.numerics.elements import parse_element


@pytest.mark.parametrize(
    ("container", "formats", "scale", "shift"),
    [
        ("mxfp8", ["e4m3"], "floor", 0),
        ("mxfp8", ["e4m3", "e2m1", "e2m3", "e3m2"], "ceil", 0),
        ("mxfp8", ["e4m3"], None, 0),
        ("mxfp8", ["e4m3b8x224"], "floor", 1),
        ("mxfp8", ["e4m3b8"], "floor", None),  # 480 is no value of e4m3
        ("mxfp8", ["e5m2"], "floor", None),
        ("mxfp8", ["e4m3", "e8m7"], "floor", None),
        ("mxfp8", ["e4m3"], "amax", None),
        ("mxfp8", ["int5"], "floor", 0),
        ("mxfp8", ["int6"], "floor", None),  # 31 has five bits
        ("mxfp4", ["e1m1"], "floor", 0),
        ("mxfp4", ["e2m1b3"], "floor", 2),
        ("mxfp4", ["int3"], "floor", 0),
        ("mxfp4", ["int4"], "floor", None),  # 5
        ("mxfp6", ["e2m3"], "floor", 0),
        ("mxfp6", ["e3m2"], "floor", None),
        ("mxfp6", ["e2m1"], "floor", 0),
        ("nvfp4", ["e2m1"], "nvfp4", 0),
        ("nvfp4", ["e2m1"], "floor", 0),
        ("nvfp4", ["e2m1"], "amax", None),
        ("fp8_channel", ["e4m3"], "amax", 0),
        ("fp8_channel", ["e2m1"], "nvfp4", None),
        ("int4", ["int4"], "amax", 0),
        ("int4", ["int2"], "floor", 0),
        ("int4", ["e2m1"], "amax", None),  # 12 halves
        ("int8", ["e2m1"], "amax", 1),
        ("int8", ["e2m3"], "amax", 3),
        ("int8", ["e3m2"], "amax", None),  # 448 sixteenths
    ],
)
def test_shift(container, formats, scale, shift):
    assert CONTAINERS[container].shift([parse_element(one) for one in formats], scale) == shift


@pytest.mark.parametrize(
    ("container", "block", "shape", "problem"),
    [
        ("mxfp8", (32, 32), (100, 64), None),
        ("mxfp8", (1, 32), (3, 32), None),
        ("mxfp8", (32, 32), (100, 80), "multiple of 32 columns"),
        ("mxfp8", (32, 48), (96, 96), "does not lie inside a block"),
        ("mxfp8", (32, 64), (96, 96), None),
        ("mxfp8", (None, None), (96, 96), None),
        ("mxfp8", (16, 16), (96, 96), "does not lie inside a block"),
        ("nvfp4", (16, 16), (96, 80), None),
        ("nvfp4", (16, 16), (96, 40), "multiple of 16 columns"),
        ("fp8_block", (128, 128), (200, 300), None),
        ("fp8_block", (32, 32), (200, 300), "128 x 128, does not lie inside a block of training, 32 x 32"),
        ("fp8_block", (32, 32), (32, 32), None),
        ("fp8_channel", (1, None), (3, 5), None),
        ("fp8_channel", (None, None), (3, 5), None),
        ("fp8_channel", (1, 128), (3, 200), "does not lie inside a block"),
        ("fp8_tensor", (1, None), (3, 5), "does not lie inside a block"),
        ("int4", (1, 128), (3, 256), None),
        ("int4", (1, 128), (3, 200), "groups of 128 divide"),
        ("int4", (1, 128), (3, 100), None),
        ("mxfp6", (32, 32), (3, 32), None),
    ],
)
def test_misfit(container, block, shape, problem):
    found = CONTAINERS[container].misfit(block, *shape)
    assert (found is None) if problem is None else problem in found


def test_bits_count_the_scales():
    assert CONTAINERS["mxfp4"].bits((32, 32), 64, 64) == 4.25
    assert CONTAINERS["nvfp4"].bits((16, 16), 64, 64) == 4.5
    assert CONTAINERS["fp8_channel"].bits((1, None), 64, 64) == 8.5
    assert CONTAINERS["int4"].bits((1, 32), 64, 64) == 5
