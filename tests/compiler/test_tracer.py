"""Tracing for `explain` and `Backend.prepare`: of models that are compiled already, wholly or in parts."""

import pytest
import torch
from torch import nn

import gws_compile

pytestmark = pytest.mark.usefixtures("reset")

X = torch.eye(8)
NAMES = ["blocks.0.fc.weight", "blocks.1.fc.weight", "out.weight"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return x + self.fc(x).relu()


class Net(nn.Module):
    def __init__(self, broken):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(8, 2, bias=False)
        self.broken = broken

    def forward(self, x):
        return self.out(self.stack(x))

    def stack(self, x):
        for block in self.blocks:
            if self.broken:
                torch._dynamo.graph_break()  # in a loop: the whole frame is left to Python, which calls the blocks
            x = block(x)
        return x


def nothing(model, backend):
    return model


def function(model, backend):
    return torch.compile(model, backend=backend)


def method(model, backend):
    model.compile(backend=backend)
    return model


def blocks(model, backend):
    for block in model.blocks:
        block.compile(backend=backend)
    return model


def wrapped_blocks(model, backend):
    model.blocks = nn.ModuleList(torch.compile(block, backend=backend) for block in model.blocks)
    return model


COMPILED = [nothing, function, method, blocks, wrapped_blocks]


@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "graph breaks"])
@pytest.mark.parametrize("how", COMPILED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("other", ["the backend", "another one"])
def test_prepare(how, broken, other):
    model = Net(broken)
    backend = gws_compile.backend(bits=gws_compile.LearnedBits(), inner="eager", block=(4, 4))
    # Called on fake tensors, one that computes on its own would fail.
    called = how(model, backend if other == "the backend" else gws_compile.backend(inner="aot_eager"))
    backend.prepare(called, X)
    prepared = dict(backend.named_parameters())
    assert list(prepared) == [f"{name}.bits" for name in NAMES]
    assert backend.graphs == []
    if other == "the backend":
        called(X).sum().backward()
        wholly = [True, True, how in (function, method)]  # the output layer is outside the blocks
        assert [p.grad is not None for p in prepared.values()] == ([False] * 3 if how is nothing else wholly)
        assert list(backend.parameters()) == list(prepared.values())


@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "graph breaks"])
@pytest.mark.parametrize("how", COMPILED, ids=lambda f: f.__name__)
def test_explain(how, broken):
    called = how(Net(broken), gws_compile.backend(fmt="fp6_e3m2", inner="eager"))
    report = gws_compile.explain(called, X, fmt="fp4_e2m1")
    assert [(record.name, record.fmt) for record in report.records if record.rewritten] == [
        (name, "fp4_e2m1") for name in NAMES
    ]
