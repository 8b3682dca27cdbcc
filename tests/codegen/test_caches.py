"""The caches of Inductor and AOTAutograd: a second process hits both; what computes otherwise misses."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json
import sys
import torch
import gws_compile
from torch import nn
from torch._dynamo.utils import counters

settings = json.loads(sys.argv[1])
if settings.pop("stale", False):
    import gws_compile.ops.sample_arguments
    gws_compile.ops.sample_arguments.OPERATOR_VERSION = 1_000_000


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(40, 40, bias=False)

    def forward(self, x):
        return self.fc(x)


torch.manual_seed(0)
model = Net()
backend = gws_compile.backend(**settings)
compiled = torch.compile(model, backend=backend)
used = compiled(torch.eye(40))
(used * torch.linspace(0.1, 1, 40)).sum().backward()
print(json.dumps({
    "autograd": [counters["aot_autograd"][f"autograd_cache_{k}"] for k in ("hit", "miss", "bypass")],
    "inductor": [counters["inductor"][f"fxgraph_cache_{k}"] for k in ("hit", "miss", "bypass")],
    "used": used.flatten().tolist(),
    "gradient": model.fc.weight.grad.flatten().tolist(),
    "products": [[p.kind, p.text, p.weight] for p in backend.report().products],
}))
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """Runs the program in a process of its own, all with one cache folder."""
    folder = tmp_path_factory.mktemp("cache")

    def run(**settings):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(settings)],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def cold(process):
    return process(fmt="fp6_e3m2")


def test_a_second_process_hits_both(process, cold):
    assert cold["autograd"] == [0, 1, 0]
    assert cold["inductor"] == [0, 2, 0]  # forward and backward
    warm = process(fmt="fp6_e3m2")
    assert warm["autograd"] == [1, 0, 0]
    assert warm["inductor"] == [2, 0, 0]
    assert warm["used"] == cold["used"]


@pytest.mark.slow
def test_another_seed_hits_and_draws_otherwise(process, cold):
    """Keys are inputs: the code is the same, the noise is not."""
    other = process(fmt="fp6_e3m2", seed=1)
    assert other["autograd"] == [1, 0, 0]
    assert other["used"] != cold["used"]


@pytest.mark.parametrize(
    "change",
    [
        {"fmt": "fp4_e2m1"},
        pytest.param({"noise": "uniform"}, marks=pytest.mark.slow),
        pytest.param({"block": [16, 16]}, marks=pytest.mark.slow),
        pytest.param({"bits": 4.5}, marks=pytest.mark.slow),
        # The marks of what backward computes again are no part of a cache's key.
        pytest.param({"backward": "recompute"}, marks=pytest.mark.slow),
        pytest.param({"stale": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_computes_otherwise_misses(process, cold, change):
    changed = process(**{"fmt": "fp6_e3m2", **change})
    assert changed["autograd"] == [0, 1, 0]
    assert (changed["used"] != cold["used"]) == (not change.keys() & {"backward", "stale"})


@pytest.mark.slow
def test_recipes_are_seen(process):
    """A second process hits both caches and computes the same; its report has the products, of which none came by.

    How gradients are rounded changes no node of Dynamo's graph but the text of an argument.
    """
    operands = {"fmt": "mxfp8", "noise": "none", "exclude": [], "activations": "mxfp8", "gradients": "mxfp8"}
    cold = process(**operands)
    assert cold["autograd"] == [0, 1, 0]
    kinds = [kind for kind, _, _ in cold["products"]]
    assert sorted(kinds) == ["forward", "wgrad"]
    warm = process(**operands)
    assert (warm["autograd"], warm["inductor"]) == ([1, 0, 0], [2, 0, 0])
    assert {key: warm[key] for key in ("used", "gradient", "products")} == {
        key: cold[key] for key in ("used", "gradient", "products")
    }
    other = process(**{**operands, "gradients": "fp8_e5m2"})
    assert other["autograd"] == [0, 1, 0]
    assert other["used"] == cold["used"]
    assert other["gradient"] != cold["gradient"]
