"""Following every optimizer of the process."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

T = TypeVar("T")


class _Followers:
    """Observers, and what is called of each while it lives."""

    def __init__(self) -> None:
        self._followers: list[tuple[weakref.ref[Any], Callable[[Any, torch.optim.Optimizer], None]]] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._followers)

    def add(self, observer: Any, act: Callable[[Any, torch.optim.Optimizer], None]) -> None:
        with self._lock:
            self._followers.append((weakref.ref(observer), act))

    def tell(self, optimizer: torch.optim.Optimizer) -> None:
        """Call all whose observers are alive, in the order in which they came, and forget the others."""
        with self._lock:
            followers = list(self._followers)
        gone = False
        for reference, act in followers:
            observer = reference()
            if observer is None:
                gone = True
            else:
                act(observer, optimizer)
        if gone:
            with self._lock:
                self._followers = [follower for follower in self._followers if follower[0]() is not None]


before, after = _Followers(), _Followers()


def after_each_step(observer: T, act: Callable[[T, torch.optim.Optimizer], None]) -> None:
    """Call ``act(observer, optimizer)`` whenever any ``torch.optim`` optimizer has stepped, while the observer lives.

    A step that ``GradScaler`` leaves out is none. Under ``torch.compile(optimizer.step)`` the call is made outside the
    compiled code: traced, it would be compiled again as the count of steps changes.
    """
    _have_torch_call_after()
    after.add(observer, act)


def before_each_step(observer: T, act: Callable[[T, torch.optim.Optimizer], None]) -> None:
    """Call ``act(observer, optimizer)`` whenever any ``torch.optim`` optimizer is going to step.

    Not before a step with a closure, which computes the gradients inside.
    """
    _have_torch_call_before()
    before.add(observer, act)


# One hook for all observers is registered, for good. A hook of an observer's own would have to go with it: garbage is
# collected at any time, also while torch goes through its hooks, which is then an error in the step of some other
# model's optimizer.


@functools.cache
def _have_torch_call_after() -> None:
    def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        after.tell(optimizer)

    hook: Callable[..., None] = torch.compiler.disable(stepped)  # type: ignore[no-untyped-call]
    register_optimizer_step_post_hook(hook)


@functools.cache
def _have_torch_call_before() -> None:
    def steps(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not any(callable(one) for one in (*args[1:], *kwargs.values())):
            before.tell(optimizer)

    hook: Callable[..., None] = torch.compiler.disable(steps)  # type: ignore[no-untyped-call]
    register_optimizer_step_pre_hook(hook)
