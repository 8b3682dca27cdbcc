"""Learned widths where one training step is the steps of several optimizers: as with one for all, bit for bit."""

import warnings

import pytest
import torch
from support.small_models import Net
from torch import nn

import gws_compile
from gws_compile import LearnedBits

pytestmark = pytest.mark.usefixtures("fresh", "one_thread")

STEPS = 12


def after_backward(model, widths):
    optimizer = torch.optim.Adam([*model.parameters(), *widths], lr=0.02)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    return step


def one_for_the_widths(model, widths):
    """The weights' optimizers step inside backward, that of the widths behind it."""
    in_hooks(model.parameters())
    optimizer = torch.optim.Adam(widths, lr=0.02)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    return step


def all_in_hooks(model, widths):
    in_hooks([*model.parameters(), *widths])
    return lambda: None


def two_for_the_widths(model, widths):
    optimizers = [torch.optim.Adam(several, lr=0.02) for several in (model.parameters(), widths[:1], widths[1:])]

    def step():
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # in place: a gradient that is kept has to be a copy

    return step


def in_hooks(parameters):
    optimizers = {p: torch.optim.Adam([p], lr=0.02) for p in parameters}

    def step(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)


def run(how, *, held=slice(None)):
    """Losses, parameters and the backend's state of a short run; ``held``: which widths have an optimizer."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(*(Net(40) for _ in range(4)))  # more parameters than the warning waits for steps
    backend = gws_compile.backend(bits=LearnedBits(average=4.5), inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    backend.prepare(model, torch.randn(8, 40))
    step, losses = how(model, list(backend.parameters())[held]), []
    for _ in range(STEPS):
        loss = compiled(torch.randn(8, 40)).square().mean()
        (loss + backend.bit_loss()).backward()
        step()
        losses.append(loss.item())
    return losses, list(model.parameters()), backend


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert all(map(torch.equal, found[1], expected[1]))
    ours, theirs = found[2].state_dict(), expected[2].state_dict()
    assert ours["step"] == theirs["step"] == STEPS
    for part in ("bits", "steering"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])
    assert ours["steering"]["multiplier"] != 0


@pytest.mark.parametrize("how", [one_for_the_widths, all_in_hooks, two_for_the_widths])
def test_the_multiplier_moves_once_in_a_training_step(how):
    with warnings.catch_warnings():
        warnings.simplefilter("error", gws_compile.GwsWarning)  # nor does a width seem to be held by none
        assert_same(run(how), run(after_backward))


def test_a_width_that_no_optimizer_holds_delays_nothing_for_good():
    """Its gradient, which nobody takes away, is summed; the multiplier moves once for each step of the others."""
    with pytest.warns(gws_compile.GwsWarning, match=r"10 optimizer steps, and no optimizer has .* 3.down.weight,"):
        losses, _, backend = run(all_in_hooks, held=slice(7))
    assert len(losses) == STEPS
    assert backend.state_dict()["steering"]["multiplier"] == pytest.approx(STEPS * 0.02)  # at most 0.02 at once


def test_another_model_in_training_is_no_reason_to_warn():
    """Gradients that came once, and are left, are of no training; gradients that go on coming are."""
    model, other = Net(40), nn.Linear(4, 4)
    backend = gws_compile.backend(bits=LearnedBits(average=4.5), inner="aot_eager")
    compiled, x = torch.compile(model, backend=backend), torch.randn(8, 40)
    backend.prepare(model, x)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)

    def train():
        other(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error", gws_compile.GwsWarning)
        for _ in range(3):
            compiled(x).square().mean().backward()
            for _ in range(5):
                train()
        for _ in range(6):
            compiled(x).square().mean().backward()
            train()
    compiled(x).square().mean().backward()
    with pytest.warns(gws_compile.GwsWarning, match="10 optimizer steps, and no optimizer has the bit widths of"):
        train()
