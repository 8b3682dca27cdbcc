"""Who is calling: the modules on the Python stack, which know a weight's full name.

A compiled graph knows a weight by its name relative to the module that was compiled. Where blocks are compiled one by
one, that is the same name in every layer; the model around them, whose ``forward`` is on the stack, tells them apart.
The stack is looked at once for each set of weights, at their first call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn

from ..torch_internals.distributed import data_parallel_groups, pipeline_stage_index
from ..weight_names import stage_prefix

_FILES = ("torch.nn.modules.module", "torch.distributed.pipelining.stage")


def _callers() -> Iterator[object]:
    """The modules and pipeline stages on the stack, from the inside outwards.

    Only frames of these two files of torch are looked into: up to Python 3.12 ``f_locals`` leaves a copy of a frame's
    variables in the frame, which would keep alive what a user's function deletes later on.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") in _FILES:
            yield frame.f_locals.get("self")
        frame = frame.f_back


class CallStack:
    """The modules and the pipeline stage that the current call comes from.

    Attributes:
        modules: the modules, from the inside outwards.
        groups: the process groups over which the innermost data-parallel module averages gradients.
        prefix: of the pipeline stage, empty where there is none.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.groups: tuple[Any, ...] = ()
        self.prefix = ""
        for this in _callers():
            if isinstance(this, nn.Module):
                self.modules.append(this)
                self.groups = self.groups or data_parallel_groups(this)
            elif (index := pipeline_stage_index(this)) is not None:
                self.prefix = stage_prefix(index)

    @property
    def root(self) -> nn.Module | None:
        """The outermost module; None where a function was compiled and no module is on the stack."""
        return self.modules[-1] if self.modules else None
