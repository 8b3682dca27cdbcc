"""Saved and resumed: a new process goes on bit for bit, or is refused with the reason."""

import io
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.small_models import OneLayer
from torch import nn

import gws_compile

PROGRAM = """
import sys
import torch
import gws_compile
from torch import nn

first, last, load, save, resample = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
torch.manual_seed(0)
torch.set_num_threads(1)
blocks = [nn.Sequential(nn.Linear(40, 72), nn.GELU(), nn.Linear(72, 40)) for _ in range(2)]
model = nn.Sequential(*blocks)
learned = resample == "learned"
bits = gws_compile.LearnedBits(average=5.0) if learned else None
settings = {"bits": bits, "resample": "step" if learned else resample}
backend = gws_compile.backend("fp6_e3m2", seed=11, inner="aot_eager", **settings)
for block in blocks:
    backend.prepare(block, torch.randn(4, 40, generator=torch.Generator().manual_seed(0)))
compiled = [torch.compile(block, backend=backend) for block in blocks]  # named by order: no module is around them
optimizer = torch.optim.AdamW([*model.parameters(), *backend.parameters()], lr=0.01)
if load:
    state = torch.load(load, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    backend.load_state_dict(state["pqt"])
for step in range(first, last):
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(step))
    for half in x.chunk(2):
        for block in compiled:
            half = block(half)
        loss = half.square().mean()
        (loss + backend.bit_loss()).backward()
        print(step, loss.item().hex(), float(backend.average_bits()).hex())
    optimizer.step()
    optimizer.zero_grad()
if save:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pqt": backend.state_dict()}
    torch.save(state, save)
"""


def run(*args):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, args)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "resample", ["step", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("forward", "learned"))]
)
def test_a_new_process_continues_bit_for_bit(tmp_path, resample):
    whole = run(0, 5, "", "", resample)
    assert len(whole) == 10
    first = run(0, 2, "", tmp_path / "state.pt", resample)
    second = run(2, 5, tmp_path / "state.pt", "", resample)
    assert first + second == whole


def make(fmt="fp6_e3m2", **settings):
    torch._dynamo.reset()
    return gws_compile.backend(fmt, inner="eager", **settings)


@pytest.fixture
def state():
    backend, model = make(), OneLayer()
    torch.compile(model, backend=backend)(torch.randn(2, 40))
    backend.step()
    return backend.state_dict()


def test_what_a_state_holds(state):
    assert state == {
        "seed": 0,
        "fmt": "e3m2",
        "step": 1,
        "weights": [["fc.weight", [40, 40]]],
        "settings": [["fc.weight", "e3m2 32x32 floor"]],
        "rules": [],
        "operands": ["", "", ""],
        "master": 1,
        "updates": 0,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == state


def test_distributed_checkpoints(state, tmp_path):
    """Of the state, or of the backend itself, into a backend that has seen no weight yet."""
    saved, loaded = make(), make()
    saved.load_state_dict(state)
    dcp.save({"pqt": saved}, checkpoint_id=tmp_path)
    dcp.load({"pqt": loaded}, checkpoint_id=tmp_path)
    assert loaded.state_dict() == state
    template = {"pqt": make().state_dict()}
    dcp.load(template, checkpoint_id=tmp_path)
    assert template["pqt"] == state


def test_an_optimizer_that_checkpointing_initializes_takes_no_step(state):
    """``torch.distributed.checkpoint.state_dict`` fills a fresh optimizer's state by a step of its own."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, backend = OneLayer(), make()
    optimizer = torch.optim.AdamW(model.parameters())
    backend.load_state_dict(state)
    saved = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, saved)
    assert optimizer.state  # it did step
    assert backend.state_dict()["step"] == state["step"]
    torch.compile(model, backend=backend)(torch.randn(2, 40)).sum().backward()
    assert backend.state_dict()["step"] == state["step"]
    optimizer.step()
    assert backend.state_dict()["step"] == state["step"] + 1


def test_what_differs_is_refused(state):
    with pytest.raises(ValueError, match="the state was saved with seed=0, this backend has 3"):
        make(seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match="the state was saved with fmt='e3m2', this backend has 'e4m3'"):
        make("fp8_e4m3").load_state_dict(state)
    shapes = r"the state was saved with fc.weight of shape \(40, 40\), this model has it of shape \(24, 40\)"
    backend = make()
    backend.load_state_dict(state)  # nothing is known of the model yet
    compiled = torch.compile(OneLayer(24), backend=backend)
    for _ in range(2):  # refused each time
        with pytest.raises(ValueError, match=shapes):
            compiled(torch.randn(2, 40))
    backend, model = make(), OneLayer(24)
    torch.compile(model, backend=backend)(torch.randn(2, 40))
    with pytest.raises(ValueError, match=shapes):
        backend.load_state_dict(state)
    assert backend.state_dict()["step"] == 0  # left as it was
    assert backend.state_dict()["weights"] == [["fc.weight", [24, 40]]]
    backend = make()
    backend.load_state_dict(state)
    with pytest.warns(gws_compile.GwsWarning, match="other.weight is not among the weights of the loaded state"):
        torch.compile(Other(), backend=backend)(torch.randn(2, 40))


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(40, 40)

    def forward(self, x):
        return self.other(x)
