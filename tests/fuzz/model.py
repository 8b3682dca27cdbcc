"""A case's model: its parts one behind the other, each in what is around it, and the oracle of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .case import Case, Part
from .parts import Block, build, odd
from .reads import Reads

Call = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Rerun(torch.autograd.Function):
    """Calls a module without gradients, and in backward again with them, as reversible blocks do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ids: torch.Tensor, call: Call) -> torch.Tensor:
        ctx.call = call
        ctx.save_for_backward(x, ids)
        with torch.no_grad():
            return call(x, ids)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, ids = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.call(x, ids)
        torch.autograd.backward(y, grads)
        return x.grad, None, None


class Model(nn.Module):
    """``y = 0.7 * (x + part(x))`` for each part.

    Args:
        blocks: the parts' modules, one several times where it is called again.
        parts: what is around each.
        container: name of the child that holds the blocks.
        loop: see `fuzz.case.Case`.
        by_blocks: each block is compiled by itself.
    """

    def __init__(
        self, blocks: list[Block], parts: tuple[Part, ...], container: str, loop: bool, by_blocks: bool
    ) -> None:
        super().__init__()
        self.container, self.loop, self.by_blocks = container, loop, by_blocks
        self.around = [part.around for part in parts]
        # A module that is called again is one child.
        first = [blocks.index(block) for block in blocks]
        self.child = [sorted(set(first)).index(i) for i in first]
        self.add_module(container, nn.ModuleList(dict.fromkeys(blocks)))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if not self.loop:
            return self.from_part(0, x, ids)
        for i in range(len(self.child)):
            x = 0.7 * (x + self.call(i, x, ids))
        return x

    def from_part(self, i: int, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if i == len(self.child):
            return x
        x = 0.7 * (x + self.call(i, x, ids))
        return self.from_part(i + 1, x, ids)

    def block(self, i: int) -> Any:
        """What is called as the i-th part."""
        return getattr(self, self.container)[self.child[i]]

    def call(self, i: int, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        block, around = self.block(i), self.around[i]
        if around in ("checkpoint", "reentrant"):
            y: torch.Tensor = checkpoint(block, x, ids, use_reentrant=around == "reentrant")
            return y
        if around == "rerun":
            rerun: torch.Tensor = _Rerun.apply(x, ids, block)  # type: ignore[no-untyped-call]
            return rerun
        return _in_mode(around, block, x, ids)

    def oracle(self, x: torch.Tensor, ids: torch.Tensor, reads: Reads) -> torch.Tensor:
        """`forward` in eager torch, with what the reads are to multiply by; what recomputes changes nothing."""
        for i, around in enumerate(self.around):
            block = self.block(i)
            block = getattr(block, "_orig_mod", block)
            # Under no_grad as a whole it is an evaluation, which nothing runs again.
            reads.reruns = self.by_blocks and around in ("reentrant", "rerun") and torch.is_grad_enabled()
            x = 0.7 * (x + _in_mode(around, lambda x, ids, block=block: block.oracle(x, ids, reads), x, ids))
        return x


def _in_mode(around: str, call: Call, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    if around not in ("no_grad", "enable_grad"):
        return call(x, ids)
    with torch.no_grad():
        if around == "no_grad":
            return call(x, ids)
        with torch.enable_grad():
            return call(x, ids)


def make(case: Case) -> Model:
    """The model of a case, of its dtype; its numbers are those of torch's generator."""
    blocks: list[Block] = []
    for part in case.parts:
        block = blocks[part.again] if part.again is not None else build(part)
        if part.tied is not None:
            weight = blocks[part.tied].get_parameter(block.main)
            path, _, name = block.main.rpartition(".")
            setattr(block.get_submodule(path), name, weight)
        blocks.append(block)
    model = odd(Model, case.oddity)(blocks, case.parts, case.container, case.loop, "blocks" in case.compiled)
    model.to(getattr(torch, case.dtype))
    for block, part in zip(blocks, case.parts, strict=True):
        if part.frozen:
            block.requires_grad_(False)
    assert isinstance(model, Model)
    return model


def compile_as(case: Case, model: Model, backend: Any) -> nn.Module:
    """Give the model to torch.compile; what is then to be called."""
    if case.compiled == "whole":
        whole: nn.Module = torch.compile(model, backend=backend, fullgraph=case.settings.resample == "forward")
        return whole
    if case.compiled == "in place":
        model.compile(backend=backend)
        return model
    children = getattr(model, case.container)
    for i, block in enumerate(children):
        if case.compiled == "blocks":
            block.compile(backend=backend)
        else:
            children[i] = torch.compile(block, backend=backend)
    return model


class OracleCall(nn.Module):
    """Calls a model's oracle, from inside ``functional_call`` too."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, ids: torch.Tensor, reads_of: Callable[[nn.Module], Reads]) -> Any:
        reads = reads_of(self)
        return self.model.oracle(x, ids, reads), reads
