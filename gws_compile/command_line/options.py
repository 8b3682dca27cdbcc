"""The settings of a backend as options of a command, made from `gws_compile.settings.arguments.SETTINGS`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..settings.arguments import SETTINGS, Setting
from ..settings.nearest import nearest
from .settings_text import CONFIG_VARIABLE, checked, from_environment, variable


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


def check_folder(file: str | None, option: str = "") -> None:
    """Hold a file that is to be written to a folder that is there; nothing to hold for None.

    Raises:
        UsageError: there is no such folder; ``option`` stands in front of the file's name.
    """
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise UsageError(f"{option} {file}: there is no such folder".lstrip())


def add_settings(parser: argparse.ArgumentParser) -> None:
    """An option for each argument of `gws_compile.backend`, and ``--config``."""
    group = parser.add_argument_group(
        "settings",
        "The arguments of gws_compile.backend(). What is not given here is taken from the environment (GWS_FMT, "
        "GWS_BITS, ...), then from the TOML file, whose keys have the same names.",
    )
    group.add_argument("--config", metavar="FILE.toml", help=f"a file with settings (or {CONFIG_VARIABLE})")
    for setting in SETTINGS:
        option, text = f"--{setting.option or setting.name}", setting.help.replace("%", "%%")
        if isinstance(setting.default, bool):
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif setting.several:
            text += " Given once for each." if setting.option else " Parted by commas, or given several times."
            group.add_argument(option, dest=setting.name, metavar=setting.metavar, action="append", help=text)
        else:
            group.add_argument(option, metavar=setting.metavar, help=text)


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
        for setting in SETTINGS:
            name, option = setting.name, setting.option or setting.name
            text = text_of(setting, getattr(parsed, name))
            if text is not None:
                checked(name, text, f"--{option} {text}")
                os.environ[variable(name)] = text
        return from_environment()
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def text_of(setting: Setting, value: str | bool | Sequence[str] | None) -> str | None:
    """What was given for a setting on a command line, as one text; None where nothing was."""
    if value is None or isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) else (";" if setting.option else ",").join(value)
