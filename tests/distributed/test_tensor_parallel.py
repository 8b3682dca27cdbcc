"""Tensor parallelism (DTensor, `parallelize_module`) on two ranks: the run of the unsharded model."""

import re

import pytest
import torch
from support import eager
from support.distributed import run_ranks
from support.small_models import NetWithHead
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gws_compile
from gws_compile.numerics.shards import ShardRange

STEPS = 3
VARIANTS = {
    "blocks of 16": {"block": (16, 16)},
    "no blocks": {"block": (32, 32), "noise": "none", "scale": None},
    "recompute": {"block": (16, 24), "backward": "recompute", "inner": "inductor"},
    "uniform noise": {"block": (8, 48), "noise": "uniform"},
    # Maxima over the ranks: of the matrix, of rows that both have a part of, of a block that is as long as the weight.
    "a level for the matrix": {"fmt": "nvfp4", "inner": "inductor"},
    "rows": {"fmt": "fp8_channel"},
    "a scale for the matrix": {"fmt": "int8", "block": (None, None)},
    "recompute rows": {"fmt": "int4", "block": (1, 1000), "backward": "recompute"},
}


def net():
    """Column-wise, then row-wise; an odd width in between the ranks' halves; a weight that every rank holds."""
    return NetWithHead("out", 24, inner=96)


def loss_of(call, x):
    return call(x).square().mean()


def model_and_batches():
    torch.manual_seed(0)
    return net(), [[torch.randn(8, 40)] for _ in range(STEPS)]


def parallel(model, mesh):
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def train(mesh, settings):
    torch._dynamo.reset()
    model, batches = model_and_batches()
    parallel(model, mesh)
    backend = gws_compile.backend(**{"fmt": "fp6_e3m2", "inner": "aot_eager", **settings})
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for (x,) in batches:
        loss = loss_of(compiled, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in model.named_parameters()}
    return losses, state, backend.state_dict()["weights"]


class Experts(nn.Module):
    """Expert weights, half of the experts on each rank, read as mixture-of-experts code does: by the local part."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return torch.bmm(x, self.weight.to_local())


def expert_parallel(rank, mesh):
    torch._dynamo.reset()
    torch.manual_seed(0)
    whole = torch.randn(4, 40, 24)
    model = Experts(distribute_tensor(whole, mesh, [Shard(0)]))
    used = torch.compile(model, backend=gws_compile.backend("fp6_e3m2", inner="aot_eager"))(
        torch.eye(40).expand(2, -1, -1)
    )
    expected = gws_compile.sample(whole, "fp6_e3m2", name="weight")[2 * rank : 2 * rank + 2]
    return torch.equal(used.detach(), expected)


def cut_block(mesh):
    torch._dynamo.reset()
    model = parallel(net(), mesh)
    try:
        torch.compile(model, backend=gws_compile.backend("fp6_e3m2", inner="eager"))(torch.randn(8, 40))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return str(error)


def nothing_on_a_rank(mesh):
    """Five rows on four ranks, with a scale for the whole matrix: what every rank says, none waits for another."""
    torch._dynamo.reset()
    model = Experts(distribute_tensor(torch.randn(1, 5, 32), mesh, [Shard(1)]))
    backend = gws_compile.backend("fp8_tensor", inner="eager")
    try:
        torch.compile(model, backend=backend)(torch.randn(1, 8, model.weight.to_local().shape[1]))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return str(error)


def replicated(mesh):
    """A weight that is a DTensor, whole on every rank."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = nn.Linear(40, 24, bias=False)
    weight = layer.weight.detach().clone()
    layer.weight = nn.Parameter(distribute_tensor(weight, mesh, [Replicate()]))
    model = nn.ModuleDict({"fc": layer})
    backend = gws_compile.backend("fp6_e3m2", inner="aot_eager")
    call = torch.compile(lambda x: model["fc"](x), backend=backend)
    out = call(distribute_tensor(torch.eye(40), mesh, [Replicate()])).to_local()
    ((name, _),) = backend.state_dict()["weights"]
    return name, torch.equal(out.detach().t(), gws_compile.sample(weight, "fp6_e3m2", name=name))


def run_rank(rank):
    mesh = init_device_mesh("cpu", (2,))
    results = {name: train(mesh, settings) for name, settings in VARIANTS.items()}
    return results | {
        "experts": expert_parallel(rank, mesh),
        "cut": cut_block(mesh),
        "replicated": replicated(mesh),
    }


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(run_rank)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_are_the_unsharded_model(ranks, variant):
    model, batches = model_and_batches()
    sampled = [n for n, p in model.named_parameters() if p.ndim == 2]
    settings = {k: v for k, v in VARIANTS[variant].items() if k not in ("backward", "inner")}
    losses = eager.train(model, batches, loss_of, sampled, settings.pop("fmt", "fp6_e3m2"), **settings)
    for got, state, weights in (rank[variant] for rank in ranks):
        torch.testing.assert_close(got, losses, rtol=1e-6, atol=0)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(state[name], parameter.detach(), rtol=0, atol=1e-7)
        shapes = {n: list(p.shape) for n, p in model.named_parameters() if p.ndim == 2}
        assert dict(map(tuple, weights)) == (shapes if settings.get("noise") != "none" else {})


