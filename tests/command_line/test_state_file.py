"""`gws run --state FILE`: the noise goes on from run to run, for scripts that know nothing of it."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from gws_compile import LearnedBits
from gws_compile.command_line.state_file import StateFile
from gws_compile.compiler.backend import Backend
from gws_compile.config import Config

SCRIPT = """
import os, signal, sys, torch
from pathlib import Path
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(40, 40, bias=False)
    def forward(self, x):
        return self.fc(x)

def main(steps, end):
    torch.manual_seed(0)
    net = Net()
    model = torch.nn.parallel.DistributedDataParallel(net) if "RANK" in os.environ else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    for _ in range(steps):
        weight = model(torch.eye(40))
        os.write(1, f"{weight.sum().item():.9g}\\n".encode())  # at once: several ranks write
        weight.sum().backward()
        optimizer.step()
    if end == "error":
        raise ValueError("the end")
    if end == "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)

def worker(rank, steps, end):
    main(steps, end)

if __name__ == "__main__":
    steps, end = int(sys.argv[1]), sys.argv[2]
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    if end == "spawn":
        torch.multiprocessing.spawn(worker, (steps, end), nprocs=1)
    elif end == "fork":
        process = torch.multiprocessing.get_context("fork").Process(target=main, args=(steps, end))
        process.start()
        process.join()
    else:
        main(steps, end)
    if "RANK" in os.environ:
        torch.distributed.barrier()  # gloo's threads end badly where the other rank has gone
        torch.distributed.destroy_process_group()
    sys.exit(3 if end == "exit" else 0)
"""
GWS = ["-m", "gws_compile", "run", "--auto", "--inner", "eager", "--state", "noise.pt"]
CODES = {"error": 1, "exit": 3, "sigterm": -signal.SIGTERM}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    variables = {k: v for k, v in os.environ.items() if not k.startswith("GWS_")}

    def start(steps, end, *options, launcher=()):
        command = [sys.executable, *launcher, *GWS, *options, "train.py", str(steps), end]
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)

    return start


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """The first six draws, in one run."""
    folder = tmp_path_factory.mktemp("six")
    (folder / "train.py").write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run([sys.executable, *GWS, "train.py", "6", "end"], cwd=folder, capture_output=True, text=True)
    draws = done.stdout.split()
    assert len(set(draws)) == 6, done.stderr
    return draws


@pytest.mark.parametrize(
    "end", ["exit", *(pytest.param(end, marks=pytest.mark.slow) for end in ("sigterm", "error", "spawn", "fork"))]
)
def test_two_runs_draw_what_one_draws(end, run, six, tmp_path):
    """However the first ends, and in whichever process of it the training is."""
    first = run(2, end)
    assert first.returncode == CODES.get(end, 0), first.stderr
    assert [path.name for path in tmp_path.iterdir() if "noise" in path.name] == ["noise.pt"]
    second = run(3, end)
    assert first.stdout.split() + second.stdout.split() == six[:5]


@pytest.mark.slow
def test_all_ranks_read_what_the_first_writes(run, six):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for expected in (six[:2], six[2:4]):
        done = run(2, "end", launcher=torchrun)
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.split()) == sorted(expected * 2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read as a state of gws run"),
        (b"no state", "cannot be read as a state of gws run"),
        ({"model": {}}, "is no state of gws run: it was written by something else"),
    ],
)
def test_another_file_is_refused(content, says, tmp_path):
    path = tmp_path / "noise.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"noise.pt {says}"):
        StateFile(str(path))


def test_one_of_other_settings_is_refused(run, tmp_path):
    assert run(1, "end", "--seed", "5").returncode == 0
    before = (tmp_path / "noise.pt").read_bytes()
    done = run(1, "end")
    assert (done.returncode, done.stdout) == (2, "")
    assert "noise.pt: the state was saved with seed=5, this backend has 0" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "noise.pt").read_bytes() == before
    assert "--state no/noise.pt: there is no such folder" in run(1, "end", "--state", "no/noise.pt").stderr


def trained(backend, steps):
    """The samples of a weight in training."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(40, 40, bias=False))
    compiled = torch.compile(model, backend=backend)
    seen = []
    backend.prepare(model, torch.eye(40))
    optimizer = torch.optim.SGD([*model.parameters(), *backend.parameters()], lr=0.1)
    for _ in range(steps):
        sample = compiled(torch.eye(40))
        seen.append(sample.detach().clone())
        (sample.square().sum() + backend.bit_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen


def backends():
    widths = LearnedBits(average=4.0, init=8.0)
    return [Backend(Config.make(inner="eager", fmt="fp4_e2m1")), Backend(Config.make(inner="eager", bits=widths))]


def test_several_backends_and_learned_widths(tmp_path):
    """States come in the order of use; those of backends that a run does not come to stay; widths outlive the model."""
    file = StateFile(str(tmp_path / "noise.pt"))
    for backend in (made := backends()):
        file.give(backend)
        file.give(backend)
        trained(backend, 3)
    file.write()
    widths = made[1].bits()

    short = StateFile(str(tmp_path / "noise.pt"))
    first, second = backends()
    short.give(first)
    assert first.draw == 3
    short.write()  # nothing drawn
    trained(first, 1)
    short.write()

    again = StateFile(str(tmp_path / "noise.pt"))
    first, second = backends()
    again.give(first)
    again.give(second)
    assert (first.draw, second.draw) == (4, 3)
    assert second.state_dict()["bits"].keys() == widths.keys()
    second.prepare(nn.Sequential(nn.Linear(40, 40, bias=False)), torch.eye(40))
    assert all(torch.equal(widths[name], value) for name, value in second.bits().items())
    assert second.state_dict()["steering"] == made[1].state_dict()["steering"]
    with pytest.raises(ValueError, match=r"noise.pt: the state was saved with fmt='e2m1', this backend has 'e4m3'"):
        StateFile(str(tmp_path / "noise.pt")).give(Backend(Config.make("fp8_e4m3")))
