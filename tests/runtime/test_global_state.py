"""Global state of torch at the first call changes no width, clock or key, and raises nothing."""

import contextlib

import pytest
import torch
from support.small_models import OneLayer
from torch._subclasses.fake_tensor import FakeTensorMode

import gws_compile


def net():
    return OneLayer(8, 8, bias=False)


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def compiled_autograd():
    with torch._dynamo.config.patch(compiled_autograd=True):
        yield


STATES = {
    "none": contextlib.nullcontext,
    "default dtype": default_dtype,
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": deterministic,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "compiled autograd": compiled_autograd,
}


def run(state, bits, granularity, average):
    """The first call in a mode, then three steps without it: outputs, gradients, widths, state."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = net(), torch.randn(4, 8)
    settings = {}
    if bits:
        settings = {"bits": gws_compile.LearnedBits(granularity=granularity, average=average)}
    with STATES[state]():
        backend = gws_compile.backend("fp6_e3m2" if not bits else None, inner="aot_eager", **settings)
        compiled = torch.compile(model, backend=backend)
        compiled(x)
        if bits:
            backend.bit_loss()
    found = []
    for _ in range(3):
        model.zero_grad()
        loss = compiled(x).square().sum() + backend.bit_loss()
        loss.backward()
        found += [loss.detach(), model.fc.weight.grad.clone(), *(p.grad.clone() for p in backend.parameters())]
        backend.step()
    return found, dict(backend.bits()), backend.state_dict()["step"]


@pytest.mark.parametrize(
    ("bits", "granularity", "average"),
    [(False, None, None), (True, "block", 5.0), (True, "weight", None)],
    ids=["fixed", "by block, to an average", "by weight"],
)
@pytest.mark.parametrize("state", list(STATES)[1:])
def test_at_the_first_call(state, bits, granularity, average):
    plain, widths, step = run("none", bits, granularity, average)
    found, found_widths, found_step = run(state, bits, granularity, average)
    assert found_step == step
    for a, b in zip(plain, found, strict=True):
        assert a.dtype == b.dtype
        assert a.device == b.device
        assert torch.equal(a, b)
    assert all(torch.equal(widths[name], found_widths[name]) for name in widths)


def test_in_a_fake_mode():
    """A model's first call on fake inputs, to learn shapes, with real weights."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, backend = net(), gws_compile.backend("fp6_e3m2", inner="eager")
    compiled = torch.compile(model, backend=backend)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert compiled(mode.from_tensor(torch.randn(4, 8))).shape == (4, 8)
    got = compiled(torch.eye(8)).detach().t()
    assert torch.equal(got, gws_compile.sample(model.fc.weight.detach(), "fp6_e3m2", name="fc.weight"))
