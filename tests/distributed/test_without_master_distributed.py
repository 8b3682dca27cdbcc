"""Training without master weights on two ranks: each writes what one process writes, bit for bit."""

import pytest
import torch
from support.distributed import run_ranks
from support.small_models import HalvableBlocks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gws_compile

BATCH, STEPS = 8, 3
SETTINGS = {
    "int4": {"fmt": "int4", "block": (1, None)},  # rows that column-wise sharding cuts
    "nvfp4": {"fmt": "nvfp4"},
    "fp8_e4m3": {"fmt": "fp8_e4m3"},
}


def start(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    return HalvableBlocks(), gws_compile.backend(**SETTINGS[name], master=False, inner="aot_eager", seed=5)


def train(model, call):
    """Signs of gradients are what is trained with: a sum over ranks that differs in its last bits changes none."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):
        x = torch.randn(BATCH, 64, generator=torch.Generator().manual_seed(step))
        call(x).square().mean().backward()
        for p in model.parameters():
            p.grad = p.grad.sign()
        optimizer.step()
        optimizer.zero_grad()
    return {
        n: getattr(p.detach(), "full_tensor", lambda p=p: p.detach())().clone() for n, p in model.named_parameters()
    }


def data_parallel(rank, name):
    model, backend = start(name)
    compiled = torch.compile(DistributedDataParallel(model), backend=backend)
    return train(model, lambda x: compiled(x.chunk(2)[rank]))


def fully_sharded(rank, name, policy=None):
    model, backend = start(name)
    mesh = init_device_mesh("cpu", (2,))
    for module in (model.first, model.second, model):
        fully_shard(module, mesh=mesh, **({} if policy is None else {"mp_policy": policy}))
    for block in (model.first, model.second):
        block.compile(backend=backend)
    return train(model, lambda x: model(x.chunk(2)[rank]))


def tensor_parallel(rank, name):
    model, backend = start(name)
    mesh = init_device_mesh("cpu", (2,))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in (model.first, model.second):
        parallelize_module(block, mesh, plan)
        block.compile(backend=backend)
    return train(model, model)


KINDS = (data_parallel, fully_sharded, tensor_parallel)


def run_rank(rank, name):
    return {kind.__name__: kind(rank, name) for kind in KINDS}


def mixed_precision(rank):
    return fully_sharded(rank, "fp8_e4m3", MixedPrecisionPolicy(param_dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["int4", *(pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS if n != "int4")])
def test_two_ranks_write_what_one_process_writes(name):
    model, backend = start(name)
    alone = train(model, torch.compile(model, backend=backend))
    given = SETTINGS[name]
    for of_rank in run_ranks(run_rank, args=(name,)):
        for kind, found in of_rank.items():
            for weight, value in found.items():
                assert torch.equal(value, alone[weight]), (kind, weight)
                if value.ndim == 2:
                    cast = gws_compile.quantize(value, given["fmt"], given.get("block"))
                    assert torch.equal(cast, value), (kind, weight)


@pytest.mark.slow
def test_mixed_precision_has_what_its_graphs_read_on_the_grid():
    for of_rank in run_ranks(mixed_precision):
        for weight, value in of_rank.items():
            assert value.dtype == torch.float32
            if value.ndim == 2:
                assert torch.equal(gws_compile.quantize(value.bfloat16(), "fp8_e4m3").float(), value), weight


def bf16_updates(rank, sharded):
    """Two steps of a compiled AdamW; each rank has the same gradient, of the whole batch."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = HalvableBlocks().bfloat16()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.0**-10)
    step = torch.compile(optimizer.step, backend=gws_compile.backend("bf16", inner="aot_eager"))
    for number in range(2):
        x = torch.randn(BATCH, 64, generator=torch.Generator().manual_seed(number))
        model(x.bfloat16()).float().square().mean().backward()
        for p in model.parameters():
            p.grad = p.grad.sign()
        step()
        optimizer.zero_grad()
    return {
        n: getattr(p.detach(), "full_tensor", lambda p=p: p.detach())().clone() for n, p in model.named_parameters()
    }


@pytest.mark.slow
def test_compiled_updates_of_shards():
    """AdamW moves by the learning rate, half of the spacing below 1/4: each rank rounds its part, up or down."""
    first, second = run_ranks(bf16_updates, args=(True,))
    torch.manual_seed(0)
    begun = dict(HalvableBlocks().bfloat16().named_parameters())
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert value.dtype == torch.bfloat16
    weight, before = first["first.down.weight"].double(), begun["first.down.weight"].detach().double()
    moved = (weight - before).abs()
    assert moved.max() <= 2 * 2.0**-10 + 2 * 2.0**-11  # weights below 1/8 lie 2**-11 apart, at most
    assert (moved > 0).double().mean() > 0.9
    halves = (weight - before).chunk(2)
    assert not torch.equal(*halves)


@pytest.mark.slow
def test_compiled_updates_of_replicas():
    """Plain tensors, as DDP has them: both ranks write the same."""
    first, second = run_ranks(bf16_updates, args=(False,))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
