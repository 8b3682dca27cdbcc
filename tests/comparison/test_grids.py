"""Casting a model's weights in place, held to `gws_compile.quantize`."""

import math

import pytest
import torch
from torch import nn

import gws_compile
from gws_compile.comparison.grids import Grids
from gws_compile.config import Config

pytestmark = pytest.mark.usefixtures("reset")


class Mixed(nn.Module):
    """Weights that are blocked in different ways, and one that no graph casts."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(40, 48)
        self.conv = nn.Conv1d(3, 40, 5)
        self.experts = nn.Parameter(torch.randn(3, 48, 40))
        self.lm_head = nn.Linear(40, 7)

    def forward(self, x):
        x = self.conv(x).mean(2)
        return self.lm_head(torch.bmm(self.fc(x).expand(3, -1, -1), self.experts).sum(0))


CONFIGS = {"int3": Config.make("int3"), "fp4": Config.make("fp4_e2m1", rules=[("fc.*", None), ("experts", "int2")])}


def model_and_grids(dtype=torch.float32, autocast=False):
    model = Mixed().to(dtype)
    backend = gws_compile.backend("fp8_e4m3", inner="eager", noise="none")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        torch.compile(model, backend=backend)(torch.randn(2, 3, 9, dtype=dtype))
    return model, Grids.of_model(backend, model, CONFIGS)


def expected(model, name, fmt):
    w = model.get_parameter(name).detach()
    flat = w.flatten(1) if name == "conv.weight" else w
    return gws_compile.quantize(flat, fmt).view(w.shape)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_values(dtype, autocast):
    """Bit for bit the public reference's, in the weights' dtype, as graphs cast them; then they are as before."""
    model, grids = model_and_grids(dtype, autocast)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    formats = {
        "int3": {"fc.weight": "int3", "conv.weight": "int3", "experts": "int3"},
        "fp4": {"conv.weight": "fp4_e2m1", "experts": "int2"},
    }
    for label, of_weights in formats.items():
        wanted = before | {name: expected(model, name, fmt) for name, fmt in of_weights.items()}
        with grids.cast_to(label) as distance:
            for name, p in model.named_parameters():
                assert torch.equal(p, wanted[name]), name
        cast = ["fc.weight", "conv.weight", "experts"]
        moved = sum(float((before[name] - wanted[name]).double().square().sum()) for name in cast)
        total = sum(float(before[name].double().square().sum()) for name in cast)
        assert distance == pytest.approx(math.sqrt(moved / total), rel=1e-12)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_restored_behind_an_error():
    model, grids = model_and_grids()
    before = model.fc.weight.detach().clone()
    with pytest.raises(RuntimeError, match="in between"), grids.cast_to("int3"):
        raise RuntimeError("in between")
    assert torch.equal(model.fc.weight, before)


def test_bytes():
    """3 bits an element and 4 bytes a block of 32 x 32; what is left alone does not count."""
    _, grids = model_and_grids()
    blocks = 2 * 2 + 2 * 1 + 3 * 2 * 2
    assert grids.stored_bytes("int3") == (48 * 40 + 40 * 15 + 3 * 48 * 40) * 3 // 8 + 4 * blocks
    conv, experts = 40 * 15 // 2 + 2, 3 * 48 * 40 // 4 + 4 * 12
    assert grids.stored_bytes("fp4") == conv + experts


def test_names_that_are_left_out():
    """Other weights than a backend of these settings would cast stay as they are."""
    model = Mixed()
    backend = gws_compile.backend("fp8_e4m3", inner="eager", noise="none")
    with torch.no_grad():
        torch.compile(model, backend=backend)(torch.randn(2, 3, 9))
    configs = {"a": Config.make("int3", exclude="fc.*"), "b": Config.make("int3", include="fc.*", exclude=())}
    grids = Grids.of_model(backend, model, configs)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for label, cast in (("a", {"conv.weight", "experts"}), ("b", {"fc.weight"})):
        with grids.cast_to(label):
            assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == cast


def test_nothing_cast():
    backend = gws_compile.backend("fp8_e4m3", inner="eager")
    with pytest.raises(ValueError, match=r"no weight of the model .* was cast while its evaluate\(\) ran"):
        Grids.of_model(backend, Mixed(), CONFIGS)
