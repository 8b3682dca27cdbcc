"""Optimizers of other packages beside a compiled model: the run of an eager loop that samples by hand, bit for bit.

The oracle takes its gradients from `gws_compile.sample` and the unmodified model, and steps the same real optimizers.
"""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from support import eager
from support.small_models import TwoBlocks
from torch import nn
from torch.utils.checkpoint import checkpoint

import gws_compile

FMT = "fp4_e2m1"
SAMPLED = [f"{block}.{layer}.weight" for block in ("first", "second") for layer in ("up", "down")]
INNER = 128  # matrices of 5,120 elements: below 4,096 the optimizers keep states of 32 bits
STEPS = 4

pytestmark = pytest.mark.usefixtures("one_thread")


def named(package, name, **settings):
    def make(parameters):
        module = pytest.importorskip(package)
        return [getattr(module, name)(parameters, **settings)]

    return make


def galore(name, **settings):
    """Matrices are projected, by a new projection every second step; vectors are not."""

    def make(parameters):
        module = pytest.importorskip("galore_torch")
        projected = {"rank": 4, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std"}
        groups = [{"params": [p]} | (projected if p.ndim == 2 else {}) for p in parameters]
        return [getattr(module, name)(groups, **settings)]

    return make


def muon(parameters):
    matrices, others = [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]
    if matrices:
        yield torch.optim.Muon(matrices, lr=1e-2)
    if others:
        yield torch.optim.AdamW(others, lr=1e-2)


COMPANIONS = {
    **{
        f"bitsandbytes {name}": named("bitsandbytes.optim", name, lr=1e-2)
        for name in ("AdamW8bit", "Adam8bit", "PagedAdamW8bit", "Lion8bit", "AdEMAMix8bit", "RMSprop8bit", "AdamW")
    },
    "bitsandbytes SGD8bit": named("bitsandbytes.optim", "SGD8bit", lr=1e-2, momentum=0.9),
    **{f"torchao {name}": named("torchao.optim", name, lr=1e-2) for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")},
    "GaLoreAdamW": galore("GaLoreAdamW", lr=1e-2, no_deprecation_warning=True),
    "GaLoreAdafactor": galore("GaLoreAdafactor", lr=1e-2, relative_step=False, scale_parameter=False),
    "GaLoreAdamW8bit": galore("GaLoreAdamW8bit", lr=1e-2),
    "Muon and AdamW": muon,
    **{
        name: named("schedulefree", name, lr=1e-2)
        for name in ("AdamWScheduleFree", "SGDScheduleFree", "AdamWScheduleFreeReference")
    },
    # Its first steps would not move the weights otherwise.
    "RAdamScheduleFree": named("schedulefree", "RAdamScheduleFree", lr=1e-2, silent_sgd_phase=False),
}


@pytest.fixture(autouse=True)
def _without_cuda(monkeypatch):
    """GaLoreAdamW8bit waits for the GPU behind each parameter, whatever device it is on."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def step(optimizers, closure=None):
    # torchao compiles its own step with Inductor, which takes long: here it runs as it was written.
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        for optimizer in optimizers:
            optimizer.step()


def started(optimizers):
    """In the mode of training, where they have one."""
    optimizers = list(optimizers)
    for optimizer in optimizers:
        getattr(optimizer, "train", lambda: None)()
    return optimizers


def models():
    """The same model twice."""
    model, oracle = TwoBlocks(INNER), TwoBlocks(INNER)
    oracle.load_state_dict(model.state_dict())
    return model, oracle


def loss_of(call, x):
    return call(x).square().mean()


def batches(steps=STEPS):
    return [torch.randn(8, 40) for _ in range(steps)]


def oracle_step(oracle, optimizers, x, draw, **settings):
    loss, gradients = eager.gradients(oracle, lambda call: loss_of(call, x), SAMPLED, FMT, draw, **settings)
    for name, parameter in oracle.named_parameters():
        parameter.grad = gradients[name]
    step(optimizers)
    return loss


def train_step(compiled, optimizers, x):
    loss = loss_of(compiled, x)
    loss.backward()
    step(optimizers)
    for optimizer in optimizers:
        optimizer.zero_grad()
    return loss.item()


def assert_same(model, oracle):
    for (name, actual), expected in zip(model.named_parameters(), oracle.parameters(), strict=True):
        assert torch.equal(actual, expected), name


@pytest.mark.parametrize("name", COMPANIONS)
def test_one_optimizer_for_all(name):
    (model, oracle), make = models(), COMPANIONS[name]
    backend = gws_compile.backend(FMT, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    optimizers, others = (started(make(list(m.parameters()))) for m in (model, oracle))
    for draw, x in enumerate(batches()):
        assert train_step(compiled, optimizers, x) == oracle_step(oracle, others, x, draw)
        assert_same(model, oracle)
    assert backend.state_dict()["step"] == STEPS
    assert [record.name for record in backend.report().rewritten] == SAMPLED


def step_in_hooks(make, model, stepped):
    """An optimizer, or more, for each parameter, which steps as soon as backward has its gradient."""
    optimizers = {p: started(make([p])) for p in model.parameters()}
    names = {p: name for name, p in model.named_parameters()}

    def hook(parameter):
        step(optimizers[parameter])
        parameter.grad = None
        stepped.append(names[parameter])

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)


def whole(model, backend, run):
    return torch.compile(model, backend=backend)


def block_by_block(model, backend, run):
    model.first.compile(backend=backend)
    model.second.compile(backend=backend)
    return model


def checkpointed(reentrant):
    class Checkpointed(nn.Module):
        """The blocks of a model, each of which backward computes again; ``run`` notes when."""

        def __init__(self, model, run):
            super().__init__()
            self.first, self.second, self.run = model.first, model.second, run

        def forward(self, x):
            def first(x):
                self.run.append("first")
                return self.first(x)

            # The first block's input needs a gradient, or a re-entrant checkpoint has nothing to differentiate.
            x = checkpoint(first, x.clone().requires_grad_(), use_reentrant=reentrant)
            return checkpoint(self.second, x, use_reentrant=reentrant)

    return lambda model, backend, run: Checkpointed(block_by_block(model, backend, run), run)


WAYS = {
    "whole": whole,
    "block by block": block_by_block,
    "checkpoints": checkpointed(reentrant=False),
    "re-entrant checkpoints": checkpointed(reentrant=True),
}
SECOND = ["second.up.weight", "second.up.bias", "second.down.weight", "second.down.bias"]


def check_steps_in_hooks(make, way, **settings):
    model, oracle = models()
    backend = gws_compile.backend(FMT, inner="aot_eager", **settings)
    run = []  # what has stepped, and when the first block was called
    call = WAYS[way](model, backend, run)
    step_in_hooks(make, model, run)
    others = [one for p in oracle.parameters() for one in started(make([p]))]
    for draw, x in enumerate(batches()):
        run.clear()
        loss = loss_of(call, x)
        loss.backward()
        assert loss.item() == oracle_step(oracle, others, x, draw)
        assert_same(model, oracle)
        assert backend.state_dict()["step"] == draw + 1
        if "checkpoints" in way:
            assert run[0] == run[5] == "first"  # once more behind the steps of the second block
            assert set(run[1:5]) == set(SECOND)


@pytest.mark.parametrize("backward", ["save", "recompute"])
@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_for_each_parameter_steps_inside_backward(way, backward):
    """GaLore's way of training with the gradient of one layer at a time.

    Blocks that backward comes to later have the draw of their forward, also where they are computed again.
    """
    check_steps_in_hooks(COMPANIONS["GaLoreAdamW"], way, backward=backward)


@pytest.mark.parametrize("name", ["bitsandbytes AdamW8bit", "GaLoreAdamW8bit", "Muon and AdamW", "AdamWScheduleFree"])
def test_other_optimizers_step_inside_backward(name):
    check_steps_in_hooks(COMPANIONS[name], "checkpoints")


@pytest.mark.parametrize("name", COMPANIONS)
def test_a_resumed_run_goes_on_bit_for_bit(name):
    """Behind two steps, through `torch.save`: model, optimizers and backend. Schedule-free is saved in eval mode."""
    make, data = COMPANIONS[name], batches()

    def start():
        torch._dynamo.reset()
        torch.manual_seed(3)
        model, backend = TwoBlocks(INNER), gws_compile.backend(FMT, inner="eager")
        optimizers = started(make(list(model.parameters())))
        return model, backend, torch.compile(model, backend=backend), optimizers

    def switch(optimizers, mode):
        for optimizer in optimizers:
            getattr(optimizer, mode, lambda: None)()

    model, backend, compiled, optimizers = start()
    for x in data[:2]:
        train_step(compiled, optimizers, x)
    switch(optimizers, "eval")
    file = io.BytesIO()
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"model": model.state_dict(), "optimizers": states, "pqt": backend.state_dict()}, file)
    switch(optimizers, "train")
    losses = [train_step(compiled, optimizers, x) for x in data[2:]]

    resumed, backend, compiled, optimizers = start()
    with torch.no_grad():  # nothing of the first run is there by chance
        for parameter in resumed.parameters():
            parameter.zero_()
    file.seek(0)
    saved = torch.load(file, weights_only=False)  # GaLore's projectors are objects
    resumed.load_state_dict(saved["model"])
    backend.load_state_dict(saved["pqt"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    switch(optimizers, "train")
    assert [train_step(compiled, optimizers, x) for x in data[2:]] == losses
    assert_same(resumed, model)
    assert backend.state_dict()["step"] == STEPS


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree", "wrapper"])
def test_schedule_free_weights_are_evaluated_in_eval_mode(name):
    """The compiled model casts the averages under `eval()`, and trains on at the point that `train()` goes back to."""
    schedulefree = pytest.importorskip("schedulefree")

    def make(parameters):
        if name == "wrapper":  # no torch.optim.Optimizer: its inner one is followed
            return [schedulefree.ScheduleFreeWrapper(torch.optim.SGD(parameters, lr=1e-2), momentum=0.9)]
        return COMPANIONS[name](parameters)

    model, oracle = models()
    backend = gws_compile.backend(FMT, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    optimizers, others = (started(make(list(m.parameters()))) for m in (model, oracle))
    held_out = torch.randn(8, 40)
    for draw, x in enumerate(batches()):
        assert train_step(compiled, optimizers, x) == oracle_step(oracle, others, x, draw)
        trained = oracle.first.up.weight.clone()
        for optimizer in (*optimizers, *others):
            optimizer.eval()
        with torch.no_grad():
            cast = {n: gws_compile.quantize(p, FMT) for n, p in oracle.named_parameters() if n in SAMPLED}
            expected = torch.func.functional_call(oracle, cast, held_out)
            assert torch.equal(compiled(held_out), expected)
        if draw:
            assert not torch.equal(oracle.first.up.weight, trained)
        for optimizer in (*optimizers, *others):
            optimizer.train()
        assert_same(model, oracle)
    assert backend.state_dict()["step"] == STEPS


@pytest.mark.parametrize("name", ["AdamWScheduleFreeClosure", "SGDScheduleFreeClosure"])
def test_a_closure_is_evaluated_at_the_weights_that_the_optimizer_puts_there(name):
    model, oracle = models()
    make = named("schedulefree", name, lr=1e-2)
    backend = gws_compile.backend(FMT, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    (optimizer,), (other,) = make(model.parameters()), make(oracle.parameters())
    for draw, x in enumerate(batches()):

        def closure(x=x):
            optimizer.zero_grad()
            loss = loss_of(compiled, x)
            loss.backward()
            return loss

        def by_hand(x=x, draw=draw):
            loss, gradients = eager.gradients(oracle, lambda call: loss_of(call, x), SAMPLED, FMT, draw)
            for name, parameter in oracle.named_parameters():
                parameter.grad = gradients[name]
            return loss

        assert optimizer.step(closure).item() == other.step(by_hand)
        assert_same(model, oracle)
    assert backend.state_dict()["step"] == STEPS


@pytest.mark.parametrize("name", ["GaLoreAdamW8bit", "bitsandbytes AdamW8bit", "AdamWScheduleFree"])
def test_new_storage_for_a_parameter_changes_no_name_draw_or_width(name):
    """Learned widths: the run whose parameters are put back into their first storage behind every step."""

    def run(put_back):
        torch._dynamo.reset()
        torch.manual_seed(5)
        model = TwoBlocks(INNER)
        bits = gws_compile.LearnedBits(average=5.0)
        backend = gws_compile.backend(bits=bits, inner="aot_eager")
        compiled = torch.compile(model, backend=backend)
        backend.prepare(model, torch.randn(8, 40))
        optimizers = started(COMPANIONS[name](list(model.parameters())))
        widths = torch.optim.Adam(backend.parameters(), lr=0.1)
        first, losses = {p: p.data for p in model.parameters()}, []
        for _ in range(STEPS):
            loss = loss_of(compiled, torch.randn(8, 40))
            (loss + backend.bit_loss()).backward()
            step(optimizers)
            widths.step()
            losses.append(loss.item())
            for one in (*optimizers, widths):
                one.zero_grad()
            if put_back:
                for parameter, data in first.items():
                    data.copy_(parameter.detach())
                    parameter.data = data
        moved = sum(p.data_ptr() != data.data_ptr() for p, data in first.items())
        return losses, list(model.parameters()), backend.bits(), backend.state_dict(), moved

    losses, parameters, bits, state, moved = run(put_back=False)
    same = run(put_back=True)
    assert moved == (4 if name == "GaLoreAdamW8bit" else 0)
    assert same[0] == losses
    assert all(map(torch.equal, same[1], parameters))
    assert list(same[2]) == list(bits) == SAMPLED
    assert all(torch.equal(same[2][weight], bits[weight]) for weight in SAMPLED)
    assert all((width != 5.0).all() for width in bits.values())  # learned
    assert state["step"] == same[3]["step"] == STEPS
    assert state["weights"] == same[3]["weights"]


def test_the_average_of_learned_widths_is_led_by_gradients_that_schedule_free_overwrites():
    """The scale of the term is the size of the gradient that backward gave, as with an optimizer that keeps it."""
    schedulefree = pytest.importorskip("schedulefree")

    def state(make):
        torch._dynamo.reset()
        torch.manual_seed(5)
        model = TwoBlocks(INNER)
        backend = gws_compile.backend(bits=gws_compile.LearnedBits(average=5.0), inner="eager")
        compiled = torch.compile(model, backend=backend)
        backend.prepare(model, torch.randn(8, 40))
        (optimizer,) = started([make(list(backend.parameters()))])
        (loss_of(compiled, torch.randn(8, 40)) + backend.bit_loss()).backward()
        size = sum(p.grad.double().abs().sum().item() for p in backend.parameters())
        optimizer.step()
        overwritten = sum(p.grad.double().abs().sum().item() for p in backend.parameters()) != size
        return backend.state_dict()["steering"], size, overwritten

    kept, size, overwritten = state(lambda parameters: torch.optim.Adam(parameters, lr=0.02))
    assert not overwritten
    found, same_size, overwritten = state(lambda parameters: schedulefree.AdamWScheduleFree(parameters, lr=0.02))
    assert overwritten
    assert same_size == size > 0
    assert torch.equal(found["scale"], kept["scale"])
    assert kept["scale"].item() == pytest.approx(size / gws_compile.LearnedBits().rule.slope, rel=1e-5)


def test_an_optimizer_that_is_none_of_torchs_is_served_by_step():
    """A class of its own is not seen: `Backend.step` draws anew, and without it the usual warning comes."""

    class Own:
        def __init__(self, parameters):
            self.parameters = list(parameters)

        def step(self):
            with torch.no_grad():
                for parameter in self.parameters:
                    parameter.sub_(parameter.grad, alpha=1e-2)
                    parameter.grad = None

    model, oracle = models()
    backend = gws_compile.backend(FMT, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    optimizer = Own(model.parameters())
    others = [torch.optim.SGD(oracle.parameters(), lr=1e-2)]
    for draw, x in enumerate(batches()):
        loss = loss_of(compiled, x)
        loss.backward()
        optimizer.step()
        backend.step()
        assert loss.item() == oracle_step(oracle, others, x, draw)
        assert_same(model, oracle)
