"""Following every optimizer of the process."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

T = TypeVar("T")

_Follower = tuple[weakref.ref[Any], Callable[[Any, torch.optim.Optimizer], None]]
_followers: list[_Follower] = []
_lock = threading.Lock()


def after_each_step(observer: T, act: Callable[[T, torch.optim.Optimizer], None]) -> None:
    """Call ``act(observer, optimizer)`` whenever any ``torch.optim`` optimizer has stepped, while the observer lives.

    A step that ``GradScaler`` leaves out is none. Under ``torch.compile(optimizer.step)`` the call is made outside the
    compiled code: traced, it would be compiled again as the count of steps changes.
    """
    _have_torch_call()
    with _lock:
        _followers.append((weakref.ref(observer), act))


@functools.cache
def _have_torch_call() -> None:
    """Register one hook for all observers, for good.

    A hook of an observer's own would have to go with it. Garbage is collected at any time, also while torch goes
    through its hooks, which would then be an error in the step of some other model's optimizer.
    """
    hook: Callable[..., None] = torch.compiler.disable(_stepped)  # type: ignore[no-untyped-call]
    register_optimizer_step_post_hook(hook)


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    with _lock:
        followers = list(_followers)
    gone = False
    for reference, act in followers:
        observer = reference()
        if observer is None:
            gone = True
        else:
            act(observer, optimizer)
    if gone:
        with _lock:
            _followers[:] = [follower for follower in _followers if follower[0]() is not None]
