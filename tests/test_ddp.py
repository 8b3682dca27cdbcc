"""DistributedDataParallel on two ranks, with and without Dynamo's graph splitting: the run of one process."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gws_compile

STEPS, BATCH, WIDTH = 3, 8, 40


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def train(model, parameters, batches):
    backend = gws_compile.backend("fp6_e3m2")
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    losses = []
    for x in batches:
        loss = compiled(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, backend


def run_rank(rank, port, split, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch._dynamo.config.optimize_ddp = split
    dist._DEFAULT_FIRST_BUCKET_BYTES = 2000  # small enough that a bucket holds one layer
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    batches = [torch.randn(BATCH, WIDTH) for _ in range(STEPS)]
    single = Net()
    model = DistributedDataParallel(copy.deepcopy(single), bucket_cap_mb=0.004)
    half = slice(BATCH // 2 * rank, BATCH // 2 * (rank + 1))
    losses, backend = train(model, model.parameters(), [x[half] for x in batches])
    results[rank] = (losses, [r.name for r in backend.report().rewritten], len(backend.graphs))
    if rank == 0:
        reference, _ = train(single, single.parameters(), batches)
        results["single"] = reference
        results["difference"] = max(
            (p - q).abs().max().item() for p, q in zip(model.parameters(), single.parameters(), strict=True)
        )
    dist.destroy_process_group()


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_two_ranks_are_one_process(split):
    port = 29500 + os.getpid() % 500 + 500 * split
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(run_rank, args=(port, split, results), nprocs=2)
        results = dict(results)
    for rank in range(2):
        _, names, graphs = results[rank]
        assert names == ["a.weight", "b.weight", "c.weight"]  # no "module." in front, on every rank
        assert graphs == (2 if split else 1)
    mean = [(a + b) / 2 for a, b in zip(results[0][0], results[1][0], strict=True)]
    # One draw on every rank, or losses would differ in the second digit; gradients are averaged in another order.
    torch.testing.assert_close(mean, results["single"], rtol=1e-6, atol=0)
    assert results["difference"] < 1e-7
