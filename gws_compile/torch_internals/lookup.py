"""Finding a private name of torch, or saying which one is missing, instead of a stack of torch's own frames."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch

CHECKED_VERSIONS = "2.11 and 2.13"


class UnsupportedTorchError(RuntimeError):
    """A private torch API is not where the checked versions have it."""


@cache
def find(module: str, name: str) -> Any:
    """A name of one of torch's modules, which is imported on first use.

    Args:
        module: such as ``"torch._dynamo.utils"``.
        name: what to read from it.

    Raises:
        UnsupportedTorchError: no such module, or no such name in it.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise UnsupportedTorchError(
            f"gws_compile uses {module}.{name}, which torch {torch.__version__} does not have; "
            f"it was checked on torch {CHECKED_VERSIONS}"
        ) from None
