"""``gws explain``."""

import json
import sys
from pathlib import Path

import pytest
from support.reports import Page

from gws_compile.command_line.cli import main

pytestmark = pytest.mark.usefixtures("reset")


FACTORY = """
import torch
from torch import nn

def alone():
    return nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 16))

def with_args():
    return alone(), [torch.tensor([3])]

def with_kwargs():
    return nn.Linear(16, 16), (), {"input": torch.ones(2, 16)}

def wrong():
    return 3

NUMBER = 3
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("made.py").write_text(FACTORY)
    Path("examples_beside.py").write_text(FACTORY + "def example_inputs():\n    return (torch.tensor([5]),), {}\n")
    yield
    for name in ("made", "examples_beside"):
        sys.modules.pop(name, None)


def test_the_command(factory, capsys):
    code = main(["explain", "made.py:alone", "--input", "2:int64:10", "--fmt", "fp6_e3m2", "--json", "report.json"])
    assert code == 0
    printed = capsys.readouterr().out
    assert "1 of 2 weights rewritten" in printed
    assert "gws-report.html" in printed
    assert "fp6_e3m2" in Page(Path("gws-report.html").read_text()).section("weights")
    content = json.loads(Path("report.json").read_text())
    rewritten = [w for w in content["weights"] if w["rewritten"]]
    assert [w["name"] for w in rewritten] == ["1.weight"]
    assert rewritten[0]["reads"][0]["op"] == "linear"
    assert content["settings"]["fmt"] == "fp6_e3m2"
    assert [graph["gradients"] for graph in content["graphs"]] == [True]
    assert content["graph_breaks"] == []


@pytest.mark.parametrize(
    "arguments",
    [["made:with_args"], ["made.py:with_kwargs"], ["examples_beside.py:alone"], ["made:alone", "--input", "3:int64"]],
)
def test_every_way_to_give_a_call(factory, capsys, arguments):
    assert main(["explain", *arguments, "--html", "page.html", "--eval"]) == 0
    assert "weights rewritten" in capsys.readouterr().out
    assert "without gradients" in Page(Path("page.html").read_text()).section("graphs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["made"], "accepted are package.module:function"),
        (["made.py:missing"], "made.py has no function 'missing'; it has: alone, with_args"),
        (["made:NUMBER"], "made has no function 'NUMBER'"),
        (["nowhere:f"], "no module named 'nowhere'"),
        (["nowhere.py:f"], "nowhere.py: there is no such file"),
        (["made:wrong"], "returned int; accepted: a torch.nn.Module, (module, args)"),
        (["made:alone"], "give it --input"),
        (["made:alone", "--input", "2y"], "--input 2y: accepted are"),
        (["made:alone", "--input", "2:int"], "unknown dtype 'int'; accepted: float32"),
        (["made:alone", "--input", "2:float32:4"], "is for integers"),
        (["made:alone", "--fmt", "fp9"], "unknown format 'fp9'"),
        (["made:with_args", "--strict", "--exclude", "*weight"], "strict=True, and no weight was rewritten"),
        (["made:alone", "--json", "no/such/report.json"], "there is no such folder"),
        (["made:alone", "--html", "no/such/report.html"], "there is no such folder"),
    ],
)
def test_errors_say_what_is_accepted(factory, capsys, arguments, message):
    assert main(["explain", "--no-html", *arguments] if "--html" not in arguments else ["explain", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("gws explain: error: ")
