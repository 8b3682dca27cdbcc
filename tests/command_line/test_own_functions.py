"""What an optimizer, or a library of optimizers, compiles for itself is left alone under `gws run`."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from gws_compile.command_line.torch_compile_patch import CompileCalls, TorchCompilePatch
from gws_compile.compiler.backend import Backend
from gws_compile.config import Config

LIBRARY = """
import torch
from torch import nn

def double(x):
    return x * 2

@torch.compile
def decorated(x):
    return x * 3

@torch.compile(dynamic=False)
def decorated_with_arguments(x):
    return x * 5

class Inside(nn.Module):
    def forward(self, x):
        return x

def compile_function():
    return torch.compile(double)

def compile_module():
    return torch.compile(Inside())
"""


class Compiling(torch.optim.Optimizer):
    """Compiles what it does to a parameter: where it is made, and in each step."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.update = torch.compile(self._update)  # never called

    @staticmethod
    def _update(parameter):
        parameter.sub_(1)

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            torch.compile(lambda p: p.mul_(2), dynamic=False)(parameter)
        torch.compile(self.model)  # a model is one, whoever compiles it


@pytest.fixture
def asked(monkeypatch):
    """The backend of each call that reaches torch.compile with something to compile."""
    seen, original = [], torch.compile

    def recorder(model=None, **kwargs):
        if model is not None:
            seen.append(kwargs.get("backend", "inductor"))
        return original(model, **kwargs)

    monkeypatch.setattr(torch, "compile", recorder)
    patch = TorchCompilePatch(Backend(Config.make()), CompileCalls())
    patch.install()
    yield seen, patch
    patch.remove()


def test_an_optimizer_compiles_with_torchs_own_backend(asked):
    seen, patch = asked
    optimizer = Compiling([nn.Parameter(torch.ones(2, 2))])
    optimizer.model = nn.Linear(2, 2)
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("error")
        optimizer.step()
    assert seen == ["inductor", "inductor", patch.backend]
    assert [(call.target, call.taken) for call in patch.calls.seen] == [("Linear", True)]


def test_a_compiled_step_is_the_optimizers_unless_the_backend_is_named(asked):
    seen, patch = asked
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))])
    own = Backend(Config.make("bf16"))
    torch.compile(optimizer.step)
    torch.compile(optimizer.step, backend=own)
    assert seen == ["inductor", own]
    assert [call.taken for call in patch.calls.seen] == []


def compile_loss(optimizer):
    return torch.compile(lambda x: x * len(optimizer.param_groups))


def test_a_function_of_the_script_that_takes_an_optimizer_is_the_scripts(asked):
    seen, patch = asked
    compile_loss(torch.optim.SGD([nn.Parameter(torch.ones(2, 2))]))
    assert seen == [patch.backend]


@pytest.mark.parametrize(("package", "own"), [("bitsandbytes", True), ("torchao", True), ("trainer_of_mine", False)])
def test_functions_that_a_library_of_optimizers_compiles(package, own, asked):
    """Where it is imported, too; its modules, and the functions of other libraries, take the backend."""
    seen, patch = asked
    names = {"__name__": f"{package}.functions"}
    exec(compile(LIBRARY, f"{package}/functions.py", "exec"), names)
    names["compile_function"]()
    names["compile_module"]()
    functions = ["inductor"] * 3 if own else [patch.backend] * 3
    assert seen == [*functions, patch.backend]
    assert len(patch.calls.seen) == (1 if own else 4)


SCRIPT = """
import torch
from torch import nn
from torchao import optim

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return x + self.down(self.up(x).relu())

torch.manual_seed(0)
model = Net()
optimizer = optim.AdamW8bit(model.parameters(), lr=1e-2)
compiled = torch.compile(model)
for _ in range(2):
    compiled(torch.randn(4, 64)).sum().backward()
    for parameter in model.parameters():  # the same in every run: the update alone is compared
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
print([parameter.double().sum().item().hex() for parameter in model.parameters()])
"""


@pytest.mark.slow
def test_the_steps_of_torchao_are_those_of_an_ordinary_run(tmp_path):
    """Bit for bit, whatever compiles the model; the report has the model alone, and nothing is said."""
    pytest.importorskip("torchao")
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GWS_")} | {"OMP_NUM_THREADS": "1"}

    def run(*command):
        return subprocess.run(
            [sys.executable, *command, "train.py"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )

    plain = run()
    for inner in ("inductor", "eager"):
        ours = run("-m", "gws_compile", "run", "--inner", inner, "--report", "report.json")
        assert ours.stdout == plain.stdout
        assert "GwsWarning" not in ours.stderr
        report = json.loads((tmp_path / "report.json").read_text())
        assert [weight["name"] for weight in report["weights"]] == ["up.weight", "down.weight"]
        assert [(call["target"], call["count"]) for call in report["calls"]] == [("Net", 1)]
        assert report["plain_steps"] == []
