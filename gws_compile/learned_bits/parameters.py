"""The width parameters of a backend: found, and made, by the weights and their names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..numerics.blocks import Block, clamped, matrix_shape
from ..numerics.widths import parameter_shape
from ..runtime.weight_slots import Slot
from ..settings.learned_bits import LearnedBits
from ..torch_internals.modes import plain_tensors
from ..weight_names import first_free, without_number
from .gradient_sync import GradientSync


@dataclass
class WeightWidths:
    """The widths of one weight.

    Attributes:
        parameter: b_i, see `gws_compile.numerics.widths.parameter_shape`.
        shape: the weight's.
        elements: elements of each block, float32, of the parameter's shape.
        blocks: how many blocks the weight has.
        slot: the weight; None before one has come under this name.
        only_evaluated: the weight has not been trained or prepared, and has no name: the first one that is takes these.
    """

    parameter: nn.Parameter
    shape: tuple[int, ...]
    elements: torch.Tensor
    blocks: int
    slot: Slot | None
    only_evaluated: bool = False


class WidthParameters:
    """The width parameters, one for each sampled weight, by the weight's name.

    Attributes:
        rule: how a parameter becomes a width.
        by_name: the widths there are so far: of prepared weights and of weights seen in a forward.
        frozen: the widths are fixed.
    """

    def __init__(self, settings: LearnedBits) -> None:
        self.rule = settings.rule
        self.by_name: dict[str, WeightWidths] = {}
        self.frozen = False
        self._granularity = settings.granularity
        self._prepared: dict[Slot, str] = {}
        self._loaded: dict[str, torch.Tensor] = {}
        self._sync = GradientSync()

    def prepare(self, weight: torch.Tensor, slot: Slot, batch_dims: int, block: Block) -> None:
        """Make the widths of a weight, if it has none.

        Args:
            weight: the Parameter; one on the meta device has its widths on the CPU until it comes from another device.
            slot: its place. Another weight that has its name already makes it ``name#1``, ``name#2``, ...
            batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
            block: shape of its blocks.
        """
        if slot not in self._prepared:
            self._prepared[slot] = unique = slot.name or first_free(slot.path, self._taken())
            self._get_or_make(unique, weight, slot, batch_dims, block)

    def _taken(self) -> set[str]:
        """The names that a weight which comes to be trained or prepared cannot have."""
        return {name for name, widths in self.by_name.items() if not widths.only_evaluated}

    def evaluated(self, weight: torch.Tensor, slot: Slot, batch_dims: int, block: Block) -> nn.Parameter:
        """The b_i of a weight that is evaluated.

        Evaluation gives no name: an average of the weights that is evaluated before the model's first training step is
        not the model. A weight that has no widths yet has those of the weight that it is a copy of, as far as can be
        told; or else new ones, or a loaded state's, which the first weight takes that is trained or prepared.

        Args:
            weight: as it comes into a graph.
            slot: its place.
            batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
            block: shape of its blocks.

        Raises:
            ValueError: the widths of a loaded state are of a weight, or of blocks, of another shape.
        """
        if slot.name is not None or slot in self._prepared:
            return self.parameter(weight, slot, batch_dims, block)
        own = self.find(slot)
        if own is not None:
            return own.parameter
        self._forget_gone(slot)
        name = next((name for name in self._loaded if without_number(name) == slot.path), None)
        original = self.original(slot) if name is None else None
        if original is not None:
            return original
        name = name or first_free(slot.path, self.by_name)
        parameter = self._get_or_make(name, weight, slot, batch_dims, block).parameter
        self.by_name[name].only_evaluated = True
        return parameter

    def parameter(self, weight: torch.Tensor, slot: Slot, batch_dims: int, block: Block) -> nn.Parameter:
        """The b_i of a weight that is trained, or prepared.

        Args:
            weight: as it comes into a graph.
            slot: its place, which has a name.
            batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
            block: shape of its blocks.

        Raises:
            ValueError: the widths that there are under this name are of a weight, or of blocks, of another shape.
        """
        name = self._prepared.get(slot) or slot.name
        assert name is not None
        known = self.by_name.get(name)
        if known is not None and known.slot is not slot:
            if known.only_evaluated:
                if known.shape != tuple(weight.shape):
                    del self.by_name[name]
            elif known.slot is not None and not known.slot.is_alive():
                del self.by_name[name]
            elif known.slot is not None:
                # Prepared for another weight, which is there and has not been used yet.
                self._prepared[slot] = name = first_free(slot.path, self.by_name)
        widths = self._get_or_make(name, weight, slot, batch_dims, block)
        self._sync.watch(name, widths.parameter, slot.groups)
        if widths.parameter.device != weight.device and not weight.is_meta:
            with plain_tensors():
                widths.parameter.data = widths.parameter.data.to(weight.device)
                widths.elements = widths.elements.to(weight.device)
        return widths.parameter

    def _get_or_make(self, name: str, weight: torch.Tensor, slot: Slot, batch_dims: int, block: Block) -> WeightWidths:
        known = self.by_name.get(name)
        shape = tuple(weight.shape)
        if known is not None:
            if known.shape != shape:
                raise ValueError(f"{name} has shape {shape}, but bit widths were prepared for shape {known.shape}")
            known.slot, known.only_evaluated = slot, False
            return known
        self._forget_gone(slot)
        matrices, rows, cols = matrix_shape(shape, batch_dims)
        sizes = parameter_shape(matrices, rows, cols, block, self._granularity)
        start = (self.rule.init - self.rule.target) / self.rule.slope  # 1, up to float32
        device = torch.device("cpu") if weight.is_meta else weight.device
        original = self.original(slot)
        with plain_tensors():
            parameter = nn.Parameter(torch.full(sizes, start, dtype=torch.float32, device=device))
            if (value := self._loaded.get(name)) is not None:
                _copy(name, parameter, value)
            elif original is not None and original.shape == parameter.shape:
                parameter.copy_(original)
            elements = _elements(matrices, rows, cols, clamped(block, rows, cols), sizes).to(device)
        parameter.requires_grad_(not self.frozen)
        blocks = math.prod(parameter_shape(matrices, rows, cols, block, "block"))
        made = self.by_name[name] = WeightWidths(parameter, shape, elements, blocks, slot)
        self._loaded.pop(name, None)  # not before: widths of another shape are refused at every call
        return made

    def _forget_gone(self, slot: Slot) -> None:
        """Drop the widths of weights that have gone, of which another one has come under the same name."""
        gone = [
            name
            for name, widths in self.by_name.items()
            if widths.slot is not None
            and widths.slot.path == slot.path
            and not widths.slot.is_alive()
            # A copy that was evaluated and went: what a loaded state said is still that of the model.
            and not widths.only_evaluated
        ]
        for name in gone:
            del self.by_name[name]

    def own(self, slot: Slot) -> nn.Parameter | None:
        """The b_i of a weight that has been trained or prepared; None where it has none of its own."""
        name = self._prepared.get(slot, slot.name)
        known = None if name is None else self.by_name.get(name)
        return None if known is None or known.slot is not slot else known.parameter

    def original(self, slot: Slot) -> nn.Parameter | None:
        """The b_i of the weight that one without own widths is a copy of, as far as can be told.

        That is a weight of the same name and shape: that of an average of weights, a target network, a deep copy in the
        middle of training. One that has been trained comes before others.
        """
        if self.find(slot) is not None:
            return None
        found = [
            widths
            for widths in self.by_name.values()
            if widths.slot is not None
            and widths.slot is not slot
            and widths.slot.path == slot.path
            and widths.shape == slot.shape
            and (widths.only_evaluated or widths.slot.is_alive())
        ]
        found.sort(key=lambda widths: widths.slot is None or widths.slot.seen is None)
        return found[0].parameter if found else None

    def find(self, slot: Slot) -> WeightWidths | None:
        """What there is of a weight; None for one without learned widths."""
        return next((widths for widths in self.by_name.values() if widths.slot is slot), None)

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
        with plain_tensors():
            bits = {name: value.clone() for name, value in self._loaded.items()}
            bits.update({name: widths.parameter.detach().clone() for name, widths in self.by_name.items()})
        return {"bits": bits, "frozen": int(self.frozen)}

    def check_shapes(self, bits: Mapping[str, torch.Tensor]) -> None:
        """Hold the parameters of a state to those that there are; nothing is changed.

        Raises:
            ValueError: the state has those of a weight in another shape.
        """
        for name, value in bits.items():
            if name in self.by_name:
                _check_shape(name, self.by_name[name].parameter, value)

    def restore(self, bits: Mapping[str, torch.Tensor], *, frozen: bool) -> None:
        """Continue from a state, with which `check_shapes` agrees; what is still to come waits for its weight.

        Args:
            bits: float32, the parameters by the weights' names.
            frozen: the widths are fixed.
        """
        self.frozen = frozen
        self._loaded = {name: value for name, value in bits.items() if name not in self.by_name}
        for name, widths in self.by_name.items():
            if name in bits:
                _copy(name, widths.parameter, bits[name])
            widths.parameter.requires_grad_(not frozen)


def _check_shape(name: str, parameter: nn.Parameter, value: torch.Tensor) -> None:
    if parameter.shape != value.shape:
        raise ValueError(
            f"the state was saved with bit widths of shape {tuple(value.shape)} for {name}, this backend has "
            f"{tuple(parameter.shape)}"
        )


def _copy(name: str, parameter: nn.Parameter, value: torch.Tensor) -> None:
    _check_shape(name, parameter, value)
    with plain_tensors():
        parameter.copy_(value)


def _elements(matrices: int, rows: int, cols: int, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """Elements of each block; partial blocks have fewer."""
    if not shape:
        return torch.tensor(float(matrices * rows * cols), dtype=torch.float32, device="cpu")
    sides = [
        torch.tensor([min(side, size - start) for start in range(0, size, side)], dtype=torch.float32, device="cpu")
        for size, side in ((rows, block[0]), (cols, block[1]))
    ]
    return (sides[0][:, None] * sides[1]).expand(matrices, -1, -1).reshape(shape)
