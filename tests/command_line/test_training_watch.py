"""Optimizer steps with no sampled forward before them are told of, with the weights' names; no others are."""

import copy
import gc
import warnings

import pytest
import torch
from support.small_models import Net
from torch import nn

from gws_compile.command_line.training_watch import MANY_PLAIN_STEPS, TrainingWatch
from gws_compile.compiler.backend import Backend
from gws_compile.config import Config
from gws_compile.warning import GwsWarning

CAUSE = "they trained without noise. What is called as a module is compiled: call model(...)"


@pytest.fixture
def watched():
    """Makes a backend, with further settings, and the watch of it."""
    torch._dynamo.reset()
    torch.manual_seed(0)

    def make(**settings):
        backend = Backend(Config.make(**{"fmt": "fp6_e3m2", "inner": "eager", **settings}))
        return backend, TrainingWatch(lambda: [backend], lambda: True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GwsWarning)  # the backend's own, of weights that no graph has
        warnings.filterwarnings("error", ".*had no sampled training forward", GwsWarning)
        yield make
    gc.collect()  # so that it does not see the next test's optimizers


def step(optimizer, call, x=None):
    call(torch.randn(4, 40) if x is None else x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "under no_grad"])
def test_training_by_forward_and_predicting_by_the_model(grad, watched):
    backend, watch = watched()
    model = Net()
    compiled = torch.compile(model, backend=backend)
    optimizer = sgd(model)
    for _ in range(3):
        step(optimizer, model.forward)
    with torch.set_grad_enabled(grad):
        compiled(torch.randn(4, 40))
    (told,) = watch.told()
    assert told.startswith("3 of 3 optimizer steps (SGD of up.weight, down.weight) had no sampled training forward")
    assert CAUSE in told
    step(optimizer, compiled)
    step(optimizer, compiled)
    assert watch.told()[0].startswith("3 of 5 optimizer steps")


def test_a_sampled_start(watched):
    """The compiled model in the first steps, `forward` from then on; and it is said while the script runs."""
    backend, watch = watched(resample="forward")
    model = Net()
    compiled = torch.compile(model, backend=backend)
    optimizer = sgd(model)
    for _ in range(2):
        step(optimizer, compiled)
    for _ in range(MANY_PLAIN_STEPS - 1):
        step(optimizer, model.forward)
    said = rf"{MANY_PLAIN_STEPS} optimizer steps \(SGD of up.weight, down.weight\) one after another had no sampled"
    with pytest.warns(GwsWarning, match=said):
        step(optimizer, model.forward)
    step(optimizer, model.forward)
    assert watch.told()[0].startswith(f"{MANY_PLAIN_STEPS + 1} of {MANY_PLAIN_STEPS + 3} optimizer steps")


def test_a_weight_of_no_module_is_named_by_its_shape(watched):
    _, watch = watched()
    weight = nn.Parameter(torch.randn(40, 3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(2):
        step(optimizer, lambda x: x @ weight)
    assert "(SGD of a weight of 40 x 3)" in watch.told()[0]


@pytest.mark.parametrize("resample", ["step", "forward"])
def test_what_is_trained_through_the_compiled_model(resample, watched):
    """Several optimizers, micro-batches, evaluation in between, and steps whose weights are copies of the model's."""
    backend, watch = watched(resample=resample)
    generator, critic = Net(), Net()
    make, judge = torch.compile(generator, backend=backend), torch.compile(critic, backend=backend)
    masters = [nn.Parameter(p.detach().clone()) for p in critic.parameters()]
    optimizers = [sgd(generator), torch.optim.SGD(masters, lr=0.01)]
    for _ in range(4):
        for _ in range(2):
            judge(make(torch.randn(4, 40))).square().mean().backward()
        for master, parameter in zip(masters, critic.parameters(), strict=True):
            master.grad = parameter.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            make(torch.randn(4, 40))
    assert watch.told() == []


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(40, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.table(x.argmax(1)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(40, 8)

    def forward(self, x):
        return self.rnn(x)[0]


@pytest.mark.parametrize("kind", [Tokens, Recurrent])
def test_what_the_report_accounts_for(kind, watched):
    """Weights that are left alone for a reason of their own, in graphs or outside of them."""
    backend, watch = watched()
    model = kind()
    compiled = torch.compile(model, backend=backend)
    optimizer = sgd(model)
    for _ in range(MANY_PLAIN_STEPS + 1):
        step(optimizer, compiled)
    assert len(backend.report().skipped) >= 1
    assert watch.told() == []


def test_no_noise_is_expected_where_the_settings_say_none(watched):
    backend, watch = watched(noise="none")
    model = Net()
    compiled = torch.compile(model, backend=backend)
    optimizer = sgd(model)
    for call in (model.forward, compiled, compiled):
        step(optimizer, call)
    assert watch.told() == []


def test_a_single_step_and_one_without_gradients(watched):
    """As `torch.distributed.checkpoint` takes them."""
    _, watch = watched()
    model = Net()
    optimizer = sgd(model)
    optimizer.step()
    step(optimizer, model.forward)
    assert watch.told() == []
    watch.begin_process()
    step(optimizer, model.forward)
    assert watch.told() == []
    step(optimizer, copy.copy(model).forward)
    assert len(watch.told()) == 1


def test_an_optimizer_for_each_parameter_is_one_sentence(watched):
    """And one warning, though their fiftieth steps come one after another, inside backward."""
    backend, watch = watched()
    model = Net()
    compiled = torch.compile(model, backend=backend)
    optimizers = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}

    def update(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)

    def train(call, steps):
        for _ in range(steps):
            call(torch.randn(4, 40)).square().mean().backward()

    train(compiled, 3)
    assert watch.told() == []
    train(model.forward, MANY_PLAIN_STEPS - 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model.forward, 2)
    (said,) = [str(w.message) for w in caught if "had no sampled training forward" in str(w.message)]
    (told,) = watch.told()
    assert f"{MANY_PLAIN_STEPS} optimizer steps (SGD of " in said
    assert f"{MANY_PLAIN_STEPS + 1} of {MANY_PLAIN_STEPS + 4} optimizer steps (SGD of " in told
    assert all(name in text for name in ("up.weight", "down.weight") for text in (said, told))
