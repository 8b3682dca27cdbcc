"""Which Parameters the compiled graphs sample: what `Backend.metrics` and the histograms of a report are read from."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..passes import Weight
from ..torch_internals import fake_tensors
from ..weight_names import clean, first_free
from .call_stack import CallStack
from .weight_registry import WeightRegistry


@dataclass(frozen=True)
class SampledWeight:
    """A Parameter that graphs sample.

    Attributes:
        name: its unique name; where it draws noise, the name that it draws by.
        tensor: what graphs are called with.
        value: the weight as the model holds it now, a plain tensor or a DTensor, outside autograd.
        dtype: the one in which graphs read it (under FSDP2's mixed precision not the model's).
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        noisy: whether it gets noise in training.
    """

    name: str
    tensor: torch.Tensor
    value: torch.Tensor
    dtype: torch.dtype
    batch_dims: int
    noisy: bool


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: torch.dtype
    batch_dims: int
    noisy: bool
    root: weakref.ref[nn.Module] | None


class SampledWeights:
    """The Parameters that rewritten graphs were called with; weakly held, so that none is kept alive by it.

    Args:
        registry: names the Parameters that draw noise.
    """

    def __init__(self, registry: WeightRegistry) -> None:
        self._registry = registry
        self._entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def record(self, tensors: Sequence[torch.Tensor], weights: Sequence[Weight]) -> None:
        """Remember what a graph is called with, from inside the model's call.

        Args:
            tensors: the Parameters; fake ones, and those on the meta device, are passed over.
            weights: what the graph knows of each.
        """
        stack: CallStack | None = None
        for tensor, weight in zip(tensors, weights, strict=True):
            if fake_tensors.is_fake(tensor) or tensor.is_meta:
                continue
            known: _Entry | None = self._entries.get(tensor)  # type: ignore[no-untyped-call]
            if known is not None and (known.noisy or not weight.noisy):
                continue
            stack = stack or CallStack()
            root = None if stack.root is None else weakref.ref(stack.root)
            name = stack.name(tensor, weight.name)
            self._entries[tensor] = _Entry(name, weight.dtype, weight.reads[0].batch_dims, weight.noisy, root)

    def __iter__(self) -> Iterator[SampledWeight]:
        """Every Parameter that is alive, once, in the order of first use."""
        held: dict[int, dict[str, torch.Tensor]] = {}
        used: set[str] = set()
        for tensor, entry in self._entries.items():  # type: ignore[no-untyped-call]
            unique = first_free(self._registry.name(tensor) or entry.name, used)
            used.add(unique)
            root = None if entry.root is None else entry.root()
            if root is not None and id(root) not in held:
                held[id(root)] = {clean(n): p for n, p in root.named_parameters(remove_duplicate=False)}
            # Under FSDP2 graphs get the whole weight, whose memory is given back when it is not in use; the module
            # then holds the shards under its name.
            now = tensor if root is None else held[id(root)].get(entry.name, tensor)
            value = now if now.shape == tensor.shape else tensor
            yield SampledWeight(unique, tensor, value.detach(), entry.dtype, entry.batch_dims, entry.noisy)
