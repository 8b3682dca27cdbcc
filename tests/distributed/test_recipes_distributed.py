"""Recipes on two ranks (DDP, FSDP2, tensor parallelism): gradients are those of the eager oracle in one process."""

import pytest
import torch
import torch.distributed as dist
from support.distributed import run_ranks
from support.recipe_oracle import RecipeOracle
from support.small_models import HalvableBlocks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gws_compile
from gws_compile import Operand

BATCH = 8
MX = {"recipe": "mxfp8", "exclude": (), "inner": "aot_eager"}
STOCHASTIC = {
    "fmt": "mxfp4", "noise": "none", "activations": "mxfp4", "gradients": Operand("mxfp4", rounding="stochastic"),
    "exclude": (), "inner": "aot_eager",
}  # fmt: skip
SETTINGS = {"nearest": MX, "stochastic": STOCHASTIC}


def model_and_batch():
    torch.manual_seed(0)
    return HalvableBlocks(), torch.randn(BATCH, 64)


def loss_of(call, x):
    return call(x).square().mean()


def gradients(model):
    return {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)().clone() for n, p in model.named_parameters()}


def data_parallel(rank, settings):
    torch._dynamo.reset()
    model, x = model_and_batch()
    wrapped = DistributedDataParallel(model)
    loss_of(torch.compile(wrapped, backend=gws_compile.backend(**settings)), x.chunk(2)[rank]).backward()
    return gradients(model)


def fully_sharded(rank, settings):
    torch._dynamo.reset()
    model, x = model_and_batch()
    mesh = init_device_mesh("cpu", (2,))
    for module in (model.first, model.second, model):
        fully_shard(module, mesh=mesh)
    backend = gws_compile.backend(**settings)
    for block in (model.first, model.second):
        block.compile(backend=backend)
    loss_of(model, x.chunk(2)[rank]).backward()
    return gradients(model)


def tensor_parallel(rank, settings):
    torch._dynamo.reset()
    model, x = model_and_batch()
    mesh = init_device_mesh("cpu", (2,))
    for block in (model.first, model.second):
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    backend = gws_compile.backend(**settings)
    loss_of(torch.compile(model, backend=backend), x).backward()
    kinds = sorted((p.weight, p.kind) for p in backend.report().products if p.weight)
    return gradients(model), kinds


def _run(rank):
    found = {}
    for name, settings in SETTINGS.items():
        found[name] = {
            "ddp": data_parallel(rank, settings),
            "fsdp": fully_sharded(rank, settings),
            "tp": tensor_parallel(rank, settings),
        }
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(_run)


def oracle(settings, chunks):
    """The average of the gradients of some batches."""
    model, x = model_and_batch()
    names = {p: n for n, p in model.named_parameters() if p.ndim == 2}
    total = {}
    for chunk in x.chunk(chunks):
        model.zero_grad()
        with RecipeOracle(gws_compile.backend(**settings).config, names):
            loss_of(model, chunk).backward()
        for name, gradient in gradients(model).items():
            total[name] = total.get(name, 0) + gradient / chunks
    return total


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_batches_of_ranks(ranks, how, settings):
    """Each rank rounds its own batch, with the same words."""
    wanted = oracle(SETTINGS[settings], 2)
    for rank in ranks:
        got = rank[settings][how]
        assert [n for n in wanted if not torch.allclose(got[n], wanted[n], rtol=1e-5, atol=1e-8)] == []


def test_halves_of_layers(ranks):
    """Column-wise, then row-wise: blocks lie within a rank's half, so the products are those of the whole layer."""
    wanted = oracle(MX, 1)
    for rank in ranks:
        got, kinds = rank["nearest"]["tp"]
        assert [n for n in wanted if not torch.allclose(got[n], wanted[n], rtol=1e-4, atol=1e-7)] == []
        weights = [f"{b}.{w}.weight" for b in ("first", "second") for w in ("down", "up")]
        kinds_of_each = ["dgrad", "forward", "wgrad"]
        # The model's input needs no gradient.
        assert kinds == sorted((w, k) for w in weights for k in kinds_of_each if (w, k) != ("first.up.weight", "dgrad"))


def test_ranks_agree_on_what_is_drawn(ranks):
    for how in ("ddp", "fsdp"):
        left, right = (rank["stochastic"][how] for rank in ranks)
        assert all(torch.equal(left[n], right[n]) for n in left)
    (left, _), (right, _) = (rank["stochastic"]["tp"] for rank in ranks)
    assert all(torch.equal(left[n], right[n]) for n in left)
