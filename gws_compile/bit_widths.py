"""The learned bit widths of a backend: their parameters, by the weights' names."""

from __future__ import annotations

import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from .bit_history import BitHistory
from .gradient_sync import GradientSync
from .learned import LearnedBits, WidthRule, parameter_shape, width_gradient
from .primitives import TorchPrimitives
from .report import BitsSummary
from .sampling import matrix_shape
from .steering import Steering
from .warning import GwsWarning

_PATIENCE = 10
"""Optimizer steps within which some optimizer should have taken the widths."""


@dataclass
class Entry:
    """The widths of one weight.

    Attributes:
        parameter: b_i, see `gws_compile.learned.parameter_shape`.
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


class BitWidths:
    """Parameters of learned widths, one for each sampled weight, by the weight's name.

    Attributes:
        rule: how a parameter becomes a width.
        block: block shape.
        entries: what there is so far: of prepared weights and of weights seen in a forward.
        history: how the widths moved.
        steering: the multiplier that leads to `LearnedBits.average`; None without.
    """

    def __init__(self, settings: LearnedBits, block: tuple[int, int]) -> None:
        self.settings = settings
        self.rule = WidthRule.of(settings)
        self.entries: dict[str, Entry] = {}
        self.steering = None if settings.average is None else Steering(settings.average)
        self.frozen = False
        self.block = block
        self.history = BitHistory(self.rule.min, self.rule.max)
        self._prepared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._loaded: dict[str, torch.Tensor] = {}
        self._sync = GradientSync()
        self._followed = False
        self._waited = 0

    # --- Finding the parameters --------------------------------------------------------------------------------------

    def prepare(self, weight: torch.Tensor, name: str, batch_dims: int, *, used: str | None) -> None:
        """Make the widths of a weight, if it has none.

        Args:
            weight: the Parameter.
            name: its qualified name; another weight that has it already makes it ``name#1``, ``name#2``, ...
            batch_dims: see `gws_compile.sampling.matrix_shape`.
            used: its unique name, where a forward has seen it.
        """
        if self._prepared.get(weight) is None:  # type: ignore[no-untyped-call]
            self._prepared[weight] = unique = used or self._free(name)
            self._entry(unique, weight, batch_dims)

    def _free(self, name: str) -> str:
        names = (name if i == 0 else f"{name}#{i}" for i in itertools.count())
        return next(n for n in names if n not in self.entries)

    def parameter(self, weight: torch.Tensor, name: str, batch_dims: int, groups: tuple[Any, ...] = ()) -> nn.Parameter:
        """The b_i of a weight.

        Args:
            weight: as it comes into a graph.
            name: its unique name.
            batch_dims: see `gws_compile.sampling.matrix_shape`.
            groups: the process groups over which the gradient is averaged.
        """
        prepared: str | None = self._prepared.get(weight)  # type: ignore[no-untyped-call]
        known = self.entries.get(prepared or name)
        owner = None if known is None else known.owner()
        if owner is not None and owner is not weight:
            # Prepared for another weight, which is there and has not been used yet. (Under FSDP2 the weight that was
            # prepared is gone, and another Parameter comes under its name.)
            self._prepared[weight] = prepared = self._free(name)
        entry = self._entry(prepared or name, weight, batch_dims)
        entry.owner = weakref.ref(weight)
        self._sync.watch(prepared or name, entry.parameter, groups)
        if entry.parameter.device != weight.device:
            with torch.no_grad():
                entry.parameter.data = entry.parameter.data.to(weight.device)
                entry.elements = entry.elements.to(weight.device)
        return entry.parameter

    def _entry(self, name: str, weight: torch.Tensor, batch_dims: int) -> Entry:
        entry = self.entries.get(name)
        shape = tuple(weight.shape)
        if entry is not None:
            if entry.shape != shape:
                raise ValueError(f"{name} has shape {shape}, but bit widths were prepared for shape {entry.shape}")
            return entry
        matrices, rows, cols = matrix_shape(shape, batch_dims)
        sizes = parameter_shape(matrices, rows, cols, self.block, self.settings.granularity)
        start = (self.rule.init - self.rule.target) / self.rule.slope  # 1, up to float32
        parameter = nn.Parameter(torch.full(sizes, start, dtype=torch.float32, device=weight.device))
        if (value := self._loaded.pop(name, None)) is not None:
            _copy(name, parameter, value)
        parameter.requires_grad_(not self.frozen)
        blocks = math.prod(parameter_shape(matrices, rows, cols, self.block, "block"))
        elements = _elements(matrices, rows, cols, self.block, sizes).to(weight.device)
        entry = self.entries[name] = Entry(parameter, shape, elements, blocks, weakref.ref(weight))
        return entry

    def entry(self, weight: torch.Tensor, name: str) -> Entry | None:
        """What there is of a weight, by its unique name; None for one without learned widths."""
        prepared: str | None = self._prepared.get(weight)  # type: ignore[no-untyped-call]
        return self.entries.get(prepared or name)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name (the weight's, and ``.bits``) and b_i."""
        for name, entry in self.entries.items():
            yield f"{name}.bits", entry.parameter

    # --- Reading them ------------------------------------------------------------------------------------------------

    def widths(self) -> dict[str, torch.Tensor]:
        """float32: the current widths by the weights' names."""
        return {name: self.rule.widths(entry.parameter) for name, entry in self.entries.items()}

    def summary(self) -> BitsSummary | None:
        """Average, formats and bytes, of each weight and of all; None while no weight is known."""
        if not self.entries:
            return None
        by_weight = {name: self._summary(entry) for name, entry in self.entries.items()}
        sizes = {name: math.prod(entry.shape) for name, entry in self.entries.items()}
        total = sum(sizes.values())

        def mean(value: Callable[[BitsSummary], float]) -> float:
            return sum(value(summary) * sizes[name] for name, summary in by_weight.items()) / total

        return BitsSummary(
            average=mean(lambda s: s.average),
            share={fmt.name: mean(lambda s, f=fmt.name: s.share[f]) for fmt in self.rule.formats},  # type: ignore[misc]
            stored_bytes=sum(s.stored_bytes for s in by_weight.values()),
            by_weight=by_weight,
        )

    def average_of(self, entry: Entry) -> float:
        """A weight's average width over its elements."""
        elements = entry.elements.double()
        return float((self.rule.widths(entry.parameter).double() * elements).sum() / elements.sum())

    def _summary(self, entry: Entry) -> BitsSummary:
        widths, elements = self.rule.widths(entry.parameter).double(), entry.elements.double()
        index, total = self.rule.index(widths), elements.sum()
        counts = [float(elements[index == i].sum()) for i in range(len(self.rule.formats))]
        stored = sum(n * fmt.storage_bits / 8 for n, fmt in zip(counts, self.rule.formats, strict=True))
        scaled = torch.tensor([fmt.scaled for fmt in self.rule.formats], device=index.device)[index]
        blocks = entry.blocks if widths.ndim == 0 else 1
        return BitsSummary(
            average=self.average_of(entry),
            share={fmt.name: n / float(total) for n, fmt in zip(counts, self.rule.formats, strict=True)},
            stored_bytes=round(stored + int(scaled.sum()) * blocks),
            by_weight={},
        )

    def average(self) -> float:
        """The average width over all elements."""
        widths, shares = self._flat(self.entries.values())
        return float((widths.detach() * shares).sum())

    def _flat(self, entries: Iterable[Entry]) -> tuple[torch.Tensor, torch.Tensor]:
        """All widths in a row, and the share of all elements that each has."""
        entries = list(entries)
        if not entries:
            raise RuntimeError(
                "no weight with learned bits is known yet: call this after the first forward, or "
                "Backend.prepare(model, ...) before"
            )
        device = entries[0].parameter.device
        flat = torch.cat([entry.parameter.reshape(-1).to(device) for entry in entries])
        elements = torch.cat([entry.elements.reshape(-1).to(device) for entry in entries])
        widths: torch.Tensor = _Widths.apply(flat, self.rule)  # type: ignore[no-untyped-call]
        return widths, elements / elements.sum()

    # --- Steering ----------------------------------------------------------------------------------------------------

    def loss(self, weighting: str) -> torch.Tensor:
        """See `gws_compile.Backend.bit_loss`."""
        if weighting not in ("weight", "size"):
            raise ValueError(f"weighting must be 'weight' or 'size', got {weighting!r}")
        widths, shares = self._flat(self.entries.values())
        if self.steering is not None:
            return self.steering.loss((widths * shares).sum())
        counts = [entry.parameter.numel() for entry in self.entries.values()]
        sizes = [entry.elements.sum() for entry in self.entries.values()]
        if weighting == "weight":
            each = [torch.full((n,), 1 / (n * len(counts)), device=widths.device) for n in counts]
        else:
            total = torch.stack([s.to(widths.device) for s in sizes]).sum()
            each = [(s.to(widths.device) / (total * n)).expand(n) for s, n in zip(sizes, counts, strict=True)]
        return ((widths - self.rule.target).abs() * torch.cat(each)).sum()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Behind an optimizer's step: move the multiplier; notice widths that no optimizer holds."""
        if self.frozen or not self.entries:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        entries = [entry for entry in self.entries.values() if id(entry.parameter) in held]
        if not entries:
            self._notice_unfollowed()
            return
        self._followed = True
        due = self.history.due()
        if not due and self.steering is None:
            return
        with torch.no_grad():
            widths, shares = self._flat(self.entries.values())
        if due:
            self.history.record(widths, shares)
        if self.steering is not None:
            grads = [_gradient(entry.parameter).reshape(-1).to(widths.device) for entry in self.entries.values()]
            self.steering.update((widths * shares).sum(), torch.cat(grads) / self.rule.slope, shares)

    def _notice_unfollowed(self) -> None:
        if self._followed or all(entry.parameter.grad is None for entry in self.entries.values()):
            return
        self._waited += 1
        if self._waited == _PATIENCE:
            warnings.warn(
                f"{_PATIENCE} optimizer steps, and no optimizer has the bit widths, which do get gradients: give "
                "Backend.parameters() to one, after Backend.prepare(model, ...) or the first forward",
                GwsWarning,
                stacklevel=2,
            )

    # --- Fixing them -------------------------------------------------------------------------------------------------

    def freeze(self, *, per_weight: bool) -> None:
        """See `gws_compile.Backend.freeze_bits`."""
        for entry in self.entries.values():
            with torch.no_grad():
                widths = self.rule.widths(entry.parameter)
                if per_weight:
                    mean = (widths * entry.elements).sum() / entry.elements.sum()
                    widths = mean.expand(widths.shape)
                entry.parameter.copy_(self.rule.parameter(self.rule.rounded(widths)))
            entry.parameter.grad = None
            entry.parameter.requires_grad_(False)
        self.frozen = True

    # --- Saving ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        bits = {name: value.clone() for name, value in self._loaded.items()}
        bits.update({name: entry.parameter.detach().clone() for name, entry in self.entries.items()})
        state: dict[str, Any] = {"bits": bits, "frozen": int(self.frozen)}
        if self.steering is not None:
            state["steering"] = self.steering.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], weights: Iterable[str]) -> None:
        """Continue from `state_dict`; ``weights`` are the names that the saved run had."""
        bits = dict(state["bits"])
        if missing := [name for name in weights if name not in bits]:
            raise ValueError(
                f"the state has no bit widths for {', '.join(missing[:8])}: call Backend.prepare(model, ...) before a "
                "state is loaded by torch.distributed.checkpoint, which fills in what is there"
            )
        for name, value in bits.items():
            if name in self.entries:
                _check_shape(name, self.entries[name].parameter, value)  # of all, before any is copied
        self.frozen = bool(state["frozen"])
        for name, value in bits.items():
            entry = self.entries.get(name)
            if entry is None:
                self._loaded[name] = value.detach().clone()
            else:
                _copy(name, entry.parameter, value)
        for entry in self.entries.values():
            entry.parameter.requires_grad_(not self.frozen)
        if self.steering is not None:
            self.steering.load_state_dict(state["steering"])


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


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _elements(matrices: int, rows: int, cols: int, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """Elements of each block; partial blocks have fewer."""
    if not shape:
        return torch.tensor(float(matrices * rows * cols))
    sides = [
        torch.tensor([min(side, size - start) for start in range(0, size, side)], dtype=torch.float32)
        for size, side in ((rows, block[0]), (cols, block[1]))
    ]
    return (sides[0][:, None] * sides[1]).expand(matrices, -1, -1).reshape(shape)


class _Widths(torch.autograd.Function):
    """Parameters to widths; the gradient is `gws_compile.learned.width_gradient`."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, rule: WidthRule) -> torch.Tensor:
        ctx.save_for_backward(parameter)
        ctx.rule = rule
        return rule.widths(parameter)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (parameter,) = ctx.saved_tensors
        return torch.as_tensor(width_gradient(TorchPrimitives(), grad.contiguous(), parameter, ctx.rule)), None