def test_expert_parallel(ranks):
    assert [rank["experts"] for rank in ranks] == [True, True]


def test_a_replicated_weight_is_sampled_alike_on_every_rank(ranks):
    assert [rank["replicated"] for rank in ranks] == [("fc.weight", True)] * 2


def test_a_shard_that_cuts_through_a_block_is_an_error(ranks):
    for rank, rows in zip(ranks, ("0 to 48", "48 to 96"), strict=True):
        assert (
            "up.weight: a shard of shape (48, 40) of the whole weight (96, 40) cuts through a block of (32, 32): "
            f"rows {rows} of 96 lie here, and a block has 32. Use a block that divides the shard"
        ) in rank["cut"]


def train_2d(rank):
    """Two ranks of data parallelism (FSDP2) times two of tensor parallelism."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model, batches = model_and_batches()
    parallel(model, mesh["tensor"])
    fully_shard(model, mesh=mesh["data"])
    backend = gws_compile.backend("nvfp4", inner="aot_eager")
    model.compile(backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for (x,) in batches:
        loss = loss_of(model, x.chunk(2)[mesh["data"].get_local_rank()])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
    return losses, state, nothing_on_a_rank(init_device_mesh("cpu", (4,)))


@pytest.mark.slow
def test_with_fsdp_on_four_ranks():
    ranks = run_ranks(train_2d, world=4)
    model, batches = model_and_batches()
    expected = eager.train(model, batches, loss_of, ("up.weight", "down.weight", "out.weight"), "nvfp4")
    mean = [sum(four) / 4 for four in zip(*(losses for losses, _, _ in ranks), strict=True)]
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=0)
    message = r"weight: some ranks hold no part of the weight of shape \(1, 5, 32\), whose maxima .* all ranks"
    for _, state, refused in ranks:
        assert re.search(message, refused)
        for name, value in state.items():
            torch.testing.assert_close(value, model.get_parameter(name).detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("shard", "batch_dims", "block", "cut"),
    [
        (ShardRange((64, 48), (32, 48), (32, 0)), 0, (32, 32), None),
        (ShardRange((50, 48), (18, 48), (32, 0)), 0, (32, 32), None),  # the last shard ends in a partial block
        (ShardRange((64, 48), (64, 24), (0, 24)), 0, (32, 32), "columns 24 to 48 of 48 lie here, and a block has 32"),
        (ShardRange((64, 48), (64, 24), (0, 0)), 0, (32, 32), "columns 0 to 24 of 48 lie here, and a block has 32"),
        (ShardRange((8, 40, 40), (3, 40, 40), (3, 0, 0)), 1, (32, 32), None),
        (ShardRange((64, 32, 3, 3), (64, 16, 3, 3), (0, 16, 0, 0)), 0, (32, 48), None),
        (
            ShardRange((64, 32, 3, 3), (64, 16, 3, 3), (0, 16, 0, 0)),
            0,
            (32, 32),
            "columns 144 to 288 of 288 lie here, and a block has 32",
        ),
        (
            ShardRange((64, 32, 4, 4), (64, 32, 2, 4), (0, 0, 2, 0)),
            0,
            (32, 1),
            "dim 2 or a later one is sharded, inside the columns of its blocks",
        ),
    ],
)
def test_what_cuts_a_block(shard, batch_dims, block, cut):
    assert shard.cut_block(batch_dims, block) == cut


@pytest.mark.parametrize(
    ("shard", "batch_dims", "block", "dims"),
    [
        (ShardRange((64, 48), (32, 48), (32, 0)), 0, (1, None), ()),  # rows are whole
        (ShardRange((64, 48), (64, 25), (0, 0)), 0, (1, None), (1,)),
        (ShardRange((64, 48), (32, 24), (32, 24)), 0, (None, None), (0, 1)),
        (ShardRange((64, 48), (32, 24), (32, 24)), 0, (64, 24), (0,)),  # as long as the weight
        (ShardRange((64, 32, 4, 4), (64, 32, 2, 4), (0, 0, 2, 0)), 0, (32, None), (2,)),
        (ShardRange((8, 40, 40), (3, 40, 40), (3, 0, 0)), 1, (None, None), ()),  # experts are whole
        (ShardRange((8, 40, 40), (3, 20, 40), (3, 20, 0)), 1, (None, None), (1,)),
    ],
)
def test_blocks_as_long_as_the_weight_are_cut(shard, batch_dims, block, dims):
    assert shard.cut_block(batch_dims, block) is None
    assert shard.spread_dims(batch_dims, block) == dims
