"""``gws compare``."""

import json
import re
import sys
from pathlib import Path

import pytest

import gws_compile
from gws_compile.command_line import compare
from gws_compile.command_line.cli import main
from gws_compile.command_line.compared_settings_file import own_from_file
from gws_compile.comparison.comparing import listed

pytestmark = pytest.mark.usefixtures("fresh")

TRAINING = """
import torch
from torch import nn

def train(backend, seed, *, width=40, rate=0.1, name="none"):
    torch.manual_seed(seed)
    model = torch.compile(nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8)), backend=backend)
    x = torch.randn(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, lambda: model(x).square().mean().item(), {"width": width, "named": float(name == "some name")}

def wrong(backend, seed):
    return 3

def broken(backend, seed):
    raise FileNotFoundError("no text")
"""

OWN = """
["wider noise"]
fmt = "int3"
bits = 2
["a row"]
fmt = "int3"
block = [1, "all"]
schedule = {stop = 5}
["longer"]
training = {rate = 0.2}
"""

SHORT = [
    "compare",
    "--fmts",
    "int3",
    "--methods",
    "cast-afterwards,straight-through",
    "--seeds",
    "2",
    "--inner",
    "eager",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("made_to_compare.py").write_text(TRAINING)
    Path("own.toml").write_text(OWN)
    yield tmp_path
    sys.modules.pop("made_to_compare", None)


def test_of_a_function(folder, capsys):
    """Tables, JSON, the picture; the arguments arrive with their types; the second time nothing is trained."""
    command = [*SHORT, "--settings", "own.toml", "--presets", "fp8_e4m3,int3", "--out", "found"]
    command += ["made_to_compare.py:train", "width=48", "name=some name"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    content = json.loads(Path("found/comparison.json").read_text())
    names = ["plain", "int3, cast afterwards", "int3, straight-through", "wider noise", "a row", "longer"]
    assert [row["name"] for row in content["rows"]] == names
    assert all(f"| {name} " in printed for name in names)
    runs = {(run["setting"], run["seed"]): run for run in content["runs"]}
    assert len(runs) == 2 * 5
    assert runs["plain", 1]["figures"] == {"width": 48, "named": 1.0}
    assert set(runs["plain", 0]["casts"]) == {"fp8_e4m3", "int3", "int3, row, amax"}
    assert set(runs["a row", 0]["casts"]) == {"fp8_e4m3", "int3", "int3, row, amax"}
    assert runs["wider noise", 0]["average_bits"] == 2.0
    assert runs["longer", 0]["deployed"] != runs["plain", 0]["deployed"]
    assert Path("found/losses.png").exists()
    assert Path("found/robustness.png").exists()
    stamps = {file: file.stat().st_mtime_ns for file in Path("found/runs").glob("*.json")}
    assert main([*command[:-3], "--no-plots", *command[-3:]]) == 0
    assert capsys.readouterr().out.partition("\n\nThe runs")[0] == printed.partition("\n\nThe runs")[0]
    assert {file: file.stat().st_mtime_ns for file in Path("found/runs").glob("*.json")} == stamps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["made_to_compare.py:other"], "made_to_compare.py has no function 'other'; it has: "),
        (["nothing.py:train"], "nothing.py: there is no such file"),
        (["made_to_compare.py:train", "--width"], "--width: accepted are arguments of the function as key=value"),
        (["--seeds", "two", "made_to_compare.py:train"], "--seeds two: accepted are how many, such as 3, or which"),
        (["--seeds", "0", "made_to_compare.py:train"], "seeds must be how many, 1 or more"),
        (["--fmts", "fp3", "made_to_compare.py:train"], "unknown format 'fp3'"),
        (["--methods", "straight", "made_to_compare.py:train"], "unknown method 'straight': did you mean 'straight-"),
        (["--presets", "fp3", "made_to_compare.py:train"], "unknown format 'fp3'"),
        (["--settings", "no.toml", "made_to_compare.py:train"], "No such file or directory: 'no.toml'"),
        (["--auto", "made_to_compare.py:train"], "--auto is of a script and has no effect on the function"),
        (["--loss", "x(.)", "made_to_compare.py:train"], "--loss is of a script and has no effect on the function"),
        (["made_to_compare.py:train", "width=1", "width=2"], "width=2: width is given twice"),
        (["made_to_compare.py"], "no loss in"),
        (["--presets", "int3", "made_to_compare.py"], "--presets has no effect on made_to_compare.py"),
        (["nothing.py"], "can't open file 'nothing.py'"),
        (["--loss", "x(", "made_to_compare.py"], "--loss x(: no regular expression"),
        (["--loss", "x", "made_to_compare.py"], "--loss x: it must have one group, which is the loss, and has 0"),
    ],
)
def test_messages(folder, capsys, arguments, message):
    assert main([*SHORT, *arguments]) == 2
    error = capsys.readouterr().err
    assert "gws compare: error: " in error
    assert message in error.partition("gws compare: error: ")[2]


def test_what_training_raises_comes_out(folder):
    with pytest.raises(FileNotFoundError, match="no text"):
        main([*SHORT, "made_to_compare.py:broken"])


def test_values_of_arguments(folder):
    given = ["a=3", "b=true", "c=True", "d=None", "e=[1, 2]", "f=(1, 2)", "g=some text", "h=", "i=x=y", "j=1e-3"]
    values = [3, True, True, None, [1, 2], (1, 2), "some text", "", "x=y", 1e-3]
    assert list(compare._keywords(given).values()) == values


def test_a_function_that_returns_something_else(folder):
    with pytest.raises(TypeError, match=r"the training function must return .*, got int"):
        main([*SHORT, "made_to_compare.py:wrong"])


def test_settings_of_ones_own(folder):
    assert own_from_file("own.toml") == {
        "wider noise": {"fmt": "int3", "bits": 2},
        "a row": {"fmt": "int3", "block": (1, None), "schedule": gws_compile.Schedule(stop=5)},
        "longer": {"training": {"rate": 0.2}},
    }


def test_the_settings_of_the_documentation(tmp_path):
    """They are good ones, and none of them is another by another name."""
    root = Path(gws_compile.__file__).parents[1]
    made = listed([], [], [], own_from_file(root / "examples" / "compare_more.toml"), {})
    assert len({one.text for one in made}) == len(made) > 10
    (listing,) = re.findall(r"```toml\n(.*?)```", (root / "docs" / "comparing.md").read_text(), re.DOTALL)
    (tmp_path / "own.toml").write_text(listing)
    own = {one.name: one for one in listed([], [], [], own_from_file(tmp_path / "own.toml"), {})}
    assert own["plain, twice the rate"].trains_plain
    assert own["int3, twice the rate"].training == own["plain, twice the rate"].training == {"lr": 0.008}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 3", "a = 3 is no table; a setting is ['a'] with its arguments below"),
        ("[a]\nbit = 3", "[a] has an unknown key 'bit': did you mean 'bits'?"),
        ("[a]\nbits = 99", "[a] bits = 99: bits must be"),
        ("[a", "is not TOML"),
    ],
)
def test_bad_settings(tmp_path, text, message):
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(ValueError) as raised:
        own_from_file(file)
    assert message in str(raised.value)
