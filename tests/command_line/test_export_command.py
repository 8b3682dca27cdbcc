"""``gws export``."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import llama
from torch import nn

import gws_compile
from gws_compile.command_line.cli import main

pytestmark = pytest.mark.usefixtures("reset")

FACTORY = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
"""

TOKENS = torch.tensor([[3, 14, 15, 92, 6, 5, 35, 89]])


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("made.py").write_text(FACTORY)
    yield
    sys.modules.pop("made", None)


def trained(model: nn.Module, x: torch.Tensor, **settings) -> gws_compile.Backend:
    """Train a step; the model's files, its backend's state, and what `Backend.export` writes."""
    backend = gws_compile.backend(inner="eager", **settings)
    compiled = torch.compile(model, backend=backend)
    output = compiled(x)
    (output.logits if hasattr(output, "logits") else output).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    torch.save(backend.state_dict(), "pqt.pt")
    backend.export(compiled, "direct")
    torch._dynamo.reset()
    return backend


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


def same(one: str, other: str = "direct") -> bool:
    a, b = (load_file(f"{folder}/model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a)


@pytest.mark.parametrize(
    "settings",
    [
        {"fmt": "nvfp4"},
        {"fmt": "fp8_channel", "rules": [("*.mlp.*", "mxfp4"), ("*.layers.1.self_attn.*", None)]},
        {"fmt": "int4", "block": (1, 32), "scale": "ceil", "seed": 7},
    ],
)
def test_a_folder_with_the_state_of_its_backend(settings, capsys):
    """The state says how it was trained."""
    model = llama().eval()
    trained(model, TOKENS, **settings)
    model.save_pretrained("model")
    capsys.readouterr()
    assert main(["export", "model", "out", "--state", "pqt.pt", "--json", "table.json"]) == 0
    assert same("out")
    printed = capsys.readouterr().out
    assert "weights packed" in printed
    table = json.loads(Path("table.json").read_text())
    assert table["path"] == "out"
    assert "config.json" in table["files"]


def test_a_folder_with_settings(capsys):
    model = llama().eval()
    trained(model, TOKENS, fmt="mxfp8")
    model.save_pretrained("model")
    assert main(["export", "model", "out", "--fmt", "mxfp8"]) == 0
    assert same("out")
    assert main(["export", "model", "dense", "--fmt", "mxfp8", "--format", "dense"]) == 0
    assert "quantization_config" not in json.loads(Path("dense/config.json").read_text())


@pytest.mark.parametrize("kind", ["pt", "safetensors", "wrapped"])
def test_a_checkpoint(kind):
    model = sequential()
    trained(model, torch.randn(4, 32), fmt="mxfp4")
    file = "model.safetensors" if kind == "safetensors" else "model.pt"
    if kind == "safetensors":
        save_file(model.state_dict(), file)
    else:
        torch.save({"model": model.state_dict()} if kind == "wrapped" else model.state_dict(), file)
    arguments = ["export", "made.py:build", "out", "--checkpoint", file, "--input", "2x32", "--state", "pqt.pt"]
    assert main(arguments) == 0
    assert same("out")


def test_learned_widths_need_their_rule(capsys):
    model = sequential()
    bits = gws_compile.LearnedBits(init=5.0, target=3.0, min=2.0, formats=("fp4_e2m1", "fp8_e4m3"))
    backend = gws_compile.backend("fp8_e4m3", bits=bits, inner="eager")
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(4, 32)
    compiled(x).sum().backward()
    for name, parameter in backend.named_parameters():
        parameter.data.fill_(0.0 if name.startswith("0") else 1.0)
    backend.freeze_bits()
    backend.export(compiled, "direct")
    torch.save({"pqt": backend.state_dict()}, "pqt.pt")
    torch.save(model.state_dict(), "model.pt")
    torch._dynamo.reset()
    arguments = ["export", "made.py:build", "out", "--checkpoint", "model.pt", "--input", "2x32", "--state", "pqt.pt"]
    assert main(arguments) == 2
    assert "the state has learned bit widths: give --bits, and --fmt" in capsys.readouterr().err
    rule = "learned:init=5,target=3,min=2,formats=fp4_e2m1/fp8_e4m3"
    assert main([*arguments, "--fmt", "fp8_e4m3", "--bits", rule]) == 0
    assert same("out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["made.py:build"], "how was the model trained? Give --state, or the settings (--fmt, ...) that it had"),
        (["none.py:build", "--fmt", "mxfp8"], "none.py: there is no such file"),
        (["folder", "--fmt", "mxfp8"], "folder has no config.json"),
        (["made.py:build", "--fmt", "mxfp8", "--checkpoint", "no.pt"], "--checkpoint no.pt: there is no such file"),
        (["made.py:build", "--fmt", "mxfp8", "--checkpoint", "made.py"], "--checkpoint made.py cannot be read"),
        (["made.py:build", "--state", "no.pt"], "--state no.pt: there is no such file"),
        (["made.py:build", "--state", "other.pt"], "--state other.pt has no state of Backend.state_dict()"),
        (["made.py:build", "--fmt", "mxfp8"], "call failed while it was traced"),
        (["made.py:build", "--fmt", "mxfp8", "--input", "2x32", "--format", "fp3"], "format must be one of None, "),
        (["made.py:build", "--state", "another.pt", "--input", "2x32"], "another.pt is of another model: it has"),
    ],
)
def test_what_is_wrong(arguments, message, capsys):
    Path("folder").mkdir()
    torch.save({"x": 1}, "other.pt")
    state = {"seed": 0, "fmt": "e4m3", "step": 1, "weights": [["layers.0.weight", [32, 32]]], "settings": []}
    torch.save(state, "another.pt")
    model, *rest = arguments
    assert main(["export", model, "out", *rest]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_states_of_a_run(capsys):
    """The file of gws run: of one backend."""
    model = sequential()
    backend = trained(model, torch.randn(4, 32), fmt="mxfp4")
    torch.save(model.state_dict(), "model.pt")
    torch.save({"gws_run_backends": [backend.state_dict()]}, "run.pt")
    arguments = ["export", "made.py:build", "out", "--checkpoint", "model.pt", "--input", "2x32", "--state"]
    assert main([*arguments, "run.pt"]) == 0
    assert same("out")
    torch.save({"gws_run_backends": [backend.state_dict()] * 2}, "two.pt")
    assert main([*arguments, "two.pt"]) == 2
    assert "has the states of 2 backends" in capsys.readouterr().err
