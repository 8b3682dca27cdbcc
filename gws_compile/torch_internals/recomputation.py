"""Regions of a forward that autograd runs again inside backward: what of them is on the Python stack."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import torch

_AUTOGRAD = "torch.autograd.function"
_CHECKPOINT = "torch.utils.checkpoint"


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

    Relies on ``torch.autograd.function``, whose ``apply`` methods call forward and backward with the context as their
    first argument, on the context's ``next_functions``, empty where nothing is differentiated, and on
    ``torch.utils.checkpoint``: a checkpoint that is not re-entrant has a ``_CheckpointFrame``, in the generator ``gen``
    of ``checkpoint`` and in ``unpack_hook``. Checked on torch 2.11 to 2.15.
    """
    inner: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name == "apply" and inner is not None and frame.f_globals.get("__name__") == _AUTOGRAD:
            context = _context(inner)
            if context is not None:
                yield Region(context, bool(context.next_functions) and not torch.is_grad_enabled())
        elif name in ("checkpoint", "unpack_hook") and frame.f_globals.get("__name__") == _CHECKPOINT:
            token = _checkpoint_frame(frame)
            if token is not None:
                yield Region(token, differentiated=False)
        inner, frame = frame, frame.f_back


def inside_function_forward() -> bool:
    """Whether the call lies in the forward of an ``autograd.Function`` that has no context: one with ``setup_context``.

    Of such a one it cannot be told whether it is differentiated.

    Relies on what `regions` relies on. Checked on torch 2.11 to 2.15.
    """
    inner: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if (
            inner is not None
            and frame.f_code.co_name == "apply"
            and frame.f_globals.get("__name__") == _AUTOGRAD
            and _context(inner) is None
        ):
            return True
        inner, frame = frame, frame.f_back
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
