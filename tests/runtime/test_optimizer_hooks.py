"""What follows the optimizers of the process."""

import gc
import weakref

import pytest
import torch
from torch import nn

from gws_compile.runtime import optimizer_hooks
from gws_compile.runtime.optimizer_hooks import after_each_step, before_each_step
from gws_compile.runtime.step_rounds import StepRounds


class Observer:
    def __init__(self, act=lambda: None):
        self.seen, self.act = [], act
        after_each_step(self, Observer.stepped)

    def stepped(self, optimizer):
        self.seen.append(optimizer)
        self.act()


def optimizer_of(model, **settings):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return torch.optim.SGD(model.parameters(), lr=0.1, **settings)


def test_an_observer_that_is_collected_while_an_optimizer_steps():
    """Garbage is collected at any time: a backend that has gone, in a cycle, must not stop the training of another."""
    first, gone, last = Observer(gc.collect), Observer(), Observer()
    gone.itself, alive = gone, weakref.ref(gone)
    optimizer = optimizer_of(nn.Linear(2, 2))
    gc.collect()
    gc.disable()
    try:
        del gone
        assert alive() is not None
        optimizer.step()
    finally:
        gc.enable()
    assert alive() is None
    optimizer.step()
    assert first.seen == last.seen == [optimizer] * 2


def test_observers_that_have_gone_leave_nothing_behind():
    optimizer = optimizer_of(nn.Linear(2, 2))
    gc.collect()
    optimizer.step()
    before = len(optimizer_hooks.after)
    observers = [Observer() for _ in range(3)]
    optimizer.step()
    assert len(optimizer_hooks.after) == before + 3
    del observers
    optimizer.step()
    assert len(optimizer_hooks.after) == before


def test_before_a_step_the_gradients_are_those_of_backward():
    """Not before a step with a closure, which computes them inside."""

    class Watcher:
        def __init__(self):
            self.before, self.after = [], []
            before_each_step(self, lambda watcher, optimizer: watcher.before.append(gradient(optimizer)))
            after_each_step(self, lambda watcher, optimizer: watcher.after.append(gradient(optimizer)))

    def gradient(optimizer):
        return optimizer.param_groups[0]["params"][0].grad.sum().item()

    class Overwriting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.zero_()

    watcher, model = Watcher(), nn.Linear(2, 2)
    optimizer = Overwriting(model.parameters(), lr=0.1)
    for closure in ((), (lambda: None,)):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(*closure)
    assert (watcher.before, watcher.after) == ([4.0], [0.0, 0.0])


@pytest.mark.parametrize(
    ("steps", "begins"),
    [
        ("aaa", "yyy"),
        ("abab", "ynyn"),
        ("abcabc", "ynnynn"),
        ("aab", "yyn"),  # a critic's steps, and then the generator's
        ("aabaab", "yynyyn"),
        ("ba", "yn"),
    ],
)
def test_a_training_step_begins_with_an_optimizer_that_has_stepped_in_it(steps, begins):
    optimizers = {name: optimizer_of(nn.Linear(2, 2)) for name in "abc"}
    rounds = StepRounds()
    assert "".join("ny"[rounds.begins_with(optimizers[name])] for name in steps) == begins


def test_an_optimizer_that_has_gone_ends_no_training_step():
    rounds, kept = StepRounds(), optimizer_of(nn.Linear(2, 2))
    assert rounds.begins_with(optimizer_of(nn.Linear(2, 2)))
    gc.collect()
    assert rounds.begins_with(kept)
    assert rounds.begins_with(kept)
