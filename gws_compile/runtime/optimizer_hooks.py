"""Following every optimizer of the process."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

T = TypeVar("T")


def after_each_step(observer: T, act: Callable[[T, torch.optim.Optimizer], None]) -> None:
    """Call ``act(observer, optimizer)`` whenever any ``torch.optim`` optimizer has stepped, while the observer lives.

    A step that ``GradScaler`` leaves out is none. Under ``torch.compile(optimizer.step)`` the call is made outside the
    compiled code: traced, it would be compiled again as the count of steps changes.
    """
    this = weakref.ref(observer)

    def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        alive = this()
        if alive is not None:
            act(alive, optimizer)

    hook: Callable[..., None] = torch.compiler.disable(stepped)  # type: ignore[no-untyped-call]
    handle = register_optimizer_step_post_hook(hook)
    weakref.finalize(observer, handle.remove)
