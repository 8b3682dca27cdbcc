"""The width parameters of a backend: found, and made, by the weights and their names."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..config import LearnedBits
from ..numerics.blocks import matrix_shape
from ..numerics.widths import parameter_shape
from ..weight_names import first_free
from .gradient_sync import GradientSync


@dataclass
class WeightWidths:
    """The widths of one weight.

    Attributes:
        parameter: b_i, see `gws_compile.numerics.widths.parameter_shape`.
        shape: the weight's.
        elements: elements of each block, float32, of the parameter's shape.
        blocks: how many blocks the weight has.
        owner: the weight, as it last came.
    """

    parameter: nn.Parameter
    shape: tuple[int, ...]
    elements: torch.Tensor
    blocks: int
    owner: weakref.ref[torch.Tensor]


class WidthParameters:
    """The width parameters, one for each sampled weight, by the weight's name.

    Attributes:
        rule: how a parameter becomes a width.
        block: block shape.
        by_name: the widths there are so far: of prepared weights and of weights seen in a forward.
        frozen: the widths are fixed.
    """

    def __init__(self, settings: LearnedBits, block: tuple[int, int]) -> None:
        self.rule = settings.rule
        self.block = block
        self.by_name: dict[str, WeightWidths] = {}
        self.frozen = False
        self._granularity = settings.granularity
        self._prepared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._loaded: dict[str, torch.Tensor] = {}
        self._sync = GradientSync()

    def prepare(self, weight: torch.Tensor, name: str, batch_dims: int, *, used: str | None) -> None:
        """Make the widths of a weight, if it has none.

        Args:
            weight: the Parameter.
            name: its qualified name; another weight that has it already makes it ``name#1``, ``name#2``, ...
            batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
            used: its unique name, where a forward has seen it.
        """
        if self._prepared.get(weight) is None:  # type: ignore[no-untyped-call]
            self._prepared[weight] = unique = used or first_free(name, self.by_name)
            self._get_or_make(unique, weight, batch_dims)

    def parameter(self, weight: torch.Tensor, name: str, batch_dims: int, groups: tuple[Any, ...] = ()) -> nn.Parameter:
        """The b_i of a weight.

        Args:
            weight: as it comes into a graph.
            name: its unique name.
            batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
            groups: the process groups over which the gradient is averaged.

        Raises:
            ValueError: the widths that there are under this name are of a weight, or of blocks, of another shape.
        """
        prepared: str | None = self._prepared.get(weight)  # type: ignore[no-untyped-call]
        known = self.by_name.get(prepared or name)
        owner = None if known is None else known.owner()
        if owner is not None and owner is not weight:
            # Prepared for another weight, which is there and has not been used yet. (Under FSDP2 the weight that was
            # prepared is gone, and another Parameter comes under its name.)
            self._prepared[weight] = prepared = first_free(name, self.by_name)
        widths = self._get_or_make(prepared or name, weight, batch_dims)
        widths.owner = weakref.ref(weight)
        self._sync.watch(prepared or name, widths.parameter, groups)
        if widths.parameter.device != weight.device:
            with torch.no_grad():
                widths.parameter.data = widths.parameter.data.to(weight.device)
                widths.elements = widths.elements.to(weight.device)
        return widths.parameter

    def _get_or_make(self, name: str, weight: torch.Tensor, batch_dims: int) -> WeightWidths:
        known = self.by_name.get(name)
        shape = tuple(weight.shape)
        if known is not None:
            if known.shape != shape:
                raise ValueError(f"{name} has shape {shape}, but bit widths were prepared for shape {known.shape}")
            return known
        matrices, rows, cols = matrix_shape(shape, batch_dims)
        sizes = parameter_shape(matrices, rows, cols, self.block, self._granularity)
        start = (self.rule.init - self.rule.target) / self.rule.slope  # 1, up to float32
        parameter = nn.Parameter(torch.full(sizes, start, dtype=torch.float32, device=weight.device))
        if (value := self._loaded.pop(name, None)) is not None:
            _copy(name, parameter, value)
        parameter.requires_grad_(not self.frozen)
        blocks = math.prod(parameter_shape(matrices, rows, cols, self.block, "block"))
        elements = _elements(matrices, rows, cols, self.block, sizes).to(weight.device)
        made = self.by_name[name] = WeightWidths(parameter, shape, elements, blocks, weakref.ref(weight))
        return made

    def find(self, weight: torch.Tensor, name: str) -> WeightWidths | None:
        """What there is of a weight, by its unique name; None for one without learned widths."""
        prepared: str | None = self._prepared.get(weight)  # type: ignore[no-untyped-call]
        return self.by_name.get(prepared or name)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name (the weight's, and ``.bits``) and b_i."""
        for name, widths in self.by_name.items():
            yield f"{name}.bits", widths.parameter

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
        """``"bits"``: the parameters by the weights' names, with those of a loaded state that are still to come.

        And ``"frozen"``, 0 or 1.
        """
        bits = {name: value.clone() for name, value in self._loaded.items()}
        bits.update({name: widths.parameter.detach().clone() for name, widths in self.by_name.items()})
        return {"bits": bits, "frozen": int(self.frozen)}

    def load_state_dict(self, state: dict[str, Any], weights: Iterable[str]) -> None:
        """Continue from `state_dict`; ``weights`` are the names that the saved run had.

        Raises:
            ValueError: the state lacks the widths of a weight, or has them in another shape.
        """
        bits = dict(state["bits"])
        if missing := [name for name in weights if name not in bits]:
            raise ValueError(
                f"the state has no bit widths for {', '.join(missing[:8])}: call Backend.prepare(model, ...) before a "
                "state is loaded by torch.distributed.checkpoint, which fills in what is there"
            )
        for name, value in bits.items():
            if name in self.by_name:
                _check_shape(name, self.by_name[name].parameter, value)  # of all, before any is copied
        self.frozen = bool(state["frozen"])
        for name, value in bits.items():
            known = self.by_name.get(name)
            if known is None:
                self._loaded[name] = value.detach().clone()
            else:
                _copy(name, known.parameter, value)
        for widths in self.by_name.values():
            widths.parameter.requires_grad_(not self.frozen)


def _check_shape(name: str, parameter: nn.Parameter, value: torch.Tensor) -> None:
    if parameter.shape != value.shape:
        raise ValueError(
            f"the state was saved with bit widths of shape {tuple(value.shape)} for {name}, this backend has "
            f"{tuple(parameter.shape)}"
        )


def _copy(name: str, parameter: nn.Parameter, value: torch.Tensor) -> None:
    _check_shape(name, parameter, value)
    with torch.no_grad():
        parameter.copy_(value)


def _elements(matrices: int, rows: int, cols: int, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """Elements of each block; partial blocks have fewer."""
    if not shape:
        return torch.tensor(float(matrices * rows * cols))
    sides = [
        torch.tensor([min(side, size - start) for start in range(0, size, side)], dtype=torch.float32)
        for size, side in ((rows, block[0]), (cols, block[1]))
    ]
    return (sides[0][:, None] * sides[1]).expand(matrices, -1, -1).reshape(shape)
