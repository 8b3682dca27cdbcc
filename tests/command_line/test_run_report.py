"""What `gws run` says at the end, by what has happened."""

import json

import pytest
import torch
from torch import nn

import gws_compile
from gws_compile.command_line.named_backend import forget_named_backends
from gws_compile.command_line.run_report import Ending, RunReport
from gws_compile.command_line.torch_compile_patch import CompileCall, CompileCalls

TAKEN = CompileCall("train.py:3", "Net", taken=True)
LEFT = CompileCall("train.py:12", "Net", taken=False, reason="backend='cudagraphs'")
AUTO = CompileCall("train.py:9", "Net", taken=True, reason="--auto")


def report_of(*calls, auto=False, file=None):
    record = CompileCalls()
    for call in calls:
        record.add(call)
    return RunReport(record, script="train.py", auto=auto, file=file)


@pytest.fixture(autouse=True)
def _no_backends_by_name(monkeypatch):
    forget_named_backends()
    monkeypatch.delenv("RANK", raising=False)


def test_header():
    text = report_of(TAKEN, TAKEN, LEFT).header()
    assert text == (
        "2 torch.compile calls took the gws backend: Net at train.py:3 x 2; "
        "1 left alone: backend='cudagraphs' at train.py:12"
    )
    text = report_of(AUTO, auto=True).header()
    assert text == "0 torch.compile calls took the gws backend; 1 module compiled by --auto: Net at train.py:9"
    many = [CompileCall(f"train.py:{i}", "f", taken=True) for i in range(20)]
    assert report_of(*many).header().endswith("f at train.py:7, ...")


@pytest.mark.parametrize(
    ("calls", "auto", "why", "hint"),
    [
        ([], False, "The script never calls torch.compile.", True),
        ([LEFT], False, "Every torch.compile call names a backend of its own", True),
        ([TAKEN], False, "What was compiled gave no graph with a weight", False),
        ([], True, "No module with trainable weights was called with gradients enabled", False),
    ],
)
def test_nothing_rewritten_is_loud(calls, auto, why, hint, capsys):
    report_of(*calls, auto=auto).finish()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "NO WEIGHT WAS REWRITTEN: this was ordinary training." in printed.err
    assert why in printed.err
    assert ("gws run --auto train.py" in printed.err) == hint


def test_backends_of_the_script_and_a_text_file(tmp_path, capsys):
    torch._dynamo.reset()
    own = gws_compile.backend("fp6_e3m2", inner="eager")
    torch.compile(nn.Linear(40, 24), backend=own)(torch.ones(1, 40))
    file = tmp_path / "report.txt"
    report = report_of(TAKEN, file=str(file))
    report.calls.own.append(own)
    report.finish()
    assert "1 of 1 weights rewritten" in file.read_text()
    assert file.read_text().startswith("gws run: 1 torch.compile call took the gws backend: Net at train.py:3")
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize(("environment", "recorded", "speaks"), [("1", None, False), ("1", 0, True), ("0", 1, False)])
def test_the_first_rank_speaks(environment, recorded, speaks, monkeypatch, capsys):
    monkeypatch.setenv("RANK", environment)
    report = report_of(TAKEN)
    report.calls.rank = recorded
    report.finish()
    assert bool(capsys.readouterr().err) == speaks


