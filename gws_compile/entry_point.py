"""The backend by name: ``torch.compile(model, backend="gws", options={"fmt": "fp8_e4m3"})``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from .compiler import Backend
from .config import Config

_SETTINGS = tuple(inspect.signature(Config.make).parameters)
_backends: dict[Config, Backend] = {}


def gws(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite and compile one traced graph; registered in the entry-point group ``torch_dynamo_backends``.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs.
        mode: a mode of ``torch.compile``, for Inductor.
        options: the arguments of `gws_compile.backend` by name; every other key is an option of Inductor.

    Returns:
        The compiled function.

    Raises:
        ValueError: a bad setting. RuntimeError: an option that Inductor does not have.
    """
    options = dict(options or {})
    settings = {name: options.pop(name) for name in _SETTINGS if name in options}
    return named_backend(**settings)(gm, example_inputs, mode=mode, options=options or None)


def named_backend(**settings: Any) -> Backend:
    """The backend behind the name ``"gws"`` with these settings: one for the process, made on first use.

    Args:
        **settings: the arguments of `gws_compile.backend`, as in ``options``.
    """
    config = Config.make(**settings)
    if config not in _backends:
        _backends[config] = Backend(config)
    return _backends[config]
