"""Comparisons of scripts that are not touched."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import gws_compile
from gws_compile.command_line import compared_script
from gws_compile.command_line.cli import main
from gws_compile.command_line.compared_script import (
    ANY_LOSS,
    HELD_OUT_LOSS,
    ComparedScript,
    as_toml,
    check_script_settings,
)
from gws_compile.command_line.options import UsageError
from gws_compile.command_line.settings_text import from_file
from gws_compile.comparison.compared_settings import ComparedSetting
from gws_compile.comparison.run_folder import RunFolder
from gws_compile.config import Config
from gws_compile.warning import GwsWarning

SCRIPT = """
import sys, torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(40, 64), nn.Linear(64, 40)

    def forward(self, x):
        return self.down(self.up(x).relu())

model, x = Net(), torch.randn(8, 40)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
compiled = torch.compile(model)
for _ in range(int(sys.argv[1])):
    loss = (compiled(x) - x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
with torch.no_grad():
    print("eval_loss =", (compiled(x) - x).square().mean().item())
print("the last train loss:", loss.item())
torch.save([model, x], sys.argv[2])
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(SCRIPT)
    return tmp_path


def test_an_unmodified_script(folder, capsys):
    """Each loss that is read is that of an eager model, cast by the public reference; nothing of the script changes."""
    command = ["compare", "--fmts", "int3", "--methods", "cast-afterwards,straight-through", "--seeds", "7,"]
    command += ["--inner", "aot_eager", "--out", "found", "train.py", "3", "model-{seed}.pt"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    losses = {run["setting"]: run["deployed"] for run in json.loads(Path("found/comparison.json").read_text())["runs"]}
    assert list(losses) == ["plain", "int3, cast afterwards", "int3, straight-through"]
    assert all(f"{loss:.4f}" in printed for loss in losses.values())
    seeded = f"import torch, sys; torch.manual_seed(7); sys.argv = ['', '3', 'plain.pt']\n{SCRIPT}"
    direct = subprocess.run([sys.executable, "-c", seeded], capture_output=True, text=True, check=True)
    assert losses["plain"] == pytest.approx(float(direct.stdout.split()[2]), rel=1e-5)
    # The one that was written last is the straight-through run's; the cast of the plain one's weights is worked out.
    sys.modules["__main__"].Net = namespace()["Net"]
    try:
        plain, x = torch.load("plain.pt", weights_only=False)
        trained, _ = torch.load("model-7.pt", weights_only=False)
    finally:
        del sys.modules["__main__"].Net
    for model, name in ((plain, "int3, cast afterwards"), (trained, "int3, straight-through")):
        with torch.no_grad():
            for layer in (model.up, model.down):
                layer.weight.copy_(gws_compile.quantize(layer.weight, "int3"))
            assert losses[name] == pytest.approx((model(x) - x).square().mean().item(), rel=1e-5)
    told = json.loads(next(Path("found/runs").glob("int3-straight*.report.json")).read_text())["weights"]
    assert {one["name"] for one in told if one["rewritten"]} == {"up.weight", "down.weight"}


def namespace():
    found = {}
    exec(SCRIPT.partition("model, x =")[0], found)
    return found


def run_of(monkeypatch, tmp_path, output="", code=0, report=None, setting=None, graphs=(True, False), **arguments):
    """A run whose process is played; ``graphs`` says of each whether it had gradients."""
    script = tmp_path / "script.py"
    script.touch()
    folder = RunFolder(tmp_path / "found", {})
    seen = {}

    def run(command, *, env, stdout, **_):
        seen.update(command=command, env=env)
        stdout.write(output)
        if report is not None:
            Path(command[command.index("--report") + 1]).write_text(
                json.dumps({"weights": report, "graphs": [{"gradients": one} for one in graphs]})
            )
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(compared_script.subprocess, "run", run)
    setting = setting or ComparedSetting("plain", "plain", {"noise": "none"})
    made = ComparedScript(str(script), ("--seed", "{seed}", "--lr", "1"), **arguments).run(setting, 5, folder)
    return made, seen


def test_commands(monkeypatch, tmp_path):
    weights = [{"rewritten": True, "bits": 3.0, "shape": [2, 4], "stored_bytes": 7}]
    weights.append({"rewritten": True, "bits": 6.0, "shape": [4], "stored_bytes": 2})
    weights.append({"rewritten": False, "bits": None, "shape": [9, 9], "stored_bytes": None})
    own = ComparedSetting("own", "", {"fmt": "int3"}, {"arguments": ["--steps", "9", "--tag={seed}"]})
    made, seen = run_of(monkeypatch, tmp_path, "loss: 2", report=weights, setting=own, auto=True)
    assert made["deployed"] == 2.0
    assert (made["average_bits"], made["bytes"]) == (4.0, 9)
    command = seen["command"]
    assert command[:6] == [sys.executable, "-m", "gws_compile", "run", "--random-seed", "5"]
    assert command[8:] == ["--auto", str(tmp_path / "script.py"), *"--seed 5 --lr 1 --steps 9 --tag=5".split()]
    assert from_file(seen["env"]["GWS_CONFIG"]) == {"fmt": "int3", "seed": 5}
    cast = ComparedSetting("cast", "cast-afterwards", {"fmt": "int3", "noise": "none"})
    _, seen = run_of(monkeypatch, tmp_path, "loss: 2", report=weights, setting=cast)
    assert seen["command"][8] == "--cast-afterwards"
    _, seen = run_of(monkeypatch, tmp_path, "loss: 2")
    assert seen["command"][6:8] == ["--plain", str(tmp_path / "script.py")]


@pytest.mark.parametrize(
    ("output", "loss"),
    [
        ("step 1 loss 3.5\nstep 2 loss 2.5", 2.5),
        ("val loss: 1.5\ntrain loss: 0.5", 1.5),
        ("{'eval_loss': 2.25, 'epoch': 1}\n{'loss': '0.5'}", 2.25),
        ("{'eval_loss': '2.25', 'epoch': '1'}", 2.25),
        ("Test Loss = 1e-3", 1e-3),
        ("held-out loss 3.25 -> held_out_loss=.75", 0.75),
        ("validation loss: nan", float("nan")),
        ("loss of 3 samples\nloss: 4", 4.0),
        ("val loss 1,234.5", 1234.5),
        ("val loss 2\nretrieval loss 0.5\ninterval_loss=4\nlatest loss: 3.2", 2.0),
        ("eval loss: information\nloss 3", 3.0),
    ],
)
def test_how_losses_are_printed(monkeypatch, tmp_path, output, loss):
    made, _ = run_of(monkeypatch, tmp_path, output)
    assert made["deployed"] == pytest.approx(loss, nan_ok=True)


def test_a_pattern_of_ones_own(monkeypatch, tmp_path):
    made, _ = run_of(monkeypatch, tmp_path, "bpb 1.5\nbpb 1.25 (best 1.0)\nval loss 3", loss=r"bpb (\S+)")
    assert made["deployed"] == 1.25
    with pytest.raises(RuntimeError, match=r"found 'best' in .*, which is no number"):
        run_of(monkeypatch, tmp_path, "bpb best", loss=r"bpb (\S+)")


def test_what_goes_wrong(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match=re.escape(f"{HELD_OUT_LOSS} and {ANY_LOSS} has no match; say with --loss")):
        run_of(monkeypatch, tmp_path, "nothing to see")
    with pytest.raises(RuntimeError, match=r"ended with exit code 3; its output is .*\.log: ValueError: bad"):
        run_of(monkeypatch, tmp_path, "Traceback\nValueError: bad\n\ngws run: the script ended with it\n", code=3)
    left = [{"rewritten": False, "bits": None, "shape": [9, 9], "stored_bytes": None}]
    own = ComparedSetting("own", "", {"fmt": "int3"})
    with pytest.raises(RuntimeError, match="no weight was cast, so this was ordinary training; with --auto"):
        run_of(monkeypatch, tmp_path, "loss: 2", report=left, setting=own)
    weights = [{"rewritten": True, "bits": 3.0, "shape": [2, 4], "stored_bytes": 7}]
    for graphs in ((True, True), ()):  # evaluated eagerly: what is printed is a loss of weights as they are
        with pytest.raises(RuntimeError, match="no compiled call had gradients disabled, so that the loss that it pri"):
            run_of(monkeypatch, tmp_path, "loss: 2", report=weights, setting=own, graphs=graphs)


def test_modules(monkeypatch, tmp_path):
    """Found as ``python -m`` finds them, and told apart by their text."""
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "to_compare"
    package.mkdir()
    (package / "__init__.py").touch()
    with pytest.raises(UsageError, match="no module named 'to_compare'"):
        ComparedScript("to_compare", module=True)
    (package / "__main__.py").write_text("print('loss 1')")
    before = ComparedScript("to_compare", module=True).identity
    (package / "__main__.py").write_text("print('loss 2')")
    assert ComparedScript("to_compare", module=True).identity != before
    with pytest.raises(UsageError, match="no module named 'nothing_there'"):
        ComparedScript("nothing_there", module=True)


def test_the_environment_does_not_win(monkeypatch, tmp_path):
    monkeypatch.setenv("GWS_FMT", "int8")
    with pytest.warns(GwsWarning, match="GWS_FMT has no effect on a comparison"):
        _, seen = run_of(monkeypatch, tmp_path, "loss: 2")
    assert "GWS_FMT" not in seen["env"]


def test_seeds_that_make_no_difference():
    runs = [{"method": "plain", "deployed": 2.5}, {"method": "", "deployed": 2.0}, {"method": "plain", "deployed": 2.5}]
    with pytest.warns(
        GwsWarning, match="the same loss, 2.5, under all 2 seeds: the script seeds its generators itself"
    ):
        compared_script.warn_of_equal_seeds(runs)
    compared_script.warn_of_equal_seeds(runs[:2])


def test_what_a_setting_may_say_of_a_script():
    good = ComparedSetting("good", "", {"fmt": "int3"}, {"arguments": ["--lr", "3"]})
    check_script_settings([good])
    with pytest.raises(UsageError, match="setting 'learned': learned widths and trained levels are parameters"):
        check_script_settings([ComparedSetting("learned", "", {"bits": gws_compile.LearnedBits()})])
    for training in ({"lr": 3}, {"arguments": "--lr 3"}, {"arguments": [3]}):
        with pytest.raises(UsageError, match=r"setting 'bad': of a script, training is \{arguments = \[texts\]\}"):
            check_script_settings([good, ComparedSetting("bad", "", {"fmt": "int3"}, training)])


@pytest.mark.parametrize(
    "arguments",
    [
        {"fmt": "int3", "block": (1, None), "master": False, "seed": 3},
        {"bits": gws_compile.LearnedBits(average=3.5, formats=("fp4_e2m1", "bf16"))},
        {"fmt": "fp4_e2m1", "schedule": gws_compile.Schedule(stop=9, bits=((0, 6.0), (5, 3.0)))},
        {"recipe": "nvfp4", "exclude": ("a.*", 'b"\\')},
        {"fmt": "int4", "activations": gws_compile.Operand("mxfp8", products=("wgrad",)), "block": (1, 32)},
    ],
)
def test_settings_as_toml(tmp_path, arguments):
    """What is written is read as the same configuration."""
    file = tmp_path / "x.toml"
    file.write_text(as_toml(arguments))
    tomllib.loads(file.read_text())
    assert Config.make(**from_file(file)) == Config.make(**arguments)
