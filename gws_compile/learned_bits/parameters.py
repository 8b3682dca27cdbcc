"""The width parameters of a backend, one for each sampled weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..numerics.blocks import Block, clamped, matrix_shape
from ..numerics.widths import parameter_shape
from ..runtime.weight_slots import Slot
from ..settings.learned_bits import LearnedBits
from .by_weight import OfWeight, ParametersByWeight


@dataclass
class WeightWidths(OfWeight):
    """The widths of one weight; the parameter is b_i, see `gws_compile.numerics.widths.parameter_shape`.

    Attributes:
        elements: elements of each block, float32, of the parameter's shape.
        blocks: how many blocks the weight has.
    """

    elements: torch.Tensor
    blocks: int

    def move(self, device: torch.device) -> None:
        """Bring parameter and elements to another device."""
        super().move(device)
        self.elements = self.elements.to(device)


class WidthParameters(ParametersByWeight[WeightWidths]):
    """The width parameters, one for each sampled weight, by the weight's name.

    Args:
        settings: those of the widths.

    Attributes:
        rule: how a parameter becomes a width.
    """

    def __init__(self, settings: LearnedBits) -> None:
        super().__init__("bits", "bit widths")
        self.rule = settings.rule
        self._granularity = settings.granularity

    def prepare(self, weight: torch.Tensor, slot: Slot, batch_dims: int, block: Block) -> None:
        """See `prepare_by`, and `evaluated`."""
        self.prepare_by(partial(self._make, weight, slot, batch_dims, block), weight, slot)

    def evaluated(self, weight: torch.Tensor, slot: Slot, batch_dims: int, block: Block) -> nn.Parameter:
        """See `evaluated_by`.

        Args:
            weight: as it comes into a graph.
            slot: its place.
            batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
            block: shape of its blocks.
        """
        return self.evaluated_by(partial(self._make, weight, slot, batch_dims, block), weight, slot)

    def parameter(self, weight: torch.Tensor, slot: Slot, batch_dims: int, block: Block) -> nn.Parameter:
        """See `parameter_by`, and `evaluated`."""
        return self.parameter_by(partial(self._make, weight, slot, batch_dims, block), weight, slot)

    def _make(self, weight: torch.Tensor, slot: Slot, batch_dims: int, block: Block) -> WeightWidths:
        shape = tuple(weight.shape)
        matrices, rows, cols = matrix_shape(shape, batch_dims)
        sizes = parameter_shape(matrices, rows, cols, block, self._granularity)
        start = (self.rule.init - self.rule.target) / self.rule.slope  # 1, up to float32
        return WeightWidths(
            parameter=nn.Parameter(torch.full(sizes, start, dtype=torch.float32, device="cpu")),
            shape=shape,
            slot=slot,
            only_evaluated=False,
            elements=_elements(matrices, rows, cols, clamped(block, rows, cols), sizes),
            blocks=math.prod(parameter_shape(matrices, rows, cols, block, "block")),
        )

    def widths(self) -> dict[str, torch.Tensor]:
        """float32: the current widths by the weights' names."""
        return {name: self.rule.widths(widths.parameter) for name, widths in self.by_name.items()}

    def freeze(self, *, per_weight: bool) -> None:
        """See `gws_compile.Backend.freeze_bits`."""
        for one in self.by_name.values():
            with torch.no_grad():
                widths = self.rule.widths(one.parameter)
                if per_weight:
                    mean = (widths * one.elements).sum() / one.elements.sum()
                    widths = mean.expand(widths.shape)
                one.parameter.copy_(self.rule.parameter(self.rule.rounded(widths)))
            one.parameter.grad = None
            one.parameter.requires_grad_(False)
        self.frozen = True

    def state_dict(self) -> dict[str, Any]:
        """``"bits"``: see `values`; and ``"frozen"``, 0 or 1."""
        return {"bits": self.values(), "frozen": int(self.frozen)}


def _elements(matrices: int, rows: int, cols: int, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """Elements of each block; partial blocks have fewer."""
    if not shape:
        return torch.tensor(float(matrices * rows * cols), dtype=torch.float32, device="cpu")
    sides = [
        torch.tensor([min(side, size - start) for start in range(0, size, side)], dtype=torch.float32, device="cpu")
        for size, side in ((rows, block[0]), (cols, block[1]))
    ]
    return (sides[0][:, None] * sides[1]).expand(matrices, -1, -1).reshape(shape)
