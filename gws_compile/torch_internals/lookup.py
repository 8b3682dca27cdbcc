"""Finding a private name of torch, or saying which one is missing, instead of a stack of torch's own frames."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import torch

from ..warning import GwsWarning
from .private_names import PRIVATE_NAMES

CHECKED_VERSIONS = "2.11 to 2.15"

_NEWEST = (2, 15)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class UnsupportedTorchError(RuntimeError):
    """A private torch API is not where the checked versions have it."""


@cache
def find(module: str, name: str) -> Any:
    """A name of one of torch's modules, which is imported on first use.

    Args:
        module: such as ``"torch._dynamo.utils"``.
        name: what to read from it; the path of both is in `PRIVATE_NAMES`.

    Raises:
        UnsupportedTorchError: no such module, or no such name in it.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        feature = PRIVATE_NAMES[f"{module}.{name}"].feature
        raise UnsupportedTorchError(
            f"gws_compile uses {module}.{name} for this: {feature}. torch {torch.__version__} does not have it; "
            f"checked on torch {CHECKED_VERSIONS}"
        ) from None


class _Spare(Protocol):
    def __call__(self, function: Callable[Arguments, Result], /) -> Callable[Arguments, Result]: ...


def spared(default: Callable[[], Any]) -> _Spare:
    """Have a function that only tells, or helps to, give back something else where a name has gone, with one warning.

    Args:
        default: makes what is given back.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            try:
                return function(*args, **kwargs)
            except UnsupportedTorchError as error:
                _warn_once(f"{error}. It goes on without")
                spare: Result = default()
                return spare

        return call

    return decorate


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, GwsWarning, stacklevel=2)


@cache
def warn_of_newer_torch(version: str = torch.__version__) -> None:
    """A `GwsWarning`, once, where torch is newer than what was checked; it may well work.

    Args:
        version: that of torch.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) > _NEWEST:
        warnings.warn(
            f"gws_compile was checked on torch {CHECKED_VERSIONS}, this is {version}. It goes on; hold the first "
            "losses to those of noise='none' and of the plain model, and look at report()",
            GwsWarning,
            stacklevel=3,
        )
