"""The learned widths of a graph's weights, as its bindings look them up and as it takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..numerics.blocks import clamped, matrix_shape
from ..numerics.shards import ShardRange
from ..numerics.widths import parameter_shape
from ..passes import LearnedInput
from ..runtime.weight_registry import WeightRegistry
from ..runtime.weight_slots import Slot
from ..torch_internals import distributed
from .gradient_sync import SumOverShards
from .parameters import WidthParameters


@dataclass(frozen=True)
class BoundWidth:
    """The width parameter of a weight that a graph is called with.

    Attributes:
        parameters: the widths there are.
        slot: the weight.
        found: b_i, of the whole weight, as it was when the graph was first called with the weight.
        groups: the process groups among which the weight is sharded.
        given: what the graph knows of the weight.
    """

    parameters: WidthParameters
    slot: Slot
    found: nn.Parameter
    groups: tuple[Any, ...]
    given: LearnedInput

    def tensor(self) -> torch.Tensor:
        """The parameter; of a sharded weight, this rank's part, a view."""
        # A copy that is trained from here on has widths of its own.
        own = self.parameters.own(self.slot)
        parameter = self.found if own is None else own
        shard = self.given.shard
        if shard is None:
            return parameter
        shared: torch.Tensor = SumOverShards.apply(parameter, self.groups)  # type: ignore[no-untyped-call]
        return shared if parameter.ndim == 0 else _part(shared, shard, self.given)


def _part(whole: torch.Tensor, shard: ShardRange, given: LearnedInput) -> torch.Tensor:
    """The blocks of a shard.

    Args:
        whole: b_i of the blocks of the whole weight, see `gws_compile.numerics.widths.parameter_shape`.
        shard: the part of the weight.
        given: what the graph knows of the weight.
    """
    batch_dims = given.batch_dims
    block = clamped(given.block, *matrix_shape(shard.whole, batch_dims)[1:])
    part = whole.view(*shard.whole[:batch_dims], *whole.shape[-2:])
    for dim in range(batch_dims):
        part = part.narrow(dim, shard.offset[dim], shard.local[dim])
    local = parameter_shape(*matrix_shape(shard.local, batch_dims), block, "block")
    # Shards hold whole blocks, so a column offset in elements divides by the block's columns.
    inner = math.prod(shard.whole[batch_dims + 2 :])
    part = part.narrow(batch_dims, shard.offset[batch_dims] // block[0], local[-2])
    part = part.narrow(batch_dims + 1, shard.offset[batch_dims + 1] * inner // block[1], local[-1])
    return part.reshape(local)


class WidthFinder:
    """Looks up the width parameters that one graph takes; a `gws_compile.runtime.binding.FindWidths`.

    Args:
        parameters: those there are; of a weight without, they are made.
        registry: names the weights.
        inputs: the weights whose widths the graph takes.
    """

    def __init__(self, parameters: WidthParameters, registry: WeightRegistry, inputs: Sequence[LearnedInput]) -> None:
        self._parameters = parameters
        self._registry = registry
        self._inputs = inputs

    def __call__(
        self, weights: Sequence[torch.Tensor], slots: Sequence[Slot], noisy: Sequence[bool]
    ) -> list[BoundWidth]:
        """The width parameters of these weights.

        Raises:
            ValueError: widths of another shape were prepared or loaded for a weight.
        """
        return [self._find(*found) for found in zip(weights, slots, noisy, self._inputs, strict=True)]

    def _find(self, weight: torch.Tensor, slot: Slot, noisy: bool, given: LearnedInput) -> BoundWidth:
        if noisy:
            self._registry.register([slot])
            parameter = self._parameters.parameter(weight, slot, given.batch_dims, given.block)
        else:
            parameter = self._parameters.evaluated(weight, slot, given.batch_dims, given.block)
        groups = distributed.shard_groups(weight)
        return BoundWidth(self._parameters, slot, parameter, groups, given)
