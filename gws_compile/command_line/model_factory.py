"""A model and a call of it, from a command line: `build`."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*|)(?::(?P<dtype>\w+)(?::(?P<limit>\d+))?)?")
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_RETURNS = "a torch.nn.Module, (module, args) or (module, args, kwargs), args a tuple or list and kwargs a dict"


class BadFactoryError(Exception):
    """The function that makes the model cannot be found, or makes none; the message says what is accepted."""


@dataclass(frozen=True)
class ExampleCall:
    """A model and the arguments of a call.

    Attributes:
        model: the module.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def build(factory: str, inputs: Sequence[str]) -> ExampleCall:
    """Call the function that makes a model, and put the arguments of the model's call together.

    Args:
        factory: ``package.module:function`` or ``path/to/file.py:function``.
        inputs: see `example_tensor`, with ``name=`` in front of a keyword argument. They take the place of what the
            function returns, and that of an ``example_inputs()`` beside it.

    Raises:
        BadFactoryError: no such module or function, or it returns something else.
        ValueError: a bad input.
    """
    given = [example_tensor(text) for text in inputs]
    module, function = find_function(factory)
    call = _as_call(factory, function())
    if given:
        args = tuple(value for name, value in given if name is None)
        return ExampleCall(call.model, args, {name: value for name, value in given if name is not None})
    examples = getattr(module, "example_inputs", None)
    if call.args or call.kwargs or not callable(examples):
        return call
    return _with_examples(factory, call.model, examples())


def example_tensor(text: str) -> tuple[str | None, torch.Tensor]:
    """A tensor from its description, and the name in front of it.

    Args:
        text: ``[name=]shape[:dtype[:N]]``: ``"2x3x32x32"`` (float32, normal), ``"2x128:int64:1000"`` (0 to 999),
            ``"mask=2x128:bool"``. Integers without ``:N`` are 0 or 1. The shape of a scalar is empty: ``":int64"``.

    Raises:
        ValueError: anything else.
    """
    match = _INPUT.fullmatch(text)
    if match is None or not text or text.endswith("="):
        raise ValueError(f"--input {text}: accepted are [NAME=]SHAPE[:DTYPE[:N]], such as 2x128:int64:1000 or x=8x16")
    dtype = _DTYPES.get(match["dtype"] or "float32")
    if dtype is None:
        raise ValueError(f"--input {text}: unknown dtype {match['dtype']!r}; accepted: {', '.join(_DTYPES)}")
    shape = tuple(map(int, match["shape"].split("x"))) if match["shape"] else ()
    whole = not dtype.is_floating_point
    if match["limit"] is not None and (not whole or dtype == torch.bool or int(match["limit"]) < 1):
        raise ValueError(f"--input {text}: a limit :N is for integers, and N is 1 or more")
    generator = torch.Generator().manual_seed(0)
    if not whole:
        return match["name"], torch.randn(shape, generator=generator).to(dtype)
    return match["name"], torch.randint(0, int(match["limit"] or 2), shape, generator=generator).to(dtype)


def find_function(factory: str) -> tuple[ModuleType, Callable[..., Any]]:
    """The module and the function that ``package.module:function`` or ``path/to/file.py:function`` names.

    Raises:
        BadFactoryError: there is none.
    """
    place, _, name = factory.rpartition(":")
    if not place or not name.isidentifier():
        raise BadFactoryError(
            f"{factory!r} names no function: accepted are package.module:function and path/to/file.py:function"
        )
    module = _load_file(place) if place.endswith(".py") else _load_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise BadFactoryError(f"{place} has no function {name!r}; it has: {', '.join(known) or 'none'}")
    return module, function


def _load_file(place: str) -> ModuleType:
    path = Path(place).absolute()
    if not path.is_file():
        raise BadFactoryError(f"{place}: there is no such file")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _load_module(place: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # what the module itself imports
        raise BadFactoryError(
            f"no module named {error.name!r} (looked for in {Path.cwd()} too); a file is named with its .py"
        ) from None


def _as_call(factory: str, made: object) -> ExampleCall:
    if isinstance(made, nn.Module):
        return ExampleCall(made)
    if isinstance(made, tuple) and 2 <= len(made) <= 3 and isinstance(made[0], nn.Module):
        args, kwargs = made[1], made[2] if len(made) == 3 else {}
        if isinstance(args, (tuple, list)) and isinstance(kwargs, dict):
            return ExampleCall(made[0], tuple(args), kwargs)
    kind = f"({', '.join(type(x).__name__ for x in made)})" if isinstance(made, tuple) else type(made).__name__
    raise BadFactoryError(f"{factory} returned {kind}; accepted: {_RETURNS}")


def _with_examples(factory: str, model: nn.Module, examples: object) -> ExampleCall:
    if isinstance(examples, dict):
        return ExampleCall(model, (), examples)
    if isinstance(examples, (tuple, list)):
        if len(examples) == 2 and isinstance(examples[0], (tuple, list)) and isinstance(examples[1], dict):
            return ExampleCall(model, tuple(examples[0]), examples[1])
        return ExampleCall(model, tuple(examples))
    raise BadFactoryError(
        f"example_inputs() beside {factory} returned {type(examples).__name__}; accepted: args (a tuple or list), "
        "kwargs (a dict), or (args, kwargs)"
    )
