"""Settings as text: the arguments of `gws_compile.backend` from the environment and from a TOML file.

The settings are those of `gws_compile.settings.arguments.SETTINGS`: what is added there is a variable, an option and a
key of the file at once. One that is text (``GWS_BITS=5``, ``--bits 5``) is read by `read`; what a value may be is
decided by `Config.make` alone.
"""

from __future__ import annotations

import os
import re
import tomllib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from ..config import Config
from ..passes import SKIP_VARIABLE
from ..settings.arguments import SETTINGS
from ..settings.attention import AttentionOperands
from ..settings.learned_bits import LearnedBits
from ..settings.nearest import nearest
from ..settings.operands import PRODUCTS, Operand
from ..settings.rules import KEYS, RuleLike
from ..settings.schedule import Schedule
from ..settings.sparsity import PrunedGroups
from ..warning import GwsWarning

NAMES = tuple(setting.name for setting in SETTINGS)
"""The settings, which are the arguments of `gws_compile.backend`."""

PREFIX = "GWS_"
CONFIG_VARIABLE = f"{PREFIX}CONFIG"
"""Names a TOML file with settings."""


def variable(name: str) -> str:
    """The environment variable of a setting: ``GWS_BITS`` for ``bits``."""
    return PREFIX + name.upper()


def read(name: str, text: str) -> Any:
    """The value that a text stands for; text that is none is given back as it is, for `Config.make` to refuse.

    Args:
        name: of the setting.
        text: ``"5"``, ``"learned"`` or ``"learned:average=5,granularity=weight,formats=fp4_e2m1/fp8_e4m3"`` for bits;
            ``"32x32"`` or ``"32,32"`` for block, ``"1xall"`` for a row; globs parted by commas; ``"none"`` for no
            scale; ``"true"`` or ``"1"``; ``"*.mlp.*=nvfp4;*.attn.*=fp8_e4m3,block=1x32;*.0.*=none"`` for rules;
            ``"start=100,stop=900,bits=0:8/1000:5,forward=0:9000"`` for a schedule; a format, or
            ``"nvfp4,rounding=stochastic,hadamard=16"``, for activations, gradients and attention, and
            ``"queries=mxfp8;values=fp8_channel"`` for operands of attention; ``"2:4"``, or ``"rows:0.5"``,
            ``"columns*16:0.5:100-900"`` (in groups of 16, from draw 100 to 900) for sparsity.

    Raises:
        ValueError: an unknown or bad argument of `LearnedBits`, `Schedule`, `Operand` or `PrunedGroups`, or no rule.
    """
    return _READERS.get(name, str)(text)


def from_environment(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The settings of the ``GWS_*`` variables, over those of the file that ``GWS_CONFIG`` names.

    Args:
        environment: the variables; those of the process when None. The file is read once.

    Raises:
        ValueError: a bad value, or an unknown key in the file; the message says where and what is accepted. OSError:
            no such file.
    """
    environment = os.environ if environment is None else environment
    return dict(_from_variables(tuple(sorted((k, v) for k, v in environment.items() if k.startswith(PREFIX)))))


@lru_cache(maxsize=8)
def _from_variables(variables: tuple[tuple[str, str], ...]) -> tuple[tuple[str, Any], ...]:
    known = {variable(name): name for name in NAMES}
    settings: dict[str, Any] = {}
    path = dict(variables).get(CONFIG_VARIABLE)
    if path:
        settings |= from_file(path)
    for key, text in variables:
        if key in known:
            settings[known[key]] = checked(known[key], text, f"{key}={text!r}")
        elif key not in (CONFIG_VARIABLE, SKIP_VARIABLE):
            message = f"the environment variable {key} has no effect: {nearest(key, [*known, CONFIG_VARIABLE])}"
            warnings.warn(message, GwsWarning, stacklevel=4)
    return tuple(settings.items())


def from_file(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file: its keys are the arguments of `gws_compile.backend`.

    A table ``[bits]`` holds the arguments of `LearnedBits`, ``[schedule]`` those of `Schedule`, ``[sparsity]`` those of
    `PrunedGroups`, ``[activations]``, ``[gradients]`` and ``[attention]`` those of `Operand`, or the last those of
    `AttentionOperands`; each table ``[[rules]]`` has a ``match``, a glob or a list of them, and settings, or
    ``fmt = "none"``. Text stands for what it does in the environment.

    Raises:
        ValueError: no TOML, an unknown key, or a bad value. OSError: no such file.
    """
    content = read_toml(path)
    if unknown := [key for key in content if key not in NAMES]:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}: {nearest(unknown[0], NAMES)}")
    return {name: checked(name, value, f"{path}: {name} = {value!r}") for name, value in content.items()}


