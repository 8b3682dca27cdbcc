"""``torch.compile(optimizer.step, backend=...)``: updates of 16-bit parameters in float32, written by chance."""

import copy
import warnings

import pytest
import torch
from support.small_models import OneLayer
from torch import nn

import gws_compile

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 1e-3}),
    "SGD, momentum": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Adam, amsgrad": (torch.optim.Adam, {"lr": 1e-3, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3}),
    "AdamW, foreach": (torch.optim.AdamW, {"lr": 1e-3, "foreach": True}),
    "AdamW, unfused": (torch.optim.AdamW, {"lr": 1e-3, "fused": False, "maximize": True}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 1e-2, "eps": (1e-7, 1e-3)}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "NAdam": (torch.optim.NAdam, {"lr": 1e-3}),
    "Adamax, foreach": (torch.optim.Adamax, {"lr": 1e-3, "foreach": True}),
}
DTYPES = (torch.bfloat16, torch.float16)


def parameters(dtype, sides=((40, 32), (32,), (3, 5, 2))):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(side).to(dtype)) for side in sides]


def with_gradients(given, step):
    torch.manual_seed(100 + step)
    for p in given:
        p.grad = (0.01 * torch.randn(p.shape)).to(torch.bfloat16).to(p.dtype)


def neighbours(value, dtype):
    """The values of a 16-bit dtype below and above float32 values, equal where one is there: found by stepping."""
    near = value.to(dtype)
    below, above = (torch.nextafter(near, torch.full_like(near, to)) for to in (-torch.inf, torch.inf))
    return torch.where(near.float() > value, below, near), torch.where(near.float() < value, above, near)


