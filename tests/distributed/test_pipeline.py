"""Pipeline parallelism on two ranks: stages draw independent noise, the micro-batches in flight see one sample."""

from collections import OrderedDict

import pytest
import torch
from support.distributed import run_ranks
from support.small_models import OneLayer
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, SplitPoint, pipeline

import gws_compile

STEPS, MICRO_BATCHES = 2, 4
VARIANTS = ("whole", "blocks", "traced")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(40, 40)

    def forward(self, x):
        return x + self.fc(x).relu()


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Block(), Block()

    def forward(self, x):
        return self.b(self.a(x))


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Stage(), Stage()

    def forward(self, x):
        return self.second(self.first(x))


def loss_function(y, x):
    return (y - x).square().mean()


def model_and_batches():
    torch.manual_seed(0)
    return Whole(), [torch.randn(8, 40) for _ in range(STEPS)]


def train(rank, variant):
    torch._dynamo.reset()
    backend = gws_compile.backend("fp6_e3m2", inner="aot_eager")
    whole, batches = model_and_batches()
    if variant == "traced":
        pipe = pipeline(whole, mb_args=(torch.randn(2, 40),), split_spec={"second": SplitPoint.BEGINNING})
        module, stage = pipe.get_stage_module(rank), pipe.build_stage(rank, torch.device("cpu"))
        module.compile(backend=backend)
    else:  # both stages call their modules alike
        module = (whole.first, whole.second)[rank]
        stage = PipelineStage(module, rank, 2, torch.device("cpu"))
        for part in (module,) if variant == "whole" else (module.a, module.b):
            part.compile(backend=backend)
    backend.report()  # knows of no stage yet, and changes nothing
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss_function)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for x in batches:
        parts = []
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=x, losses=parts)
        losses.append(sum(part.item() for part in parts) / MICRO_BATCHES)
        optimizer.step()
        optimizer.zero_grad()
    return losses, [p.detach() for p in module.parameters()], backend.state_dict()


def run_rank(rank):
    return {variant: train(rank, variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(run_rank)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_are_the_eager_oracle(ranks, variant):
    model, batches = model_and_batches()
    stages = [model.first, model.second]
    prefixes = ["stage0.first.", "stage1.second."] if variant == "traced" else ["stage0.", "stage1."]
    losses = []
    for step, x in enumerate(batches):
        values = [
            {
                n: (gws_compile.sample(p, "fp6_e3m2", name=prefix + n, step=step) if p.ndim == 2 else p.detach())
                .clone()
                .requires_grad_()
                for n, p in stage.named_parameters()
            }
            for stage, prefix in zip(stages, prefixes, strict=True)
        ]
        parts = []
        for micro in x.chunk(MICRO_BATCHES):
            y = micro
            for stage, value in zip(stages, values, strict=True):
                y = torch.func.functional_call(stage, value, (y,))
            parts.append(loss_function(y, micro))
            (parts[-1] / MICRO_BATCHES).backward()
        losses.append(sum(part.item() for part in parts) / MICRO_BATCHES)
        with torch.no_grad():
            for stage, value in zip(stages, values, strict=True):
                for name, parameter in stage.named_parameters():
                    parameter -= 0.1 * value[name].grad
    torch.testing.assert_close(ranks[1][variant][0], losses, rtol=1e-6, atol=0)
    for rank, stage in zip(ranks, stages, strict=True):
        for got, parameter in zip(rank[variant][1], stage.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.detach(), rtol=0, atol=1e-7)


def in_a_stage(name, block):
    return nn.Sequential(OrderedDict({name: nn.Sequential(OrderedDict(a=block))}))


def test_a_stage_takes_the_state_of_another(ranks):
    """A checkpoint that all ranks share holds what one of them said of its weights."""
    states = [rank["whole"][2] for rank in ranks]
    assert [name for name, _ in states[1]["weights"]] == ["stage1.a.fc.weight", "stage1.b.fc.weight"]
    backend = gws_compile.backend("fp6_e3m2", inner="eager")
    backend.load_state_dict(states[0])
    own = in_a_stage("stage1", OneLayer())
    torch.compile(own, backend=backend)(torch.randn(2, 40))  # no warning
    with pytest.raises(ValueError, match=r"stage0.a.fc.weight of shape \(40, 40\), this model has"):
        torch.compile(in_a_stage("stage0", OneLayer(8, 4)), backend=backend)(torch.randn(2, 4))
    assert [name for name, _ in backend.state_dict()["weights"]] == [
        "stage0.a.fc.weight", "stage0.b.fc.weight", "stage1.a.fc.weight"
    ]  # fmt: skip
