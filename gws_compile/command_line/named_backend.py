"""The backend by name: ``torch.compile(model, backend="gws", options={"fmt": "fp8_e4m3"})``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from ..compiler.backend import Backend
from ..config import Config
from .settings_text import NAMES, from_environment

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
        options: the arguments of `gws_compile.backend` by name; every other key is an option of Inductor. What is not
            given comes from the environment, as in `named_backend`.

    Returns:
        The compiled function.

    Raises:
        ValueError: a bad setting. RuntimeError: an option that Inductor does not have.
    """
    inductors = {key: value for key, value in (options or {}).items() if key not in NAMES}
    return named_backend(**_settings(options))(gm, example_inputs, mode=mode, options=inductors or None)


def stands_for(options: Mapping[str, Any] | None) -> Backend | None:
    """The backend that the name stands for with these options; None where a setting is bad, which a call says."""
    try:
        return named_backend(**_settings(options))
    except (ValueError, OSError):
        return None


gws.stands_for = stands_for  # type: ignore[attr-defined]  # for `gws_compile.torch_internals.compilers.backend_of`


def _settings(options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (options or {}).items() if name in NAMES}


def named_backend(*, kind: type[Backend] = Backend, **settings: Any) -> Backend:
    """The backend behind the name ``"gws"``: for its `Backend.report`, `Backend.step` and the rest.

    There is one for each different configuration, for the whole process, made on first use.

    Args:
        kind: what it is where there is none yet; ``gws run --cast-afterwards`` says it.
        **settings: the arguments of `gws_compile.backend`, as in ``options``. What is not given comes from the
            environment: ``GWS_FMT``, ``GWS_BITS`` and so on, or the TOML file that ``GWS_CONFIG`` names.

    Raises:
        ValueError: a bad setting; the message says where it comes from.
    """
    config = Config.make(**{**from_environment(), **settings})
    if config not in _backends:
        _backends[config] = kind(config)
    return _backends[config]


def named_backends() -> tuple[Backend, ...]:
    """All backends that the name ``"gws"`` has stood for in this process, in the order of first use."""
    return tuple(_backends.values())


def forget_named_backends() -> None:
    """From here on the name stands for new backends, whose steps begin anew; what has been compiled keeps its own."""
    _backends.clear()