def read_toml(path: str | Path) -> dict[str, Any]:
    """What a TOML file holds.

    Raises:
        ValueError: it is none; the message names it. OSError: no such file.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def checked(name: str, value: Any, source: str) -> Any:
    """The setting's value, if it is a good one by itself.

    Args:
        name: of the setting.
        value: text, or what a TOML file holds.
        source: where it was found, for the message.

    Raises:
        ValueError: a bad value.
    """
    try:
        value = _value(name, value)
        # Elements with which every scale is good: what is given beside it is not known here.
        with warnings.catch_warnings():
            warnings.filterwarnings(action="ignore", category=GwsWarning)
            Config.make(**{"fmt": "fp4_e2m1", name: value})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return value


def _value(name: str, value: Any) -> Any:
    """What a setting is, from text or from what a TOML file holds."""
    if isinstance(value, str):
        return read(name, value)
    return _TABLES[name](value) if name in _TABLES else value


T = TypeVar("T", LearnedBits, Schedule, Operand, AttentionOperands, PrunedGroups)


def _made(kind: type[T], arguments: dict[str, Any]) -> T:
    """The settings of a class from its arguments; lists become tuples, so that backends are told apart by them."""
    accepted = [field.name for field in fields(kind)]
    if unknown := [name for name in arguments if name not in accepted]:
        raise ValueError(f"{kind.__name__} has no {unknown[0]!r}: {nearest(unknown[0], accepted)}")
    return kind(**{name: _frozen(value) for name, value in arguments.items()})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _schedule(text: str) -> Schedule:
    pairs = (pair.partition("=") for pair in text.split(",") if pair)
    given = ((name.strip(), value.strip()) for name, _, value in pairs)
    read: dict[str, Callable[[str], Any]] = {"bits": _points}
    read |= {str(product): _window for product in PRODUCTS}
    return _made(Schedule, {name: read.get(name, _step)(value) for name, value in given})


def _window(text: str) -> tuple[Any, Any]:
    first, _, last = text.partition(":")
    return _step(first), _step(last) if last else None


def _operand(text: str) -> Any:
    """An operand from ``FORMAT``, or ``FORMAT,KEY=VALUE,...``; None from ``none``."""
    if text.strip() == "none":
        return None
    given: dict[str, Any] = {}
    for part in text.split(","):
        key, is_pair, value = (one.strip() for one in part.partition("="))
        given[key if is_pair else "fmt"] = value if is_pair else key
    return _operand_of(given)


def _operand_of(given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    values = {
        key: _OPERAND_READERS.get(key, str)(value) if isinstance(value, str) else value for key, value in given.items()
    }
    if "fmt" not in values:
        raise ValueError(f"an operand needs a format: fmt=mxfp8, or another one, got {given!r}")
    if isinstance(values.get("block"), list):
        values["block"] = tuple(_side(side) for side in values["block"])
    return _made(Operand, values)


def _attention(text: str) -> Any:
    if "=" not in text.partition(",")[0].partition(";")[0]:
        return _operand(text) if "," in text or text.strip() == "none" else text
    pairs = (pair.partition("=") for pair in text.split(";") if pair.strip())
    return _made(AttentionOperands, {name.strip(): _operand(value) for name, _, value in pairs})


def _attention_of(given: Any) -> Any:
    if not isinstance(given, dict) or "fmt" in given:
        return _operand_of(given)
    return _made(AttentionOperands, {name: _operand_of(value) for name, value in given.items()})


def _points(text: str) -> tuple[Any, ...]:
    points = (point.split(":") for point in text.split("/"))
    return tuple((_step(step), *map(_number, widths)) for step, *widths in points)


def _step(text: str) -> int | float | str:
    number = _number(text)
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _rule(text: str) -> RuleLike:
    """A rule from ``GLOB=FORMAT``, ``GLOB=FORMAT,KEY=VALUE`` or ``GLOB=KEY=VALUE,KEY=VALUE``."""
    glob, equals, given = text.partition("=")
    if not equals or not glob.strip() or not given.strip():
        raise ValueError(
            f"a rule is GLOB=FORMAT, GLOB=none, or GLOB=KEY=VALUE,... with {', '.join(KEYS)}, got {text!r}"
        )
    globs = [one.strip() for one in glob.split(",") if one.strip()]
    match = globs[0] if len(globs) == 1 else globs
    if given.strip() == "none":
        return match, None
    values: dict[str, Any] = {}
    for part in given.split(","):
        key, is_pair, value = part.partition("=")
        name = key.strip() if is_pair else "fmt"
        values[name] = read(name, (value if is_pair else key).strip())
    return match, values


def _rules(text: str) -> tuple[RuleLike, ...]:
    return tuple(_rule(one.strip()) for one in text.split(";") if one.strip())


def _rules_of(tables: Any) -> Any:
    """Rules from the tables ``[[rules]]``; whatever else is left to `Config.make` to refuse."""
    if not isinstance(tables, list):
        return tables
    return tuple(_rule_of(table) if isinstance(table, dict) else table for table in tables)


def _rule_of(table: dict[str, Any]) -> RuleLike:
    match = table.get("match")
    if match is None:
        raise ValueError(f"a rule needs match = a glob, or a list of them, got {table!r}")
    values = {name: _value(name, value) for name, value in table.items() if name != "match"}
    if values == {"fmt": "none"}:
        return match, None
    return match, values


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _bits(text: str) -> Any:
    kind, _, rest = text.partition(":")
    if kind != "learned":
        return _number(text)
    pairs = (pair.partition("=") for pair in rest.split(",") if pair)
    return _made(
        LearnedBits, {name.strip(): _learned_argument(name.strip(), value.strip()) for name, _, value in pairs}
    )


def _learned_argument(name: str, value: str) -> Any:
    return tuple(value.split("/")) if name == "formats" else _number(value)


def _block(text: str) -> Any:
    sides = [side.strip() for side in re.split(r"[x,]", text.strip("()[] "))]
    return tuple(int(side) if side.isdecimal() else _side(side) for side in sides)


def _side(side: Any) -> Any:
    return None if isinstance(side, str) and side.lower() in ("all", "none") else side


def _globs(text: str) -> tuple[str, ...] | str:
    return tuple(glob.strip() for glob in text.split(",") if glob.strip()) or text


def _seed(text: str) -> int | str:
    try:
        return int(text, 0)
    except ValueError:
        return text


def _flag(text: str) -> bool | str:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    return words.get(text.lower(), text)


def _scale(text: str) -> str | None:
    return None if text == "none" else text


def _sparsity(text: str) -> PrunedGroups | str | None:
    """``2:4``, or ``rows:SHARE``, ``rows*SIZE:SHARE:START-STOP``; None from ``none``."""
    if text == "none":
        return None
    kind, _, rest = text.partition(":")
    groups, star, size = kind.partition("*")
    if not groups.isalpha():
        return text
    share, _, steps = rest.partition(":")
    start, _, stop = steps.partition("-")
    given: dict[str, Any] = {"share": _number(share), "groups": groups}
    given |= {"size": _step(size)} if star else {}
    given |= {"start": _step(start), "stop": _step(stop)} if steps else {}
    return _made(PrunedGroups, given)


_OPERAND_READERS: dict[str, Callable[[str], Any]] = {
    "block": _block,
    "hadamard": _step,
    "products": lambda text: tuple(text.split("+")),
}

_TABLES: dict[str, Callable[[Any], Any]] = {
    "bits": lambda value: _made(LearnedBits, value) if isinstance(value, dict) else value,
    "schedule": lambda value: _made(Schedule, value) if isinstance(value, dict) else value,
    "rules": _rules_of,
    "activations": _operand_of,
    "gradients": _operand_of,
    "attention": _attention_of,
    "sparsity": lambda value: _made(PrunedGroups, value) if isinstance(value, dict) else value,
    "block": lambda value: (
        tuple(None if side == "all" else side for side in value) if isinstance(value, list) else value
    ),
}
"""What a TOML file holds that is no text."""

_READERS: dict[str, Callable[[str], Any]] = {
    "bits": _bits,
    "block": _block,
    "scale": _scale,
    "sparsity": _sparsity,
    "rules": _rules,
    "schedule": _schedule,
    "activations": _operand,
    "gradients": _operand,
    "attention": _attention,
    "include": _globs,
    "exclude": _globs,
    "seed": _seed,
    "master": _flag,
    "strict": _flag,
}
