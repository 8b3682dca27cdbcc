"""Settings of a comparison from a TOML file: `own_from_file`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..settings.nearest import nearest
from .settings_text import NAMES, checked, read_toml

TRAINING = "training"
"""The key with arguments of the training function, or of the script."""


def own_from_file(path: str | Path) -> dict[str, dict[str, Any]]:
    """The settings in a TOML file, a table each, named as the setting.

    The keys of a table are the arguments of `gws_compile.backend`, read as those of a file of settings, and
    ``training``, a table of arguments of the training function.

    Raises:
        ValueError: no TOML, an unknown key, or a bad value. OSError: no such file.
    """
    found = {}
    for name, table in read_toml(path).items():
        if not isinstance(table, Mapping):
            raise ValueError(
                f"{path}: {name} = {table!r} is no table; a setting is [{name!r}] with its arguments below"
            )
        if unknown := [key for key in table if key not in (*NAMES, TRAINING)]:
            raise ValueError(
                f"{path}: [{name}] has an unknown key {unknown[0]!r}: {nearest(unknown[0], [*NAMES, TRAINING])}"
            )
        found[name] = {
            key: value if key == TRAINING else checked(key, value, f"{path}: [{name}] {key} = {value!r}")
            for key, value in table.items()
        }
    return found