def test_the_page_is_that_of_the_backend(tmp_path, capsys):
    """With the graphs, which a report over several backends has not."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    backend = gws_compile.named_backend(inner="eager", fmt="fp6_e3m2")
    torch.compile(model, backend=backend)(torch.ones(2, 8)).sum().backward()
    report_of(TAKEN, file=str(tmp_path / "run.html")).finish()
    page = (tmp_path / "run.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "fp6_e3m2" in page
    assert "graph 0" in page
    assert "The report is in" in capsys.readouterr().err


def test_a_script_that_evaluates_nothing_compiled_is_told_so(capsys):
    """Hugging Face's Trainer with torch_compile=True trains the compiled model and evaluates the one inside."""
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.ones(2, 8)
    compiled = torch.compile(model, backend=gws_compile.named_backend(inner="eager"))
    compiled(x).sum().backward()
    with torch.no_grad():
        model(x)
    report_of(TAKEN).finish()
    assert "\n\nNo compiled call had gradients disabled: " in capsys.readouterr().err
    with torch.no_grad():
        compiled(x)
    report_of(TAKEN).finish()
    assert "gradients disabled" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (None, None),
        (SystemExit(), None),
        (SystemExit(0), None),
        (SystemExit(2), "exit code 2"),
        (SystemExit("no data"), "exit code 1"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_one_line_for_a_script_that_has_not_come_to_its_end(error, says, capsys):
    """Nothing of missing noise, which follows from it; the report where it was meant to end, if it has something."""
    report = report_of()
    report.ending = Ending.by(error)
    report.finish()
    if says is None:
        assert "NO WEIGHT WAS REWRITTEN" in capsys.readouterr().err
        return
    line = f"\ngws run: the script ended with {says}, before anything took the gws backend\n"
    assert capsys.readouterr().err == line
    torch._dynamo.reset()
    backend = gws_compile.named_backend(inner="eager")
    torch.compile(nn.Linear(40, 24), backend=backend)(torch.ones(1, 40)).sum().backward()
    report.calls.add(TAKEN)
    report.finish()
    line = f"\ngws run: the script ended with {says}; up to then 1 of 1 weights rewritten\n"
    text = capsys.readouterr().err
    assert (text == line) == (says == "ZeroDivisionError")
    assert text == line or "1 of 1 weights rewritten, 960 of 960 elements" in text


def test_a_file_is_written_for_it_too(tmp_path, capsys):
    file = tmp_path / "report.json"
    report = report_of(TAKEN, file=str(file))
    report.ending = Ending.by(ValueError())
    report.finish()
    said = f"gws run: the script ended with ValueError; up to then no weight seen; the report is in {file}"
    assert capsys.readouterr().err.strip() == said
    assert json.loads(file.read_text())["weights"] == []


def test_functions_over_parameters_are_no_rows(capsys):
    """What updates parameters, or adds up their squares; but for a weight that the function multiplies by."""
    torch._dynamo.reset()
    backend = gws_compile.named_backend(inner="eager")
    model, average = nn.Linear(40, 24), nn.Linear(40, 24)
    norm = nn.Parameter(torch.randn(24, 40))

    @torch.compile(backend=backend)
    def update(p, grad):
        with torch.no_grad():
            p.sub_(grad, alpha=0.1)

    @torch.compile(backend=backend)
    def follow(averages, weights):
        with torch.no_grad():
            for p, q in zip(averages, weights, strict=True):
                p.lerp_(q, 0.1)

    @torch.compile(backend=backend)
    def decay(weights):
        return sum(w.square().sum() for w in weights)

    @torch.compile(backend=backend)
    def product(w, x):
        return x @ w

    torch.compile(model, backend=backend)(torch.ones(2, 40)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.compile(optimizer.step, backend=backend)()
    update(model.weight, model.weight.grad)
    follow(list(average.parameters()), list(model.parameters()))
    decay(list(model.parameters()))
    product(norm, torch.ones(2, 24)).sum().backward()
    report_of(TAKEN).finish()
    rows = [line.split()[0] for line in capsys.readouterr().err.splitlines() if "40" in line.split()[:5]]
    assert rows == ["weight", "w"]


def test_products_of_a_recipe(tmp_path, capsys):
    """In the text, and in the file for programs."""
    forget_named_backends()
    backend = gws_compile.named_backend(recipe="mxfp8", inner="aot_eager", exclude=())
    torch._dynamo.reset()
    torch.compile(nn.Sequential(nn.Linear(32, 8)), backend=backend)(torch.ones(4, 32)).sum().backward()
    report_of(TAKEN).finish()
    assert "forward          1  activation fp8_e4m3, 1 x 32, floor" in capsys.readouterr().err
    file = tmp_path / "report.json"
    report_of(TAKEN, file=str(file)).finish()
    products = json.loads(file.read_text())["products"]
    assert [(one["kind"], one["weight"]) for one in products] == [("forward", "0.weight"), ("wgrad", "0.weight")]
