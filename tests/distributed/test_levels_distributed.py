"""Trained levels on two ranks: losses, weights and levels of the run of one process on the joined batch."""

import pytest
import torch
from support.distributed import run_ranks
from support.small_models import TwoBlocks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gws_compile
from gws_compile import Levels

STEPS = 3
VARIANTS = ("ddp", "fsdp")


def model_and_batches():
    torch.manual_seed(0)
    return TwoBlocks(inner=96), [torch.randn(8, 40) for _ in range(STEPS)]


def train(call, model, backend, batches):
    optimizer = torch.optim.SGD([*model.parameters(), *backend.parameters()], lr=0.1)
    losses = []
    for x in batches:
        loss = call(x).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def run_variant(rank, mesh, variant):
    torch._dynamo.reset()
    model, batches = model_and_batches()
    backend = gws_compile.backend(Levels.normal(3), inner="aot_eager")
    backend.prepare(model, batches[0])
    if variant == "ddp":
        model = DistributedDataParallel(model)
    else:
        for module in (model.first, model.second, model):
            fully_shard(module, mesh=mesh)
    losses = train(torch.compile(model, backend=backend), model, backend, [x.chunk(2)[rank] for x in batches])
    weights = {
        n.removeprefix("module."): getattr(p, "full_tensor", lambda p=p: p)().detach()
        for n, p in model.named_parameters()
    }
    return losses, weights, {n: p.detach() for n, p in backend.named_parameters()}


def sharded(mesh):
    """What a weight of which each rank holds a part says."""
    torch._dynamo.reset()
    model, batches = model_and_batches()
    for block in (model.first, model.second):
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    try:
        torch.compile(model, backend=gws_compile.backend(Levels.normal(3), inner="eager"))(batches[0])
    except Exception as error:
        return str(error)
    return ""


def run_rank(rank):
    mesh = init_device_mesh("cpu", (2,))
    return {variant: run_variant(rank, mesh, variant) for variant in VARIANTS} | {"tensor": sharded(mesh)}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(run_rank)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_are_one_process(ranks, variant):
    torch._dynamo.reset()
    model, batches = model_and_batches()
    backend = gws_compile.backend(Levels.normal(3), inner="aot_eager")
    backend.prepare(model, batches[0])
    begin = {n: p.detach().clone() for n, p in backend.named_parameters()}
    expected = train(torch.compile(model, backend=backend), model, backend, batches)
    levels = {n: p.detach() for n, p in backend.named_parameters()}
    results = [rank[variant] for rank in ranks]
    mean = [sum(pair) / 2 for pair in zip(*(losses for losses, _, _ in results), strict=True)]
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=0)
    for _, weights, of_rank in results:
        assert of_rank.keys() == levels.keys()
        for name, value in of_rank.items():
            assert (levels[name] - begin[name]).abs().max() > 1e-5, name  # it did move, ten times what is allowed below
            torch.testing.assert_close(value, levels[name], rtol=0, atol=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=0, atol=1e-6)
    for name, value in results[0][2].items():
        assert torch.equal(value, results[1][2][name])  # the ranks agree to the last bit


def test_sharded_weights_are_refused(ranks):
    for rank in ranks:
        assert (
            "up.weight: fmt=Levels(...) trains levels of whole weights, and of this DTensor each rank has a part"
            in (rank["tensor"])
        )
