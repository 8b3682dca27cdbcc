"""DistributedDataParallel on two ranks, with and without Dynamo's graph splitting: the run of one process."""

import pytest
import torch
import torch.distributed as dist
from support import eager
from support.distributed import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gws_compile

STEPS, BATCH, WIDTH = 3, 16, 40
VARIANTS = ("split", "whole", "split, accumulating", "whole, accumulating", "split, accumulating, scheduled")
SCHEDULE = gws_compile.Schedule(start=1, bits=((1, 6.0), (2, 3.0)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def loss_of(call, x):
    return call(x).square().mean()


def model_and_batches():
    torch.manual_seed(0)
    return Net(), [torch.randn(BATCH, WIDTH) for _ in range(STEPS)]


def train(rank, variant):
    torch._dynamo.reset()
    torch._dynamo.config.optimize_ddp = variant.startswith("split")
    dist._DEFAULT_FIRST_BUCKET_BYTES = 2000  # small enough that a bucket holds one layer
    single, batches = model_and_batches()
    model = DistributedDataParallel(single, bucket_cap_mb=0.004)
    backend = gws_compile.backend(
        "fp6_e3m2",
        schedule=SCHEDULE if "scheduled" in variant else None,
        inner="aot_eager" if "accumulating" in variant else "inductor",
    )
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for x in batches:
        micro = x.chunk(2)[rank].chunk(2 if "accumulating" in variant else 1)
        total = 0.0
        for i, part in enumerate(micro):
            model.require_backward_grad_sync = i == len(micro) - 1  # what no_sync() sets
            loss = loss_of(compiled, part) / len(micro)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    names = [r.name for r in backend.report().rewritten]
    return (
        losses,
        {n: p.detach() for n, p in single.named_parameters()},
        names,
        len(backend.graphs),
        backend.state_dict(),
    )


def run_rank(rank):
    return {variant: train(rank, variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(run_rank)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_are_one_process(ranks, variant):
    model, batches = model_and_batches()
    schedule = SCHEDULE if "scheduled" in variant else None
    sampled = ("a.weight", "b.weight", "c.weight")
    expected = eager.train(model, [[x] for x in batches], loss_of, sampled, "fp6_e3m2", schedule=schedule)
    mean = [sum(pair) / 2 for pair in zip(*(rank[variant][0] for rank in ranks), strict=True)]
    # One draw on every rank, or losses would differ in the second digit; gradients are averaged in another order.
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=0)
    for _, parameters, names, graphs, state in (rank[variant] for rank in ranks):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameters[name], parameter.detach(), rtol=0, atol=1e-7)
        assert names == ["a.weight", "b.weight", "c.weight"]  # no "module." in front, on every rank
        assert [name for name, _ in state["weights"]] == names
        if variant == "split":
            assert graphs == 2
        if variant == "whole":
            assert graphs == 1
        assert state["step"] == STEPS
