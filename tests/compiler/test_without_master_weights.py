"""``master=False``: parameters lie on their grids between steps."""

import re

import pytest
import torch
from support.small_models import NetWithHead, OneLayer, TwoBlocks
from torch import nn
from torch.func import functional_call

import gws_compile
from gws_compile.config import Config
from gws_compile.numerics.keys import key_words
from gws_compile.ops.write_grid import write_to_grid

FORMATS = {
    "fp8_e4m3": {},
    "int4": {"block": (1, 16)},
    "int2": {"block": (None, None)},
    "nvfp4": {},
    "mxfp4": {"scale": "ceil"},
    "bf16": {},
}


def backend(fmt="int4", **settings):
    torch._dynamo.reset()
    return gws_compile.backend(fmt, **{"inner": "aot_eager", "master": False, **settings})


def batch(step):
    return torch.randn(8, 40, generator=torch.Generator().manual_seed(step))


def train(call, optimizer, steps, after=lambda step: None):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = (call(batch(step)) - batch(step)).square().mean()
        loss.backward()
        optimizer.step()
        after(step)
        losses.append(loss.item())
    return losses


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, cast):
        return cast

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_run_is_the_eager_run_with_its_parameters_rounded(fmt):
    """The unmodified model, its weights cast by the reference and written behind each step, bit for bit."""
    given = FORMATS[fmt]
    torch.manual_seed(0)
    model, reference = NetWithHead("out", 40), NetWithHead("out", 40)
    reference.load_state_dict(model.state_dict())
    config = Config.make(fmt, noise="none", **given)
    names = ("up.weight", "down.weight")  # out is excluded

    def call(x):
        weights = {
            name: StraightThrough.apply(p, gws_compile.quantize(p, fmt, given.get("block"), given.get("scale", "auto")))
            for name, p in reference.named_parameters()
            if name in names
        }
        return functional_call(reference, weights, x)

    def write(step):
        for name, p in reference.named_parameters():
            if name in names:
                key = torch.tensor(key_words(7, name), dtype=torch.int32)
                clock = torch.tensor([step + 1, 0, 0, 0, 0], dtype=torch.int32)
                with torch.no_grad():
                    p.copy_(write_to_grid(p, config.sample_spec(p.dtype), 0, config.block, key, clock))

    pqt = backend(fmt, seed=7, exclude="out.*", **given)
    compiled = torch.compile(model, backend=pqt)

    def check(step):
        for name, p in model.named_parameters():
            cast = gws_compile.quantize(p, fmt, given.get("block"), given.get("scale", "auto"))
            if p.ndim == 2 and name in names:
                assert torch.equal(cast, p), (step, name)
            elif p.ndim == 2:
                assert not torch.equal(cast, p), name

    losses = train(compiled, torch.optim.AdamW(model.parameters(), 0.01), range(6), check)
    assert losses == train(call, torch.optim.AdamW(reference.parameters(), 0.01), range(6), write)
    assert all(map(torch.equal, model.parameters(), reference.parameters()))
    assert all(metrics.exact == 1 for metrics in pqt.metrics().values())


@pytest.mark.parametrize("fmt", FORMATS)
def test_idle_steps_move_nothing(fmt):
    """Neither values nor, with them, the scales; with new words in each step, where the paper's scale would shrink."""
    torch.manual_seed(0)
    model, pqt = OneLayer(), backend(fmt, inner="eager", **FORMATS[fmt])
    compiled = torch.compile(model, backend=pqt)
    train(compiled, torch.optim.SGD(model.parameters(), 0.1), range(3))
    before = [p.clone() for p in model.parameters()]
    steps = 1000 if fmt == "int4" else 30
    for _ in range(steps):
        with torch.no_grad():
            compiled(batch(0))
        compiled(batch(0))
        pqt.step()
    assert pqt.draw == steps + 3
    assert all(map(torch.equal, before, model.parameters()))


