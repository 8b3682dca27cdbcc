"""What the autograd engine is doing, and has done."""

from __future__ import annotations

from collections.abc import Callable

import torch


def inside_backward() -> bool:
    """Whether the autograd engine is running in this thread: a forward seen now is a recomputation.

    Relies on ``torch._C._current_graph_task_id``. Checked on torch 2.11 to 2.15.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call back when the backward that is running has ended.

    Relies on ``Variable._execution_engine.queue_callback``. Checked on torch 2.11 to 2.15.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def times_changed(tensor: torch.Tensor) -> int:
    """How often a tensor was written in place: a gradient that nobody takes away, by each backward.

    Relies on ``Tensor._version``. Checked on torch 2.11 to 2.15.
    """
    return tensor._version
