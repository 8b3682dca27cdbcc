"""FSDP2 (`fully_shard`) on two ranks: the run of an eager oracle in one process.

Compiled block by block and as a whole, with and without resharding after forward, in float32 and with bfloat16
parameters.
"""

import copy
import itertools
import warnings

import pytest
import torch
from support import eager
from support.distributed import run_ranks
from support.small_models import Net, TwoBlocks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import gws_compile

STEPS, BATCH = 3, 8
VARIANTS = [
    f"{compiled}-{reshard}-{dtype}"
    for compiled, reshard, dtype in itertools.product(("blocks", "whole"), ("reshard", "keep"), ("float32", "bfloat16"))
] + ["loop", "blocks-reshard-float32-scheduled"]
SCHEDULE = gws_compile.Schedule(start=1, bits=((1, 6.0), (2, 3.0)))


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.out = nn.ModuleList([Net(), Net()]), nn.Linear(40, 24)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def loss_of(call, x):
    return call(x).float().square().mean()


def model_and_batches(variant):
    torch.manual_seed(0)
    model = Loop() if variant == "loop" else TwoBlocks(features=24)
    return model, [torch.randn(BATCH, 40).chunk(2) for _ in range(STEPS)]


def train(rank, mesh, variant):
    torch._dynamo.reset()
    model, batches = model_and_batches(variant)
    compiled, reshard, dtype = variant.split("-")[:3] if "-" in variant else ("whole", "reshard", "float32")
    schedule = SCHEDULE if "scheduled" in variant else None
    blocks = list(model.blocks) if variant == "loop" else [model.first, model.second]
    settings = {"mesh": mesh, "reshard_after_forward": reshard == "reshard"}
    if dtype == "bfloat16":
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    for module in [*blocks, model]:
        fully_shard(module, **settings)
    backend = gws_compile.backend("fp6_e3m2", schedule=schedule, inner="aot_eager")
    if compiled == "whole":
        model = torch.compile(model, backend=backend)
    else:
        for block in blocks:
            block.compile(backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gws_compile.GwsWarning)
        for x in batches:
            loss = loss_of(model, x[rank])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    state = {name.removeprefix("_orig_mod."): value.full_tensor().detach() for name, value in model.named_parameters()}
    said = [str(w.message) for w in caught if w.category is gws_compile.GwsWarning]
    return losses, state, backend.state_dict(), said


def run_rank(rank):
    mesh = init_device_mesh("cpu", (2,))
    return {variant: train(rank, mesh, variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(run_rank)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_are_the_eager_oracle(ranks, variant):
    model, batches = model_and_batches(variant)
    sampled = [n for n, p in model.named_parameters() if p.ndim == 2]
    if "blocks" in variant or variant == "loop":
        sampled.remove("out.weight")  # not in a compiled block; behind a graph break in a loop
    dtype = torch.bfloat16 if variant.endswith("bfloat16") else None
    oracle = copy.deepcopy(model)

    def call_as_fsdp(call, x):  # FSDP casts the inputs to the dtype of the parameters
        return loss_of(call, x.to(dtype or x.dtype))

    schedule = SCHEDULE if "scheduled" in variant else None
    losses = eager.train(oracle, batches, call_as_fsdp, sampled, "fp6_e3m2", dtype=dtype, schedule=schedule)
    mean = [sum(pair) / 2 for pair in zip(*(rank[variant][0] for rank in ranks), strict=True)]
    torch.testing.assert_close(mean, losses, rtol=1e-6, atol=0)
    for _, state, _, _ in (rank[variant] for rank in ranks):
        for name, parameter in oracle.named_parameters():
            torch.testing.assert_close(state[name], parameter.detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_are_those_of_one_process(ranks, variant):
    model, _ = model_and_batches(variant)
    expected = {n: list(p.shape) for n, p in model.named_parameters() if p.ndim == 2}
    if "blocks" in variant or variant == "loop":
        expected.pop("out.weight")
    for rank in ranks:
        state = rank[variant][2]
        assert state["step"] == STEPS
        assert dict(map(tuple, state["weights"])) == expected


def test_a_weight_behind_a_graph_break_in_a_loop_is_named(ranks):
    for rank in ranks:
        (said,) = rank["loop"][3]
        assert "trained without noise, since no compiled graph has them: out.weight." in said
        assert rank["whole-reshard-float32"][3] == []