@pytest.fixture
def scalars():
    """Adafactor asks for numbers in the middle of its step, which Dynamo traces where it is told to."""
    before = torch._dynamo.config.capture_scalar_outputs
    torch._dynamo.config.capture_scalar_outputs = True
    yield
    torch._dynamo.config.capture_scalar_outputs = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_written_is_next_to_the_float32_update(name, dtype, reset, scalars):
    """For parameters and state: of the same optimizer on float32 copies of everything, in each of three steps."""
    kind, given = OPTIMIZERS[name]
    narrow = parameters(dtype)
    optimizer = kind(narrow, **given)
    step = torch.compile(optimizer.step, backend=gws_compile.backend(inner="aot_eager"))
    for number in range(3):
        wide = [nn.Parameter(p.detach().float()) for p in narrow]
        reference = kind(wide, **given)
        reference.load_state_dict(
            copy.deepcopy(optimizer.state_dict())
        )  # which widens the state to the parameters' dtype
        with_gradients(narrow, number)
        for p, q in zip(narrow, wide, strict=True):
            q.grad = p.grad.float()
        step()
        torch.compile(reference.step, backend="aot_eager")()
        written = [*narrow, *(v for s in optimizer.state.values() for v in s.values() if v.dtype == dtype)]
        exact = [
            *wide,
            *(v for s in reference.state.values() for v in s.values() if v.ndim or v.dtype != torch.float32),
        ]
        exact = [v for v in exact if v.numel() > 1]
        written = [v for v in written if v.numel() > 1]
        assert len(written) == len(exact)
        for value, of_float32 in zip(written, exact, strict=True):
            assert value.dtype == dtype
            low, high = neighbours(of_float32, dtype)
            assert ((value == low) | (value == high)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_update_is_the_mean(dtype, reset):
    """Of 100,000 elements that are all moved from 1 by a tenth of the step between neighbours there."""
    weight = nn.Parameter(torch.ones(400, 250, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    step = torch.compile(optimizer.step, backend=gws_compile.backend(inner="aot_eager"))
    spacing = torch.finfo(dtype).eps
    weight.grad = torch.full_like(weight, -0.1 * spacing)
    up = -weight.grad.double().mean() / spacing
    step()
    moved = (weight.detach().double() - 1) / spacing
    assert torch.equal(moved, moved.round())
    assert abs(moved.mean() - up) < 5 * (up * (1 - up) / weight.numel()) ** 0.5
    first = moved.clone()
    step()
    second = (weight.detach().double() - 1) / spacing - first
    # The words of another step are others: both have gone up as often as chance has it.
    both = ((first > 0) & (second > 0)).double().mean()
    assert abs(both - up**2) < 5 * (up**2 / weight.numel()) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_small_updates_are_lost_unless_they_are_written_by_chance(compiled, reset):
    """200 updates of a twentieth of bfloat16's step; the second moment of AdamW, which moves by a thousandth each."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight], lr=2.0**-7 / 20, weight_decay=0.0, betas=(0.9, 0.999))
    step = optimizer.step
    if compiled:
        step = torch.compile(step, backend=gws_compile.backend(inner="aot_eager"))
    steps = 200
    for number in range(steps):
        weight.grad = torch.full_like(weight, -1.0 if number < 100 else -2.0)
        step()
    second = optimizer.state[weight]["exp_avg_sq"].double().mean()
    exact = 1 - 0.999**100
    exact = exact * 0.999**100 + 4 * (1 - 0.999**100)
    if not compiled:
        assert torch.equal(weight, torch.ones_like(weight))
        return
    assert second == pytest.approx(exact, rel=0.01)
    moved = (weight.detach().double() - 1) / 2.0**-7
    # The step of Adam with a constant gradient is lr; with the doubled one it is larger, as the moments catch up.
    reference = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([reference], lr=2.0**-7 / 20, weight_decay=0.0, betas=(0.9, 0.999))
    for number in range(steps):
        reference.grad = torch.full_like(reference, -1.0 if number < 100 else -2.0)
        optimizer.step()
    expected = (reference.item() - 1) / 2.0**-7
    assert abs(moved.mean() - expected) < 0.02 * expected
    assert torch.equal(moved, moved.round())


def test_a_resumed_run_continues_bit_for_bit(reset):
    def start():
        torch._dynamo.reset()
        given = parameters(torch.bfloat16)
        optimizer = torch.optim.AdamW(given, lr=1e-2)
        pqt = gws_compile.backend(inner="aot_eager", seed=9)
        return given, optimizer, pqt, torch.compile(optimizer.step, backend=pqt)

    def run(given, step, steps):
        for number in steps:
            with_gradients(given, number)
            step()

    whole, _, _, step = start()
    run(whole, step, range(5))
    half, optimizer, pqt, step = start()
    run(half, step, range(2))
    saved = [p.detach().clone() for p in half], optimizer.state_dict(), pqt.state_dict()
    assert saved[2]["updates"] == 2
    again, optimizer, pqt, step = start()
    with torch.no_grad():
        for p, q in zip(again, saved[0], strict=True):
            p.copy_(q)
    optimizer.load_state_dict(saved[1])
    pqt.load_state_dict(saved[2])
    run(again, step, range(2, 5))
    assert all(map(torch.equal, whole, again))


def test_two_optimizers_have_words_of_their_own(reset):
    pqt = gws_compile.backend(inner="aot_eager")
    weights = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.full_like(weight, -(2.0**-8))
        torch.compile(torch.optim.SGD([weight], lr=1.0).step, backend=pqt)()
    up = [(weight > 1).double() for weight in weights]
    agreement = (up[0] == up[1]).double().mean()
    assert abs(agreement - 0.5) < 5 * 0.5 / 64


def test_wide_parameters_are_updated_as_without_and_it_is_said(reset):
    given = parameters(torch.float32)
    plain = parameters(torch.float32)
    optimizer, reference = torch.optim.AdamW(given, lr=1e-2), torch.optim.AdamW(plain, lr=1e-2)
    step = torch.compile(optimizer.step, backend=gws_compile.backend(inner="aot_eager"))
    with_gradients(given, 0)
    with pytest.warns(gws_compile.GwsWarning, match=r"changes nothing: its parameters are float32; it rounds"):
        step()
    with_gradients(plain, 0)
    torch.compile(reference.step, backend="aot_eager")()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        with_gradients(given, 1)
        step()
    with_gradients(plain, 1)
    torch.compile(reference.step, backend="aot_eager")()
    assert all(map(torch.equal, given, plain))


def test_without_master_weights_the_update_reaches_the_grid(reset):
    """bfloat16 parameters on fp8's grid: written to bfloat16 by chance, and from there to fp8."""
    torch.manual_seed(0)
    model = OneLayer(64, 64).bfloat16()
    pqt = gws_compile.backend("fp8_e4m3", inner="aot_eager", master=False)
    compiled = torch.compile(model, backend=pqt)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = torch.compile(optimizer.step, backend=pqt)
    for _ in range(3):
        compiled(torch.randn(4, 64).bfloat16()).square().mean().backward()
        step()
        optimizer.zero_grad()
        assert torch.equal(gws_compile.quantize(model.fc.weight, "fp8_e4m3"), model.fc.weight)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_inductor_writes_next_to_the_float32_update(kind, reset):
    narrow = parameters(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    optimizer, reference = kind(narrow, lr=1e-2), kind(wide, lr=1e-2)
    with_gradients(narrow, 0)
    for p, q in zip(narrow, wide, strict=True):
        q.grad = p.grad.float()
    torch.compile(optimizer.step, backend=gws_compile.backend())()
    reference.step()
    for p, q in zip(narrow, wide, strict=True):
        low, _ = neighbours(q - q.abs() * 2.0**-21, torch.bfloat16)
        _, high = neighbours(q + q.abs() * 2.0**-21, torch.bfloat16)
        assert ((p >= low) & (p <= high)).all()
