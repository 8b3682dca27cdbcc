"""The README's tables say what the code does."""

import re
from pathlib import Path

import gws_compile
from gws_compile.config import Config

README = (Path(__file__).parents[2] / "README.md").read_text()


def rows(title: str) -> list[list[str]]:
    section = README.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def number(text: str) -> float:
    base, _, power = text.partition("^")
    return float(base) ** int(power) if power else float(text)


def test_formats_table():
    table = {row[0].strip("`"): [number(cell) for cell in row[1:]] for row in rows("Formats")}
    assert table.keys() == gws_compile.FORMATS.keys()
    for name, (exponent, mantissa, largest, normal, smallest, bits) in table.items():
        fmt = gws_compile.FORMATS[name]
        assert (fmt.exponent_bits, fmt.mantissa_bits, fmt.noise_bits) == (exponent, mantissa, bits)
        assert (fmt.min_normal, fmt.min_subnormal) == (normal, smallest)
        assert float(f"{fmt.max:.3g}") == float(f"{largest:.3g}")


def test_settings_table():
    import inspect

    parameters = inspect.signature(gws_compile.backend).parameters
    shown = re.findall(r"`(\w+)=([^`]+)`", " ".join(row[0] for row in rows("Settings")))
    assert [name for name, _ in shown] == list(parameters)
    for name, default in shown:
        assert parameters[name].default == eval(default, vars(gws_compile).copy())
    assert list(inspect.signature(Config.make).parameters) == list(parameters)


def test_the_two_commands_come_first():
    assert README.split("```")[1].split()[1:3] == ["make", "demo"]
    targets = (Path(__file__).parents[2] / "Makefile").read_text()
    assert "\ndemo:" in targets
    assert "\ntest:" in targets
