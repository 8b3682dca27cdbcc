"""Fake tensors, which have shape, dtype and device, but no values: Dynamo traces on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .lookup import find

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

Tree = TypeVar("Tree")
"""Tensors and other values, in nested tuples, lists and dicts."""


def fake_mode() -> FakeTensorMode:
    """A new mode for fake tensors, in which a model may also meet real ones.

    Relies on ``torch._subclasses.fake_tensor.FakeTensorMode``. Checked on torch 2.11 to 2.15.
    """
    mode: FakeTensorMode = find("torch._subclasses.fake_tensor", "FakeTensorMode")(allow_non_fake_inputs=True)
    return mode


def is_fake(value: object) -> bool:
    """Whether a tensor is a FakeTensor: DDP's graph splitting calls the compiled function with such while compiling.

    Relies on ``torch._subclasses.fake_tensor.FakeTensor``. Checked on torch 2.11 to 2.15.
    """
    return isinstance(value, find("torch._subclasses.fake_tensor", "FakeTensor"))


def any_fake(values: Sequence[object]) -> bool:
    """Whether one of the values `is_fake`; asked in every call, so each type is asked once.

    Relies on ``torch._subclasses.fake_tensor.FakeTensor``. Checked on torch 2.11 to 2.15.
    """
    fake = find("torch._subclasses.fake_tensor", "FakeTensor")
    return any(issubclass(kind, fake) for kind in set(map(type, values)))


def fake_like(value: torch.Tensor, example: object) -> object:
    """A fake form of ``value`` in the mode of ``example``, for a placeholder's metadata; ``value`` if it has no mode.

    Relies on ``torch._guards.detect_fake_mode``, which also looks into a DTensor. Checked on torch 2.11 to 2.15.
    """
    mode = find("torch._guards", "detect_fake_mode")([example])
    return mode.from_tensor(value, static_shapes=True) if mode is not None else value


def in_one_mode(values: Sequence[Any], made: Sequence[torch.Tensor]) -> list[Any]:
    """Fake tensors, and behind them others of fixed shapes, made anew in the mode of the first.

    While it compiles, Dynamo has another mode than the one that it traced in.

    Relies on ``torch._guards.detect_fake_mode``. Checked on torch 2.11 to 2.15.
    """
    mode = find("torch._guards", "detect_fake_mode")(list(values))
    if mode is None:
        return [*values, *made]
    with mode:
        again = [
            torch.empty(one.shape, dtype=one.dtype, device=one.device).requires_grad_(one.requires_grad) for one in made
        ]
    return [*values, *again]


def map_tensors(function: Callable[[torch.Tensor], object], tree: Tree) -> Tree:
    """The same nest of tuples, lists and dicts, with what the function makes of each tensor.

    Relies on ``torch.utils._pytree.tree_map_only``. Checked on torch 2.11 to 2.15.
    """
    mapped: Tree = find("torch.utils._pytree", "tree_map_only")(torch.Tensor, function, tree)
    return mapped


def shares_storage(one: object, other: object) -> bool:
    """Whether two tensors lie in the same memory, or may do so: what is no tensor may be anything.

    Relies on ``torch._C._is_alias_of``. Checked on torch 2.11 to 2.15.
    """
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return True
    return bool(find("torch._C", "_is_alias_of")(one, other))