class Ramp(nn.Module):
    """A weight, and one element more that keeps the scale where it is; its gradient is 1, but for that element."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((64, 32), 8.0))
        with torch.no_grad():
            self.weight[:, 0] = 64.0

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("rounding", [pytest.param("nearest", marks=pytest.mark.slow), "stochastic"])
def test_small_updates_stall_when_rounded_to_nearest_and_drift_when_rounded_by_chance(rounding):
    """200 updates of a twentieth of a step: the mean moves by 10 steps, as the sum of as many coin throws does."""
    model = Ramp()
    pqt = backend("int8", inner="eager", scale="floor", block=(1, None), master=rounding == "nearest", noise="none")
    compiled = torch.compile(model, backend=pqt)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    upstream = torch.full((64, 32), -0.05)
    upstream[:, 0] = 0
    steps = 200
    for _ in range(steps):
        (compiled(torch.eye(64)) * upstream).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if rounding == "nearest":
            with torch.no_grad():
                model.weight.copy_(gws_compile.quantize(model.weight, "int8", (1, None), "floor"))
    moved = (model.weight.detach()[:, 1:] - 8.0).double()
    assert torch.equal(moved, moved.round())
    if rounding == "nearest":
        assert not moved.any()
        return
    variance = steps * 0.05 * 0.95
    assert abs(moved.mean() - 10) < 5 * (variance / moved.numel()) ** 0.5
    assert moved.var() == pytest.approx(variance, rel=5 * (2 / moved.numel()) ** 0.5)


def test_the_maximum_of_a_block_grows_past_where_its_scale_saturates():
    """With "floor" from 448 X to 512 X in updates of an eighth of that: rounded to nearest it would never get there."""
    model = OneLayer(32, 32, bias=False)
    with torch.no_grad():
        model.fc.weight.fill_(448.0)
    pqt = backend("fp8_e4m3", inner="eager")
    compiled = torch.compile(model, backend=pqt)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(16):
        (compiled(torch.eye(32)) * -8.0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = model.fc.weight.detach().double().mean() - 448
    # In each step an element goes 64, or 32 later on, with chances that make 8 of it.
    assert abs(moved - 128) < 5 * (16 * 8 * 64 / 1024) ** 0.5


def test_a_resumed_run_continues_bit_for_bit():
    def start():
        torch.manual_seed(0)
        model, pqt = TwoBlocks(), backend(seed=3)
        return model, pqt, torch.compile(model, backend=pqt), torch.optim.AdamW(model.parameters(), 0.01)

    model, _, compiled, optimizer = start()
    whole = train(compiled, optimizer, range(6))
    half, half_pqt, half_compiled, half_optimizer = start()
    first = train(half_compiled, half_optimizer, range(3))
    saved = [{k: v.clone() for k, v in half.state_dict().items()}, half_optimizer.state_dict(), half_pqt.state_dict()]
    assert saved[2]["master"] == 0
    assert [name for name, _ in saved[2]["weights"]] == [n for n, p in half.named_parameters() if p.ndim == 2]
    again, again_pqt, again_compiled, again_optimizer = start()
    again.load_state_dict(saved[0])
    again_optimizer.load_state_dict(saved[1])
    again_pqt.load_state_dict(saved[2])
    assert first + train(again_compiled, again_optimizer, range(3, 6)) == whole
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_what_no_optimizer_holds_and_what_is_frozen_stays():
    torch.manual_seed(0)
    model, pqt = TwoBlocks(), backend(fmt="int3")
    model.first.up.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    compiled = torch.compile(model, backend=pqt)
    train(compiled, torch.optim.SGD(model.second.parameters(), 0.1), range(2))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("first."), name
        if p.ndim == 2 and name.startswith("second."):
            assert torch.equal(gws_compile.quantize(p, "int3"), p)
    pqt.step()  # of an update loop of one's own: all that is trained
    assert torch.equal(gws_compile.quantize(model.first.down.weight, "int3"), model.first.down.weight)
    assert torch.equal(model.first.up.weight, before["first.up.weight"])


def test_an_optimizer_that_checkpointing_initializes_writes_nothing():
    """``torch.distributed.checkpoint.state_dict`` fills a fresh optimizer's state by a step of its own."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, pqt = OneLayer(), backend()
    pqt.prepare(model, batch(0))
    before = model.fc.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters())
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state  # it did step
    assert torch.equal(model.fc.weight, before)
    train(torch.compile(model, backend=pqt), optimizer, range(1))
    assert torch.equal(gws_compile.quantize(model.fc.weight, "int4"), model.fc.weight)


