"""docs/formats.md: its table is what the program computes, and what it says of each preset stands in a row."""

import json
import re

import formats
import pytest
from support.pages import read

from gws_compile import PRESETS
from gws_compile.numerics import nvfp4

PAGE = formats.PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def figures():
    return formats.measure()


def test_the_table_is_what_is_computed(figures):
    assert formats.page_with(PAGE, figures) == PAGE, "run python benchmarks/formats.py --page"
    assert [f.preset for f in figures][: len(PRESETS)] == list(PRESETS)


def test_bits_per_weight(figures):
    """By hand, of what a file has of a matrix of 4096 x 4096."""
    size = 4096
    stored = {
        "mxfp8": size * size + size * size // 32,
        "mxfp6": size * size * 6 // 8 + size * size // 32,
        "mxfp4": size * size // 2 + size * size // 32,
        "nvfp4": size * size // 2 + size * size // 16,
        "fp8_block": size * size + (size // 128) ** 2 * 4,
        "fp8_channel": size * size + size * 4,
        "fp8_tensor": size * size,
        "int4_group": size * size // 2 + size * size // 128 * 4,
        "int8_channel": size * size + size * 4,
    }
    bits = {f.preset: f.bits_per_weight for f in figures[: len(PRESETS)]}
    assert bits == {name: 8 * count / size**2 for name, count in stored.items()}


def test_largest_elements(figures):
    """Powers of two saturate, or round; the exact scale is exact."""
    largest = {(f.preset, f.scale): f.largest for f in figures}
    assert largest["mxfp8", "floor"] == pytest.approx(1 - 448 / 512, rel=1e-6)
    assert largest["mxfp4", "floor"] == pytest.approx(1 - 6 / 8, rel=1e-6)
    assert largest["mxfp8", "ceil"] == pytest.approx(1 / 17, rel=1e-3)
    # At most: S_b off by 1/17, and an element halfway between 4 and 6.
    assert 1 / 6 < largest["nvfp4", "nvfp4"] < 1 / 17 + 1 / 5
    # Half the distance of two neighbours at the top: 32 of 448, 1 of 7, 1 of 127.
    assert largest["fp8_block", "amax"] == pytest.approx(16 / 448, rel=1e-2)
    assert largest["int4_group", "amax"] == pytest.approx(0.5 / 7, rel=1e-2)
    assert largest["int8_channel", "amax"] == pytest.approx(0.5 / 127, rel=2e-2)


def test_the_limits_of_nvfp4_are_the_codes():
    said = nvfp4.__doc__ or ""
    (power,) = re.findall(r"min\(2688 / A, 2\*\*(\d+)\)", said)
    (maximum,) = re.findall(r"maximum is below (\S+) ", said)
    assert f"S_enc = min(2688 / A, 2^{power}) " in PAGE
    limits = f"maximum is below {maximum} they differ: the reference has float32's largest value for 2^{power}"
    assert limits in " ".join(PAGE.split())


def test_every_preset_has_a_row_of_hardware_and_files():
    section = PAGE.split("### Hardware and files\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(PRESETS)


def test_figures_are_written(figures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "measure", lambda: figures)
    monkeypatch.setattr(formats, "PAGE", tmp_path / "page.md")
    formats.PAGE.write_text(f"before\n{formats.BEGIN}\nold\n{formats.END}\nbehind\n")
    formats.main([f"--json={tmp_path / 'out'}", "--page"])
    written = json.loads((tmp_path / "out").read_text())["cases"]
    assert [case["sqnr"] for case in written] == [list(f.sqnr) for f in figures]
    page = read(formats.PAGE)
    assert formats.table(figures) in page
    assert "old" not in page
    assert page.endswith("behind\n")
    assert "int8_channel" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no place for the table"):
        formats.page_with("no markers", figures)
