"""`Backend.metrics` against float64 numpy and ml_dtypes; which weights it sees; that it leaves everything alone."""

import gc
import json
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from support.distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gws_compile
from gws_compile.report import sampled_parts

FORMATS = {"fp4_e2m1": "float4_e2m1fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(70, 50, bias=False), nn.Linear(50, 40)

    def forward(self, x):
        return self.down(self.up(x).relu())


def make(fmt="fp8_e4m3", **settings):
    return gws_compile.backend(fmt, inner="eager", **settings)


def trained(model, backend, x, steps=1):
    """The model after some steps, and one more forward."""
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        compiled(x).square().sum().backward()
        optimizer.step()
    return compiled(x)


def spread(shape):
    """Values over many binades, zeros among them; block maxima above and below the largest code."""
    w = torch.randn(shape) * 2.0 ** (torch.rand(shape) * -40)
    w[::7, ::5] = 0
    w[0, 0] = 1.9
    return w


def oracle(w, name, block, scale):
    """The cast of a matrix in float64, with ml_dtypes, and which of its elements lie above their block's grid."""
    code = getattr(ml_dtypes, FORMATS[name])
    largest = float(ml_dtypes.finfo(code).max)
    w = w.astype(np.float64)
    cast, above = np.empty_like(w), np.empty(w.shape, dtype=bool)
    for i in range(0, w.shape[0], block[0]):
        for j in range(0, w.shape[1], block[1]):
            part = w[i : i + block[0], j : j + block[1]]
            x = 1.0
            if scale is not None:
                amax = np.abs(part).max()
                exponent = np.frexp(amax)[1] - 1 - (np.frexp(largest)[1] - 1)
                x = 2.0**exponent
                if scale == "ceil" and amax / x > largest:
                    x *= 2
            clipped = np.clip(part / x, -largest, largest)
            cast[i : i + block[0], j : j + block[1]] = clipped.astype(np.float32).astype(code).astype(np.float64) * x
            above[i : i + block[0], j : j + block[1]] = np.abs(part / x) > largest
    return cast, above


def decibels(w, approximation):
    w = w.astype(np.float64)
    return 10 * np.log10((w**2).sum() / ((w - approximation.astype(np.float64)) ** 2).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", ["floor", "ceil", None])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_definitions(fmt, scale, dtype):
    model = Net()
    with torch.no_grad():
        factor = 2.0 ** {"fp4_e2m1": 2, "fp8_e4m3": 8, "fp8_e5m2": 15}[fmt] if scale is None else 1.0
        for linear in (model.up, model.down):
            linear.weight.copy_(spread(linear.weight.shape) * factor)
    model.to(dtype)
    backend = make(fmt, scale=scale, seed=3, block=(16, 32))
    trained(model, backend, torch.zeros(4, 70, dtype=dtype), steps=2)
    found = backend.metrics()
    assert list(found) == ["up.weight", "down.weight"]
    assert found.step == 2
    shares = {"saturated": 0, "flushed": 0}
    for name, linear in (("up.weight", model.up), ("down.weight", model.down)):
        w = linear.weight.detach().float().numpy()
        cast, above = oracle(w, fmt, (16, 32), scale)
        noisy = (
            gws_compile.sample(linear.weight, fmt, name=name, step=2, seed=3, block=(16, 32), scale=scale)
            .float()
            .numpy()
        )
        metrics = found[name]
        assert metrics.sqnr == pytest.approx(decibels(w, cast), rel=1e-9)
        assert metrics.sqnr_noise == pytest.approx(decibels(w, noisy), rel=1e-9)
        assert metrics.saturated == above.mean()
        assert metrics.flushed == ((w != 0) & (cast == 0)).mean()
        assert metrics.exact == (w == cast).mean()
        assert (metrics.name, metrics.shape, metrics.fmt) == (name, tuple(linear.weight.shape), fmt)
        assert (metrics.dtype, metrics.bits) == (str(dtype)[6:], gws_compile.FORMATS[fmt].noise_bits)
        for share in shares:
            shares[share] += getattr(metrics, share)
    assert shares["flushed"] > 0
    assert (shares["saturated"] > 0) == (scale != "ceil")


class Kinds(nn.Module):
    """A 1-d convolution, a 2-d one that lies channels last, and experts."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(6, 40, 3)
        self.conv2 = nn.Conv2d(4, 36, 3).to(memory_format=torch.channels_last)
        self.experts = nn.Parameter(torch.randn(3, 40, 48))

    def forward(self, x):
        one = self.conv1(x[:6, :8]).sum()
        two = self.conv2(x[:4, :20].reshape(1, 4, 4, 5)).sum()
        return one + two + torch.bmm(x[None, :, :40].expand(3, -1, -1), self.experts).sum()


def test_convolutions_and_experts(monkeypatch):
    model, backend = Kinds(), make("fp4_e2m1")
    torch.compile(model, backend=backend)(torch.randn(8, 48)).backward()
    found = backend.metrics()
    assert list(found) == ["experts", "conv1.weight", "conv2.weight"]
    matrices = {"conv1.weight": [model.conv1.weight.flatten(1)], "conv2.weight": [model.conv2.weight.flatten(1)]}
    for name, each in {**matrices, "experts": list(model.experts)}.items():
        each = [w.detach().numpy() for w in each]
        cast = np.stack([oracle(w, "fp4_e2m1", (32, 32), "floor")[0] for w in each])
        assert found[name].sqnr == pytest.approx(decibels(np.stack(each), cast), rel=1e-9)
    w = model.experts.detach()
    noisy = gws_compile.sample(w, "fp4_e2m1", name="experts")
    assert found["experts"].sqnr_noise == pytest.approx(decibels(w.numpy(), noisy.numpy()), rel=1e-9)
    w = model.conv1.weight.detach()
    noisy = gws_compile.sample(w.flatten(1), "fp4_e2m1", name="conv1.weight").view(w.shape)
    assert found["conv1.weight"].sqnr_noise == pytest.approx(decibels(w.numpy(), noisy.numpy()), rel=1e-9)
    for elements in (32 * 48, 2 * 40 * 48):  # rows, and matrices, in several parts
        monkeypatch.setattr(sampled_parts, "PART_ELEMENTS", elements)
        parted = backend.metrics()
        for name, metrics in found.items():
            for field in ("sqnr", "sqnr_noise", "saturated", "flushed", "exact"):
                assert getattr(parted[name], field) == pytest.approx(getattr(metrics, field), rel=1e-12)


def test_nothing_is_touched():
    model, backend = Net(), make()
    x = torch.randn(4, 70)
    before = trained(model, backend, x).detach()
    graphs, texts = list(backend.graphs), [g.code for g in backend.graphs]
    state, weights, gradients = (
        torch.get_rng_state(), [p.detach().clone() for p in model.parameters()], [p.grad for p in model.parameters()]
    )  # fmt: skip
    first = backend.metrics()
    assert dict(first) == dict(backend.metrics())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(a is p.grad for a, p in zip(gradients, model.parameters(), strict=True))
    compiled = torch.compile(model, backend=backend)
    assert torch.equal(compiled(x), before)
    assert backend.graphs == graphs
    assert [g.code for g in backend.graphs] == texts
    with torch.inference_mode():
        assert dict(backend.metrics()) == dict(first)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(40, 40), nn.Linear(40, 40)
        self.b.weight = self.a.weight
        self.frozen = nn.Linear(40, 40).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.b(self.a(x)))


def test_tied_weights_once_and_frozen_ones_without_noise():
    model, backend = Tied(), make("fp4_e2m1")
    torch.compile(model, backend=backend)(torch.randn(2, 40)).sum().backward()
    found = backend.metrics()
    assert list(found) == ["a.weight", "frozen.weight"]
    assert found["a.weight"].sqnr_noise < found["a.weight"].sqnr
    assert (found["frozen.weight"].sqnr_noise, found["frozen.weight"].bits) == (None, None)


@pytest.mark.parametrize("settings", [{}, {"noise": "none"}])
def test_the_cast_alone(settings):
    model, backend = Net(), make(**settings)
    compiled = torch.compile(model, backend=backend)
    with torch.set_grad_enabled("noise" in settings):
        compiled(torch.randn(2, 70))
    found = backend.metrics()
    assert {name: m.sqnr_noise for name, m in found.items()} == {"up.weight": None, "down.weight": None}
    w = model.up.weight.detach().numpy()
    assert found["up.weight"].sqnr == pytest.approx(decibels(w, oracle(w, "fp8_e4m3", (32, 32), "floor")[0]), rel=1e-9)
    if not settings:  # a training graph of the same weights adds the noise
        compiled(torch.randn(2, 70))
        assert backend.metrics()["up.weight"].sqnr_noise is not None
        assert len(backend.metrics()) == 2


def test_blocks_that_share_a_graph_and_models_that_share_a_backend():
    backend = make()
    one, two = nn.Sequential(Net(), nn.Linear(40, 70), Net()), Net()
    for net in (one[0], one[2]):
        net.compile(backend=backend)
    one(torch.randn(2, 70)).sum().backward()
    assert list(backend.metrics()) == ["0.up.weight", "0.down.weight", "2.up.weight", "2.down.weight"]
    torch.compile(two, backend=backend)(torch.randn(2, 70))
    assert list(backend.metrics())[4:] == ["up.weight", "down.weight"]
    del one, net
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    assert list(backend.metrics()) == ["up.weight", "down.weight"]


def test_fake_and_meta_weights_are_none():
    backend = make(bits=gws_compile.LearnedBits())
    backend.prepare(Net(), torch.randn(2, 70))
    assert len(backend.metrics()) == 0
    assert "no sampled weights" in str(backend.metrics())
    model = Net()
    compiled = torch.compile(model, backend=(other := make()))
    compiled(torch.randn(2, 70))
    assert len(other.metrics()) == 2
    model.to("meta")
    assert len(other.metrics()) == 0


def test_broken_and_exact_weights():
    model, backend = Net(), make()
    with torch.no_grad():
        model.up.weight[40, 3] = math.nan
        model.down.weight.copy_(gws_compile.quantize(model.down.weight, "fp8_e4m3"))
    torch.compile(model, backend=backend)(torch.randn(2, 70))
    found = backend.metrics()
    assert math.isnan(found["up.weight"].sqnr)
    w = model.up.weight.detach().clone()
    w[32:, :32] = math.nan
    assert found["up.weight"].exact == (gws_compile.quantize(w, "fp8_e4m3") == w).double().mean().item()
    assert (found["down.weight"].sqnr, found["down.weight"].exact) == (math.inf, 1.0)
    rows = {row["name"]: row for row in json.loads(found.to_json())["weights"]}
    assert (rows["up.weight"]["sqnr"], rows["down.weight"]["sqnr"]) == (None, None)
    assert rows["down.weight"]["shape"] == [40, 50]
    scalars = found.scalars("x/", per_weight=True)
    assert "x/sqnr_mean" not in scalars
    assert scalars["x/sqnr_noise_mean"] == scalars["x/down.weight/sqnr_noise"] == found["down.weight"].sqnr_noise
    expected = (found["up.weight"].exact * 3500 + 2000) / 5500
    assert scalars["x/exact"] == pytest.approx(expected)
    assert scalars["x/bits"] == 5.0
    assert "x/up.weight/sqnr" not in scalars


@pytest.mark.parametrize("granularity", ["block", "weight"])
def test_learned_widths(granularity):
    model = Net()
    backend = make(None, bits=gws_compile.LearnedBits(granularity=granularity))
    backend.prepare(model, torch.randn(2, 70))
    with torch.no_grad():
        for parameter in backend.parameters():
            parameter.copy_(torch.linspace(-0.5, 2, parameter.numel()).reshape(parameter.shape))
    compiled = torch.compile(model, backend=backend)
    eye = torch.eye(70)
    compiled(eye)
    found = backend.metrics()
    assert found["up.weight"].fmt == "by width"
    summary = backend.report().bits
    for name, metrics in found.items():
        assert metrics.bits == pytest.approx(summary.by_weight[name].average)
    with torch.no_grad():  # what the graph itself casts to
        seen = {}
        compiled_up = torch.compile(model.up, backend=backend)
        seen["cast"] = compiled_up(eye).t().numpy()
    w = model.up.weight.detach().numpy()
    assert found["up.weight"].sqnr == pytest.approx(decibels(w, seen["cast"]), rel=1e-9)
    before = found["up.weight"].sqnr_noise
    backend.freeze_bits()
    frozen = backend.metrics()["up.weight"]
    assert frozen.sqnr_noise != before
    assert frozen.bits >= found["up.weight"].bits


def _sharded(rank, how):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(Net(), nn.Linear(40, 70), Net())
    reference = nn.Sequential(Net(), nn.Linear(40, 70), Net())
    reference.load_state_dict(model.state_dict())
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for net in (model[0], model[2]):
            fully_shard(net, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        reference.bfloat16()
    elif how == "tensor":
        mesh = init_device_mesh("cpu", (2,))
        for net in (model[0], model[2]):
            parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    results = []
    for net, x in ((model, torch.ones(2, 70)), (reference, next(reference.parameters()).new_ones(2, 70))):
        backend = gws_compile.backend("fp4_e2m1", inner="eager", block=(5, 5))
        for block in (net[0], net[2]):
            block.compile(backend=backend)
        net(x).float().square().sum().backward()
        results.append([*backend.metrics().values()])
    return results


@pytest.mark.parametrize("how", ["fsdp", "tensor"])
def test_sharded_weights_are_measured_whole(how):
    for sharded, whole in run_ranks(_sharded, args=(how,)):
        assert [m.name for m in whole] == ["0.up.weight", "0.down.weight", "2.up.weight", "2.down.weight"]
        assert sharded == whole
