"""One run of a training function, each of its losses held to an eager model that is not compiled."""

import copy

import pytest
import torch
from support.small_models import Net

import gws_compile
from gws_compile.comparison.compared_settings import ComparedSetting
from gws_compile.comparison.training import train_and_measure
from gws_compile.config import Config

pytestmark = pytest.mark.usefixtures("fresh")

STEPS = 4
GRIDS = {"int3": Config.make("int3"), "fp6_e3m2": Config.make("fp6_e3m2")}


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 40, generator=generator) for _ in range(STEPS + 1)]


def loss_of(model, x):
    return (model(x) - x.roll(1, 1)).square().mean()


def train(backend, seed, *, lr=0.1, made=None):
    """Made for a comparison; ``made`` takes the model and the draw behind training."""
    torch.manual_seed(seed)
    model = torch.compile(Net(), backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    *batches, held_out = data(seed)
    for x in batches:
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    if made is not None:
        made += [copy.deepcopy(model._orig_mod), backend.draw]
    return model, lambda: loss_of(model, held_out).item(), {"tokens": 8 * STEPS}


def oracle(seed, weight_of, lr=0.1):
    """The same training in eager code, with a straight-through gradient from ``weight_of(name, weight, step)``."""
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    *batches, held_out = data(seed)
    for step, x in enumerate(batches):
        call(model, x, lambda name, w, step=step: weight_of(name, w, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, held_out


def call(model, x, weight_of):
    """The loss with other values in the places of the weights."""
    named = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    weights = {name: Straight.apply(p, weight_of(name, p.detach())) for name, p in named.items()}
    return loss_of(lambda given: torch.func.functional_call(model, weights, (given,)), x)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def setting(method, **arguments):
    return ComparedSetting("one", method, {"inner": "aot_eager", **arguments})


def test_plain():
    """Trained as it is without this package; each cast is that of the public reference."""
    run = train_and_measure(train, setting("plain", noise="none"), 3, GRIDS, {"lr": 0.05})
    model, x = oracle(3, lambda name, w, step: w, lr=0.05)
    with torch.no_grad():
        plain = loss_of(model, x).item()
        assert run["trained"] == run["deployed"] == run["uncast"] == plain
        for fmt in GRIDS:
            assert run["casts"][fmt] == call(model, x, lambda name, w, fmt=fmt: gws_compile.quantize(w, fmt)).item()
    assert run["params"] == 2 * 40 * 72 + 40 + 72  # no embedding table
    assert run["bytes"] == 2 * 2 * 40 * 72
    assert run["cast_bytes"]["int3"] == 2 * 40 * 72 * 3 // 8 + 4 * 2 * (3 * 2)
    assert run["average_bits"] is None
    assert run["figures"] == {"tokens": 8 * STEPS}


def test_with_noise():
    """Trained form, deployed form and casts of the weights that noise has trained."""
    made = []
    run = train_and_measure(train, setting("", fmt="int3"), 3, GRIDS, {"made": made})
    model, x = oracle(3, lambda name, w, step: gws_compile.sample(w, "int3", name=name, step=step, seed=3))
    for ours, theirs in zip(made[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    draw = made[1]
    assert draw == STEPS
    with torch.no_grad():
        deployed = call(model, x, lambda name, w: gws_compile.quantize(w, "int3")).item()
        noisy = call(model, x, lambda name, w: gws_compile.sample(w, "int3", name=name, step=draw, seed=3)).item()
        assert run["deployed"] == run["casts"]["int3"] == deployed
        assert run["trained"] == noisy
        assert run["uncast"] == loss_of(model, x).item()
        assert run["casts"]["fp6_e3m2"] == call(model, x, lambda name, w: gws_compile.quantize(w, "fp6_e3m2")).item()
    assert run["average_bits"] == 3.0
    assert run["bytes"] == run["cast_bytes"]["int3"]


def test_gradients_disabled_by_the_users_function():
    def careless(backend, seed):
        model, evaluate, figures = train(backend, seed)
        return model, torch.no_grad()(evaluate), figures

    with pytest.warns(gws_compile.GwsWarning, match=r"evaluate\(\) disables gradients itself"):
        run = train_and_measure(careless, setting("", fmt="int3"), 0, GRIDS, {})
    assert run["trained"] is None
    assert run["deployed"] == run["casts"]["int3"]
    with pytest.warns(gws_compile.GwsWarning, match="that of plain training is of eager calls"):
        run = train_and_measure(careless, setting("plain", noise="none"), 0, GRIDS, {})
    assert run["trained"] == run["deployed"] == run["uncast"]
    assert run["deployed"] != run["casts"]["int3"]


def test_a_cast_alone_has_one_form():
    run = train_and_measure(train, setting("", fmt="int3", noise="none"), 0, {}, {})
    assert run["trained"] == run["deployed"]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "got NoneType"),
        ((Net(),), "got tuple"),
        ((Net(), 0.5), r"got \(Net, float\)"),
        ((Net(), float, 3), r"got \(Net, type, int\)"),
    ],
)
def test_what_a_function_must_return(returned, message):
    with pytest.raises(TypeError, match=f"the training function must return .*{message}"):
        train_and_measure(lambda backend, seed: returned, setting("plain", noise="none"), 0, {}, {})


def test_the_mode_of_training_comes_back():
    modes = []

    def evaluate(model):
        modes.append(model.training)
        return 0.5

    def with_modes(backend, seed):
        model, _, _ = train(backend, seed)
        with torch.no_grad():
            model(torch.randn(2, 40))
        modes.append(model)
        return model, lambda: evaluate(model)

    train_and_measure(with_modes, setting("", fmt="int3", noise="none"), 0, {}, {})
    model, *in_evaluation = modes
    assert in_evaluation
    assert not any(in_evaluation)
    assert model.training
