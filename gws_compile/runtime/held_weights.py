"""Where the weights of a model stand: which module holds each, under which name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..torch_internals.modules import held_parameters
from ..weight_names import is_wrapper_component


@dataclass(frozen=True, eq=False)
class HeldWeight:
    """A Parameter, or what stands in for one, in a module of a model.

    Attributes:
        name: its qualified name in the model, without the components that wrappers insert.
        owner: the module that holds it.
        attribute: its name there.
        tensor: itself.
    """

    name: str
    owner: nn.Module
    attribute: str
    tensor: torch.Tensor


def held_weights(root: nn.Module) -> Iterator[HeldWeight]:
    """Every Parameter of a model at each of its places, in the order of ``named_parameters``.

    A tied one comes once for each module that holds it; a module that stands at several places comes once.
    """
    return _held(root, (), set())


def _held(module: nn.Module, path: tuple[str, ...], seen: set[int]) -> Iterator[HeldWeight]:
    if id(module) in seen:
        return
    seen.add(id(module))
    for attribute, tensor in held_parameters(module).items():
        if tensor is not None:
            yield HeldWeight(".".join((*path, attribute)), module, attribute, tensor)
    for child, inside in module.named_children():
        yield from _held(inside, path if is_wrapper_component(module, child) else (*path, child), seen)
