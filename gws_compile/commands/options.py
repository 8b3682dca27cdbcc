"""The settings of a backend as options of a command, made from `gws_compile.settings`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from ..settings import CONFIG_VARIABLE, NAMES, checked, descriptions, from_environment, nearest, variable

_METAVARS = {
    "fmt": "FORMAT",
    "noise": "LAW",
    "bits": "NUMBER",
    "block": "ROWSxCOLUMNS",
    "scale": "RULE",
    "include": "GLOBS",
    "exclude": "GLOBS",
    "seed": "NUMBER",
    "inner": "COMPILER",
}


class UsageError(Exception):
    """A wrong command line; the message says what is accepted."""


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest option where there is none of a name."""

    def error(self, message: str) -> NoReturn:
        """End the process with exit code 2."""
        option = message.partition("unrecognized arguments: ")[2].partition(" ")[0].partition("=")[0]
        if option.startswith("-"):
            message += f" ({nearest(option, self._option_string_actions)})"
        super().error(message)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """An option for each argument of `gws_compile.backend`, and ``--config``."""
    group = parser.add_argument_group(
        "settings",
        "The arguments of gws_compile.backend(). What is not given here is taken from the environment (GWS_FMT, "
        "GWS_BITS, ...), then from the TOML file, whose keys have the same names.",
    )
    group.add_argument("--config", metavar="FILE.toml", help=f"a file with settings (or {CONFIG_VARIABLE})")
    for name, description in descriptions().items():
        option, text = f"--{name}", description.replace("%", "%%")
        if name == "strict":
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif name in ("include", "exclude"):
            text += " Parted by commas, or given several times."
            group.add_argument(option, metavar=_METAVARS[name], action="append", help=text)
        else:
            group.add_argument(option, metavar=_METAVARS.get(name, "TEXT"), help=text)


def export_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """Put the settings given as options into the environment, where the processes that are started find them too.

    Returns:
        All settings, from the command line, the environment and the file.

    Raises:
        UsageError: a bad value, wherever it comes from.
    """
    try:
        if parsed.config is not None:
            os.environ[CONFIG_VARIABLE] = os.path.abspath(parsed.config)  # noqa: PTH100
        for name in NAMES:
            text = _text(getattr(parsed, name))
            if text is not None:
                checked(name, text, f"--{name} {text}")
                os.environ[variable(name)] = text
        return from_environment()
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def _text(value: str | bool | Sequence[str] | None) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) else ",".join(value)
