"""Rules: settings of weights by their names, the first that matches wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..numerics.presets import PRESETS
from ..weight_names import first_match
from .learned_bits import LearnedBits
from .levels import Levels
from .nearest import nearest
from .weight_settings import GivenSettings, WeightSettings

KEYS = ("fmt", "bits", "block", "scale", "noise", "sparsity")
"""What a rule can say of a weight."""

RuleSetting = str | Levels | Mapping[str, Any] | None
"""A format, `Levels`, some of `KEYS`, or None (or ``"none"``) for weights that are left alone."""

RuleLike = tuple[str | Sequence[str], RuleSetting]
"""Globs on qualified names, and the settings of the weights that match one."""


@dataclass(frozen=True)
class Rule:
    """Settings of the weights whose names match.

    Attributes:
        globs: on qualified names.
        settings: of these weights; None where they are left alone.
        given: what the user has written of them.
    """

    globs: tuple[str, ...]
    settings: WeightSettings | None
    given: tuple[tuple[str, Any], ...] | None

    def matches(self, name: str | tuple[str, ...]) -> bool:
        """Whether a weight's name does, or one of its names."""
        return first_match(name, self.globs) is not None

    @property
    def text(self) -> str:
        """``"*.mlp.*=nvfp4"``, as a command line takes it, one glob after the other."""
        return f"{','.join(self.globs)}={self.settings_text}"

    @property
    def settings_text(self) -> str:
        """What stands behind the globs in `text`."""
        if self.given is None:
            return "none"
        parts = []
        for key, value in self.given:
            text = _text(value)
            parts.append(text if key == "fmt" else f"{key}={text}")
        return ",".join(parts)


def _text(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return "x".join(str(side or "all") for side in value)
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def make_rules(rules: object, base: GivenSettings, *, scheduled: bool) -> tuple[Rule, ...]:
    """Check rules.

    What a rule does not say is as it is for the other weights. But one that names a format has that format's own width
    of noise, and where the format is a preset, its own block and scale. A rule that names format or width takes its
    weights out of learned widths, and out of a schedule's.

    Args:
        rules: of `gws_compile.backend`.
        base: what was given for the other weights.
        scheduled: a schedule moves their width.

    Raises:
        ValueError: a bad rule; the message says which.
    """
    if isinstance(rules, (str, Mapping)) or not isinstance(rules, Iterable):
        raise ValueError(f"rules must be a list of (glob, settings), such as ('*.mlp.*', 'nvfp4'), got {rules!r}")
    return tuple(_rule(number, one, base, scheduled) for number, one in enumerate(rules))


def _rule(number: int, one: object, base: GivenSettings, scheduled: bool) -> Rule:
    if not isinstance(one, (tuple, list)) or len(one) != 2:
        raise ValueError(f"rules[{number}] must be (glob, settings), such as ('*.mlp.*', 'nvfp4'), got {one!r}")
    globs, given = one
    patterns = (globs,) if isinstance(globs, str) else tuple(globs) if isinstance(globs, (tuple, list)) else ()
    if not patterns or not all(isinstance(glob, str) and glob for glob in patterns):
        raise ValueError(f"rules[{number}] must begin with a glob on weight names, or a list of them, got {globs!r}")
    where = f"rules[{number}], {', '.join(map(repr, patterns))}"
    if given is None or given == "none":
        return Rule(patterns, None, None)
    if not isinstance(given, Mapping):
        given = {"fmt": given}
    for key in given:
        if key not in KEYS:
            raise ValueError(f"{where}: unknown key {key!r}: {nearest(str(key), KEYS)}")
    if not given:
        raise ValueError(f"{where}: it says nothing; give some of {', '.join(KEYS)}, or None to leave weights alone")
    if isinstance(given.get("bits"), LearnedBits):
        raise ValueError(f"{where}: bits must be a number or None, got LearnedBits, which are for the whole backend")
    try:
        settings = WeightSettings.make(
            _over(base, given), scheduled=scheduled and "fmt" not in given and "bits" not in given
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Rule(patterns, settings, tuple((key, _frozen(value)) for key, value in given.items()))


def _over(base: GivenSettings, given: Mapping[str, Any]) -> GivenSettings:
    """What was given for all weights, with what a rule says."""
    own_format = "fmt" in given
    is_preset = own_format and isinstance(given["fmt"], str) and given["fmt"] in PRESETS
    is_table = isinstance(given.get("fmt"), Levels)
    bits = given.get("bits", None if own_format else base.bits)
    own_scale = is_preset or is_table or (base.scale == "nvfp4" and own_format)
    return GivenSettings(
        fmt=given.get("fmt", base.fmt),
        noise=given.get("noise", None if is_table else base.noise),
        bits=bits,
        block=given.get("block", None if is_preset else base.block),
        scale=given.get("scale", "auto" if own_scale else base.scale),
        sparsity=given.get("sparsity", base.sparsity),
    )


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
