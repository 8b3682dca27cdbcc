"""The learned widths of a graph's weights, looked up when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from . import torch_internals
from .bit_widths import BitWidths
from .by_weights import ByWeights
from .gradient_sync import SumOverShards
from .keys import KeyRegistry
from .learned import parameter_shape
from .passes import LearnedInput
from .sampling import matrix_shape


class WidthTable:
    """The parameters of the widths that a graph takes, one list for each set of weights it is called with."""

    def __init__(self, bits: BitWidths, registry: KeyRegistry, inputs: Sequence[LearnedInput]) -> None:
        self._bits = bits
        self._registry = registry
        self._inputs = inputs
        self._found = ByWeights(self._look_up)

    def __call__(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The widths' parameters of these weights; of a sharded weight, this rank's part, a view."""
        found = self._found(weights)
        return [self._part(p, groups, given) for (p, groups), given in zip(found, self._inputs, strict=True)]

    def _look_up(self, weights: Sequence[torch.Tensor]) -> list[tuple[nn.Parameter, tuple[Any, ...]]]:
        """Each weight's parameter, and the process groups among which the weight is sharded."""
        self._registry.words(weights, [given.name for given in self._inputs])
        parameters = []
        for weight, given in zip(weights, self._inputs, strict=True):
            name = str(self._registry.name(weight))
            groups = self._registry.groups(weight)
            parameter = self._bits.parameter(weight, name, given.batch_dims, groups)
            parameters.append((parameter, torch_internals.shard_groups(weight)))
        return parameters

    def _part(self, parameter: nn.Parameter, groups: tuple[Any, ...], given: LearnedInput) -> torch.Tensor:
        shard = given.shard
        if shard is None:
            return parameter
        shared: torch.Tensor = SumOverShards.apply(parameter, groups)  # type: ignore[no-untyped-call]
        if parameter.ndim == 0:
            return shared
        dims, block = given.batch_dims, self._bits.block
        whole = shared.view(*shard.whole[:dims], *parameter.shape[-2:])
        for dim in range(dims):
            whole = whole.narrow(dim, shard.offset[dim], shard.local[dim])
        local = parameter_shape(*matrix_shape(shard.local, dims), block, "block")
        # Shards hold whole blocks, so a column offset in elements divides by the block's columns.
        inner = 1
        for n in shard.whole[dims + 2 :]:
            inner *= n
        whole = whole.narrow(dims, shard.offset[dims] // block[0], local[-2])
        whole = whole.narrow(dims + 1, shard.offset[dims + 1] * inner // block[1], local[-1])
        return whole.reshape(local)