def test_two_optimizers_write_each_its_own_with_the_same_words():
    def run(split):
        torch.manual_seed(0)
        model = TwoBlocks()
        compiled = torch.compile(model, backend=backend())
        parts = (model.first, model.second) if split else (model,)
        optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in parts]
        for step in range(4):
            (compiled(batch(step)) - batch(step)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return list(model.parameters())

    assert all(map(torch.equal, run(split=True), run(split=False)))


def test_evaluation_sees_the_parameters_themselves():
    torch.manual_seed(0)
    model, pqt = OneLayer(bias=False), backend("fp6_e3m2")
    compiled = torch.compile(model, backend=pqt)
    train(compiled, torch.optim.SGD(model.parameters(), 0.1), range(2))
    with torch.no_grad():
        assert torch.equal(compiled(torch.eye(40)), model.fc.weight.t())
    assert torch.equal(compiled(torch.eye(40)).detach(), model.fc.weight.t())


class Mixed(nn.Module):
    """A convolution in channels-last memory, matrices of experts, and a weight that is stored (in, out)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.experts = nn.Parameter(0.1 * torch.randn(4, 18, 40))
        self.stored = nn.Parameter(0.1 * torch.randn(40, 24))

    def forward(self, x):
        y = self.conv(x).flatten(2)[:, :4, :18].transpose(0, 1)
        return torch.bmm(y, self.experts) @ self.stored


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_convolutions_and_experts_are_written_in_their_own_blocks(inner):
    torch.manual_seed(0)
    model, pqt = Mixed(), backend("int4", block=(4, 16), inner=inner)
    compiled = torch.compile(model, backend=pqt)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(2):
        compiled(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for p in (model.conv.weight, model.experts, model.stored):
            assert torch.equal(gws_compile.quantize(p, "int4", (4, 16)), p)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_sparse_weight_is_its_parameter_where_it_is_kept():
    torch.manual_seed(0)
    model, pqt = OneLayer(bias=False), backend("int4", block=(1, 40), sparsity="2:4")
    compiled = torch.compile(model, backend=pqt)
    train(compiled, torch.optim.SGD(model.parameters(), 0.1), range(3))
    weight = model.fc.weight.detach()
    assert torch.equal(gws_compile.quantize(weight, "int4", (1, 40)), weight)
    # The two largest of four, the first of those that are as large: by a stable sort.
    groups = weight.view(40, 10, 4)
    order = groups.abs().argsort(dim=2, descending=True, stable=True)
    kept = torch.zeros_like(groups).scatter_(2, order[..., :2], 1.0)
    with torch.no_grad():
        assert torch.equal(compiled(torch.eye(40)).t(), (groups * kept).view(40, 40))


def test_a_tied_table_lies_on_the_grid_too():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(64, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.table(x))

    torch.manual_seed(0)
    model, pqt = Tied(), backend("int4", include="*", exclude=None)
    compiled = torch.compile(model, backend=pqt)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    compiled(torch.arange(64)).square().mean().backward()
    optimizer.step()
    assert torch.equal(gws_compile.quantize(model.table.weight, "int4"), model.table.weight)


@pytest.mark.parametrize("fmt", ["fp8_e4m3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("int4", "nvfp4"))])
def test_what_is_compiled_writes_the_same(fmt):
    def written(inner):
        torch.manual_seed(0)
        model = OneLayer(48, 64)
        pqt = backend(fmt, inner=inner, **FORMATS[fmt])
        compiled = torch.compile(model, backend=pqt)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        compiled(torch.ones(2, 64)).sum().backward()
        optimizer.step()
        return model.fc.weight

    assert torch.equal(written("inductor"), written("eager"))


def test_the_state_of_another_kind_is_refused():
    with_master, without = backend(master=True), backend()
    for saved, loaded, message in (
        (with_master.state_dict(), without, "saved with master=True, this backend has master=False"),
        (without.state_dict(), with_master, "saved with master=False, this backend has master=True"),
        ({**without.state_dict(), "master": 2}, without, "the state's master must be 0 or 1, got 2"),
    ):
        saved["fmt"] = loaded.state_dict()["fmt"]
        with pytest.raises(ValueError, match=re.escape(message)):
            loaded.load_state_dict(saved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"master": "no"}, "master must be True or False, got 'no'"),
        ({"noise": "uniform"}, "noise must be 'none', or left out, got 'uniform'"),
        (
            {"rules": [("*.up.*", {"noise": "rounded_normal"})]},
            "noise must be 'none', or left out, got 'rounded_normal'",
        ),
        (
            {"sparsity": gws_compile.PrunedGroups(0.5)},
            "with master=False sparsity must be 'N:M' or None, got 'rows:0.5'",
        ),
        ({"fmt": gws_compile.Levels((-1.0, 0.0, 1.0))}, "with master=False fmt must be a format, got levels3"),
        ({"bits": gws_compile.LearnedBits()}, "bits=LearnedBits(...) learns from the noise: noise must not be 'none'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        backend(**{"fmt": None, **settings})
