"""Regions of a forward that autograd runs again inside backward: what of them is on the Python stack."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType

import torch

_AUTOGRAD = "torch.autograd.function"
_CHECKPOINT = "torch.utils.checkpoint"
_MODULE = "torch.nn.modules.module"


@dataclass(frozen=True)
class Region:
    """A call of an ``autograd.Function``, or the region of a checkpoint, that the current call lies in.

    Attributes:
        token: the same object in its forward and wherever backward runs it again; it allows weak references.
        differentiated: in the forward of a Function whose backward is going to run. It is called with gradients
            disabled, and its backward, if it calls the model again, enables them.
    """

    token: object
    differentiated: bool


def regions() -> Iterator[Region]:
    """The regions of this thread's stack, from the inside outwards.

    Relies on the context being the first argument of a Function's forward and backward, on its ``next_functions``,
    empty where nothing is differentiated, and on ``torch.utils.checkpoint``: a checkpoint that is not re-entrant has a
    ``_CheckpointFrame``, in ``unpack_hook`` and in the generator ``gen`` of ``checkpoint``, from 2.14 on of
    ``_checkpoint_impl``.
    Checked on torch 2.11 to 2.15.
    """
    last: object = None
    for frame in _frames():
        name = frame.f_code.co_name
        if name in ("checkpoint", "_checkpoint_impl", "unpack_hook") and frame.f_globals.get("__name__") == _CHECKPOINT:
            token = _checkpoint_frame(frame)
            if token is not None:
                yield Region(token, differentiated=False)
        elif _may_be_of_function(frame):
            context = _context(frame)
            if context is not None and context is not last:  # a decorator, and what it is around
                last = context
                yield Region(context, bool(context.next_functions) and not torch.is_grad_enabled())


def inside_function_forward() -> bool:
    """Whether the call lies in the forward of an ``autograd.Function`` that has no context: one with ``setup_context``.

    Of such a one it cannot be told whether it is differentiated.

    Relies on what `regions` relies on. Checked on torch 2.11 to 2.15.
    """
    return any(
        frame.f_code.co_name == "forward"
        and _may_be_of_function(frame)
        and _context(frame) is None
        and _is_forward_of_function(frame.f_code)
        for frame in _frames()
    )


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _may_be_of_function(frame: FrameType) -> bool:
    """Whether a frame may be the forward or backward of an ``autograd.Function``, and is not that of a module.

    Whose variables are read is chosen with care: up to Python 3.12 a frame keeps a copy of what was read, and with it
    alive what its function deletes later on. Up to torch 2.13 both are called by ``apply``, a Python function; from
    2.14 on a forward is called by C++.
    """
    caller = frame.f_back
    called_by = None if caller is None else caller.f_globals.get("__name__")
    if caller is not None and caller.f_code.co_name in ("apply", "apply_boxed") and called_by == _AUTOGRAD:
        return True  # whatever a decorator calls it
    return frame.f_code.co_name in ("forward", "backward", "vjp") and called_by != _MODULE


def _is_forward_of_function(code: CodeType) -> bool:
    kinds = [torch.autograd.Function]
    for kind in kinds:
        kinds += type.__subclasses__(kind)
        if getattr(inspect.unwrap(kind.forward), "__code__", None) is code:
            return True
    return False


def _context(frame: FrameType) -> torch.autograd.function.BackwardCFunction | None:
    """The first argument of a forward or backward, also where a decorator takes all of them as a tuple."""
    names = frame.f_code.co_varnames[:1]
    first = frame.f_locals.get(names[0]) if names else None
    if isinstance(first, tuple) and first:
        first = first[0]
    return first if isinstance(first, torch.autograd.function.BackwardCFunction) else None


def _checkpoint_frame(frame: FrameType) -> object | None:
    if frame.f_code.co_name == "unpack_hook":
        return frame.f_locals.get("frame")
    generator = getattr(frame.f_locals.get("gen"), "gi_frame", None)
    return None if generator is None else generator.f_locals.get("new_frame")
