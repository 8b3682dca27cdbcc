"""Averages of weights beside PQT: EMA, SWA and Lookahead are evaluated under the cast, exported, and change no draw."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import gws_compile

pytestmark = pytest.mark.usefixtures("reset")

FMT = "fp4_e2m1"
STEPS = 6


class Classifier(nn.Module):
    """With batch statistics, which SWA takes anew for its average."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(40, 64), nn.BatchNorm1d(64), nn.Linear(64, 8)

    def forward(self, x):
        return self.down(self.norm(self.up(x)).relu())


class Lookahead:
    """Lookahead (Zhang et al., arXiv 1907.08610) around any optimizer: every `every` steps the weights go half the way
    back to the slow ones, which are written into the parameters."""

    def __init__(self, inner, *, every=2, alpha=0.5):
        self.inner, self.every, self.alpha, self.steps = inner, every, alpha, 0
        self.slow = {p: p.detach().clone() for group in inner.param_groups for p in group["params"]}

    def step(self):
        self.inner.step()
        self.steps += 1
        if self.steps % self.every == 0:
            for parameter, slow in self.slow.items():
                slow.lerp_(parameter.detach(), self.alpha)
                parameter.data.copy_(slow)

    def zero_grad(self):
        self.inner.zero_grad()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 40, generator=generator) for _ in range(STEPS)]


def train(model, compiled, optimizer, behind=lambda: None):
    """The losses, bit for bit."""
    losses = []
    for x in batches():
        loss = compiled(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        behind()
    return torch.stack(losses)


def made(inner):
    torch.manual_seed(0)
    model, backend = Classifier(), gws_compile.backend(FMT, inner=inner)
    return model, torch.compile(model, backend=backend), backend


# How torch averages, and the share of each step's weights in the result.
AVERAGES = [
    pytest.param({"multi_avg_fn": get_ema_multi_avg_fn(0.5)}, [1 / 32, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2], id="ema"),
    pytest.param({}, [1 / STEPS] * STEPS, id="swa"),
]


@torch.no_grad()
def cast_outputs(model, x):
    """The unmodified model in eager mode, its weights replaced by their casts."""
    plain = copy.deepcopy(model)
    for layer in (plain.up, plain.down):
        layer.weight.copy_(gws_compile.quantize(layer.weight, FMT))
    return plain(x)


@pytest.mark.parametrize("inner", ["inductor", "eager"])
@pytest.mark.parametrize(("average", "shares"), AVERAGES)
def test_an_average_is_evaluated_under_the_cast_and_exported(inner, average, shares, tmp_path):
    """Of the weights themselves, not of their samples; training is bit for bit what it is without it."""
    alone, compiled, _ = made(inner)
    expected = train(alone, compiled, torch.optim.AdamW(alone.parameters(), lr=1e-2))
    torch._dynamo.reset()
    model, compiled, backend = made(inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    averaged = AveragedModel(model, **average)
    evaluated = torch.compile(averaged, backend=backend)
    seen = []

    def behind():
        averaged.update_parameters(model)
        seen.append(model.up.weight.detach().clone())
        averaged.eval()
        with torch.no_grad():
            evaluated(batches()[0])

    assert torch.equal(train(model, compiled, optimizer, behind), expected)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    weights = torch.stack(seen).double()
    mean = (torch.tensor(shares, dtype=torch.float64)[:, None, None] * weights).sum(0)
    torch.testing.assert_close(averaged.module.up.weight.double(), mean, rtol=1e-5, atol=1e-7)
    update_bn(batches(), evaluated)
    averaged.eval()
    x = torch.randn(5, 40)
    with torch.no_grad():
        torch.testing.assert_close(evaluated(x), cast_outputs(averaged.module, x), rtol=1e-5, atol=1e-6)
    backend.export(averaged.module, tmp_path / "out")
    loaded = gws_compile.load_export(tmp_path / "out")
    for name in ("up.weight", "down.weight"):
        cast = gws_compile.quantize(averaged.module.get_parameter(name).detach(), FMT)
        assert torch.equal(loaded[name].float(), cast)


def test_averages_over_a_schedule_of_rates():
    """SWA's own schedule and optimizer: one draw for each step of the trained model."""
    model, compiled, backend = made("eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged, rates = AveragedModel(model), SWALR(optimizer, swa_lr=0.05)
    evaluated = torch.compile(averaged, backend=backend)

    def behind():
        averaged.update_parameters(model)
        rates.step()
        with torch.no_grad():
            evaluated(batches()[0])

    train(model, compiled, optimizer, behind)
    assert backend.state_dict()["step"] == STEPS
    assert [row.name for row in backend.report()] == ["up.weight", "down.weight", "up.weight#1", "down.weight#1"]


@pytest.mark.parametrize("inner", ["inductor", "eager"])
def test_lookahead(inner):
    """The weights of each draw are those in the model, also behind a step that has put the slow ones back."""
    model, compiled, backend = made(inner)
    lookahead = Lookahead(torch.optim.SGD(model.parameters(), lr=0.05))
    for step, x in enumerate(batches()):
        oracle = copy.deepcopy(model)
        with torch.no_grad():
            for name in ("up.weight", "down.weight"):
                weight = oracle.get_parameter(name)
                weight.copy_(gws_compile.sample(weight, FMT, name=name, step=step))
        expected = oracle(x).square().mean()
        expected.backward()
        loss = compiled(x).square().mean()
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, oracle.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
        lookahead.step()
        lookahead.zero_grad()
    assert backend.state_dict()["step"] == STEPS
