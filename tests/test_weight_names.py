"""Unique names: number and pipeline stage, put on and taken off."""

import pytest

from gws_compile.weight_names import (
    first_free,
    numbered,
    stage_prefix,
    stage_prefix_of,
    without_number,
)


def test_numbers():
    assert [numbered("fc.weight", count) for count in range(3)] == ["fc.weight", "fc.weight#1", "fc.weight#2"]
    assert first_free("fc.weight", set()) == "fc.weight"
    assert first_free("fc.weight", {"fc.weight", "fc.weight#2"}) == "fc.weight#1"
    assert [without_number(name) for name in ("fc.weight", "fc.weight#12")] == ["fc.weight"] * 2


@pytest.mark.parametrize(
    ("name", "prefix", "rest"),
    [
        ("stage12.a.weight", "stage12.", "a.weight"),
        ("a.stage1.weight", "", "a.stage1.weight"),
        ("stage.weight", "", "stage.weight"),
        ("stage1a.weight", "", "stage1a.weight"),
    ],
)
def test_stages(name, prefix, rest):
    assert stage_prefix_of(name) == prefix
    assert stage_prefix_of(f"{stage_prefix(3)}{rest}") == "stage3."
