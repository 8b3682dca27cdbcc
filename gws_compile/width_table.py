"""The learned widths of a graph's weights, looked up when it is called."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import nn

from . import torch_internals
from .bit_widths import BitWidths
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
        self._found: dict[tuple[int, ...], tuple[list[weakref.ref[torch.Tensor]], list[nn.Parameter]]] = {}

    def __call__(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The widths' parameters of these weights; of a sharded weight, this rank's part, a view."""
        ids = tuple(map(id, weights))
        found = self._found.get(ids)
        if found is None or not all(ref() is w for ref, w in zip(found[0], weights, strict=True)):
            self._found = {k: v for k, v in list(self._found.items()) if all(ref() is not None for ref in v[0])}
            found = self._found[ids] = ([weakref.ref(w) for w in weights], self._look_up(weights))
        return [self._part(p, w, given) for p, w, given in zip(found[1], weights, self._inputs, strict=True)]

    def _look_up(self, weights: Sequence[torch.Tensor]) -> list[nn.Parameter]:
        self._registry.words(weights, [given.name for given in self._inputs])
        parameters = []
        for weight, given in zip(weights, self._inputs, strict=True):
            name = str(self._registry.name(weight))
            groups = self._registry.groups(weight)
            parameters.append(self._bits.parameter(weight, name, given.batch_dims, groups))
        return parameters

    def _part(self, parameter: nn.Parameter, weight: torch.Tensor, given: LearnedInput) -> torch.Tensor:
        shard = given.shard
        if shard is None:
            return parameter
        groups = torch_internals.shard_groups(weight)
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
