"""Learned bit widths on two ranks: losses, weights and widths of the run of one process on the joined batch."""

import pytest
import torch
from support.distributed import run_ranks
from support.small_models import TwoBlocks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gws_compile
from gws_compile import LearnedBits

STEPS = 4
VARIANTS = ("ddp", "ddp, accumulating", "fsdp, blocks", "fsdp, whole", "tensor", "tensor, rows")


def model_and_batches():
    torch.manual_seed(0)
    return TwoBlocks(inner=96), [torch.randn(8, 40) for _ in range(STEPS)]


def make(granularity, variant):
    bits = LearnedBits(granularity=granularity, average=5.0)
    block = (1, None) if "rows" in variant else (16, 16)
    return gws_compile.backend(bits=bits, block=block, inner="aot_eager")


def train(call, model, backend, micro_batches):
    """SGD on the weights, Adam on the widths."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.Adam(backend.parameters(), lr=0.05)]
    losses = []
    for micro in micro_batches:
        total = 0.0
        for i, x in enumerate(micro):
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = i == len(micro) - 1
            loss = call(x).square().mean() / len(micro)
            (loss + backend.bit_loss() / len(micro)).backward()
            total += loss.item()
        losses.append(total)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def run_variant(rank, mesh, variant, granularity):
    torch._dynamo.reset()
    model, batches = model_and_batches()
    backend = make(granularity, variant)
    backend.prepare(model, batches[0])
    share = [x.chunk(2)[rank].chunk(2 if "accumulating" in variant else 1) for x in batches]
    call = None
    if variant.startswith("ddp"):
        model = DistributedDataParallel(model)
    elif variant.startswith("tensor"):
        share = [[x] for x in batches]
        for block in (model.first, model.second):
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    else:
        for module in (model.first, model.second, model):
            fully_shard(module, mesh=mesh)
        if "blocks" in variant:
            model.first.compile(backend=backend)
            model.second.compile(backend=backend)
            call = model
    losses = train(call or torch.compile(model, backend=backend), model, backend, share)
    weights = {
        n.removeprefix("module."): getattr(p, "full_tensor", lambda p=p: p)().detach()
        for n, p in model.named_parameters()
    }
    return losses, weights, {n: p.detach() for n, p in backend.named_parameters()}


def run_rank(rank):
    mesh = init_device_mesh("cpu", (2,))
    return {(v, g): run_variant(rank, mesh, v, g) for v in VARIANTS for g in ("block", "weight")}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(run_rank)


@pytest.mark.parametrize("granularity", ["block", "weight"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_are_one_process(ranks, variant, granularity):
    torch._dynamo.reset()
    model, batches = model_and_batches()
    backend = make(granularity, variant)
    backend.prepare(model, batches[0])
    expected = train(torch.compile(model, backend=backend), model, backend, [[x] for x in batches])
    widths = {n: p.detach() for n, p in backend.named_parameters()}
    results = [rank[variant, granularity] for rank in ranks]
    mean = [sum(pair) / 2 for pair in zip(*(losses for losses, _, _ in results), strict=True)]
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=0)
    assert all((p - 1).abs().max() > 0.05 for p in widths.values())  # they did move
    for _, weights, bits in results:
        assert bits.keys() == widths.keys()
        for name, value in bits.items():
            torch.testing.assert_close(value, widths[name], rtol=0, atol=1e-4)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=0, atol=1e-5)
    for name, value in results[0][2].items():
        assert torch.equal(value, results[1][2][name])  # the ranks agree to the last bit
