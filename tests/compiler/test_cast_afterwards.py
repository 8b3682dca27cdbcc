"""Plain training whose evaluation is cast."""

import copy

import pytest
import torch
from support.small_models import Net

import gws_compile
from gws_compile.compiler.cast_afterwards import CastAfterwards
from gws_compile.config import Config

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_trains_plain_and_evaluates_the_cast(inner):
    """Weights are bit for bit those of plain training with the same compiler; outputs those of the cast weights.

    Steps enough that a backend whose weights are trained without noise would say so.
    """
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 40)
    other = copy.deepcopy(model)
    backend = CastAfterwards(Config.make("int3", noise="none", inner=inner))
    calls = torch.compile(model, backend=backend), torch.compile(other, backend=inner)
    for one, call in zip((model, other), calls, strict=True):
        torch._dynamo.reset()
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(60):
            call(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, plain in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, plain)
    with torch.no_grad():
        found = calls[0](x)
        for name in ("up", "down"):
            weight = getattr(other, name).weight
            weight.copy_(gws_compile.quantize(weight, "int3"))
        torch.testing.assert_close(found, other(x), rtol=1e-5, atol=1e-6)
    assert {record.name for record in backend.report().rewritten} == {"up.weight", "down.weight"}
