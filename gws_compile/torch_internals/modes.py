"""Modes of torch that are on while a tensor is made, and that are to leave no trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .lookup import find


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Inside, new tensors are ordinary ones: no inference tensors, no fake ones, with no history.

    What is made at the first call of a graph is used in later ones, which may run in other modes. Dtypes and devices
    are to be given: the default ones are left as they are.

    Relies on ``torch.utils._python_dispatch._disable_current_modes``. Checked on torch 2.11 to 2.15.
    """
    disabled = find("torch.utils._python_dispatch", "_disable_current_modes")
    with torch.inference_mode(False), torch.no_grad(), disabled():
        yield
