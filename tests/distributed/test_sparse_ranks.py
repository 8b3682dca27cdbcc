"""Sparse weights on two ranks: the run of one process, or an error that says what cannot be."""

import pytest
import torch
from support.distributed import run_ranks
from support.mask_oracle import mask_of
from support.small_models import OneLayer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import gws_compile
from gws_compile import PrunedGroups


class Held(nn.Module):
    """Reads the part of a weight that this rank has."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight)


def used_part(whole, mesh, dim, sparsity, block):
    """What a weight is used as, put together from the ranks' parts, and its gradient; or what is said."""
    torch._dynamo.reset()
    model = Held(distribute_tensor(whole, mesh, [Shard(dim)]))
    backend = gws_compile.backend("fp6_e3m2", sparsity=sparsity, block=block, inner="aot_eager")
    eye = distribute_tensor(torch.eye(whole.shape[1]), mesh, [Shard(1) if dim else Replicate()])
    try:
        out = torch.compile(model, backend=backend)(eye)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return str(error)
    used = out.full_tensor().detach().t()
    out.full_tensor().sum().backward()
    return used, model.weight.grad.full_tensor()


def sharded_whole(mesh, sparsity):
    """FSDP2 gathers the weight before it calls."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = OneLayer(24, 16, bias=False)
    fully_shard(model, mesh=mesh)
    backend = gws_compile.backend("fp6_e3m2", sparsity=sparsity, inner="aot_eager")
    return torch.compile(model, backend=backend)(torch.eye(16)).detach().t()


def run_rank(rank):
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = torch.randn(8, 24)
    return {
        "rows": used_part(whole, mesh, 0, "2:4", (1, None)),
        "columns": used_part(whole, mesh, 1, "2:4", (8, 4)),
        "cut": used_part(whole, mesh, 1, "3:8", (8, 4)),
        "groups": used_part(whole, mesh, 0, PrunedGroups(0.5), (1, None)),
        "fsdp": sharded_whole(mesh, PrunedGroups(0.5)),
    }


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(run_rank)


@pytest.mark.parametrize(("name", "block"), [("rows", (1, None)), ("columns", (8, 4))])
def test_parts_are_masked_as_the_whole(ranks, name, block):
    torch.manual_seed(0)
    whole = torch.randn(8, 24)
    mask = mask_of(whole, "2:4")
    sampled = gws_compile.sample(torch.where(mask, whole, 0), "fp6_e3m2", name="weight", block=block)
    for rank in ranks:
        used, gradient = rank[name]
        assert torch.equal(used, torch.where(mask, sampled, 0))
        assert torch.equal(gradient, torch.ones(8, 24))


def test_groups_that_lie_on_several_ranks_are_refused(ranks):
    for rank in ranks:
        assert "weight: a shard of shape (8, 12) of the whole weight (8, 24) cuts through the groups of" in rank["cut"]
        assert "sparsity='3:8': columns" in rank["cut"]
        assert "PrunedGroups are for weights of which a graph has all (FSDP2 gathers them)" in rank["groups"]


def test_fsdp2_has_whole_weights(ranks):
    torch.manual_seed(0)
    weight = OneLayer(24, 16, bias=False).fc.weight.detach()
    mask = mask_of(weight, "rows:0.5")
    sampled = gws_compile.sample(torch.where(mask, weight, 0), "fp6_e3m2", name="fc.weight")
    for rank in ranks:
        assert torch.equal(rank["fsdp"], torch.where(mask, sampled, 0))
