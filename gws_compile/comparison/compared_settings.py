"""What is compared: `ComparedSetting`, and the usual ones by format and method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..config import Config
from ..settings.learned_bits import LearnedBits
from ..settings.nearest import nearest


class ComparisonError(ValueError):
    """A comparison that cannot be made as it was asked for; the message says what is wrong, and what is accepted."""


PLAIN = "plain"
"""The setting that all others are compared with: training without this package."""

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "cast-afterwards": "cast afterwards",
        "straight-through": "straight-through",
        "rounded-normal": "rounded normal noise",
        "uniform": "uniform noise",
        "no-master": "no master weights",
        "learned": "learned widths",
    }
)
"""The methods, and what tables call them."""

DEFAULT_METHODS = ("cast-afterwards", "straight-through", "rounded-normal", "uniform")


@dataclass(frozen=True)
class ComparedSetting:
    """A row of a comparison.

    Attributes:
        name: what tables call it.
        method: a key of `METHODS`, ``"plain"``, ``"recipe"``, or empty for one of the user's own.
        arguments: of `gws_compile.backend`; of plain training, and of a cast afterwards, those of the cast.
        training: further arguments of the training function, or of the script.
        common: those of ``arguments`` that all settings have.
        config: the settings of the backend.
    """

    name: str
    method: str
    arguments: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)
    config: Config = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "config", Config.make(**self.arguments))
        except (TypeError, ValueError) as error:  # a TypeError for an argument that there is not
            raise ComparisonError(f"setting {self.name!r}: {error}") from None
        if self.method == "cast-afterwards" and not self.grid:
            raise ComparisonError(
                f"setting {self.name!r}: learned widths, trained levels and sparsity are no cast of a plain model; "
                "leave them, or the method cast-afterwards, out"
            )

    @property
    def trains_plain(self) -> bool:
        """Whether the training is the plain one."""
        return self.method in (PLAIN, "cast-afterwards")

    @property
    def grid(self) -> str:
        """The label of the grid that its weights are cast to, see `grid_label`; empty where that is no fixed one."""
        return grid_label(self.config, self.common)

    @property
    def is_of_weights(self) -> bool:
        """Whether weights on its grid are all that its evaluation differs in from a plain one."""
        config = self.config
        return bool(self.grid) and not config.products.change_something and config.attention is None

    @property
    def text(self) -> str:
        """Everything that decides what its runs compute, so that a run of another is not taken for one of it."""
        arguments = sorted((name, repr(value)) for name, value in self.arguments.items())
        return repr((self.trains_plain, arguments, sorted((k, repr(v)) for k, v in self.training.items())))


def grid_label(config: Config, common: Mapping[str, Any] = MappingProxyType({})) -> str:
    """What tables call the grid of a backend's weights: ``"fp4_e2m1"``, or ``"int3, row, amax"`` for another block.

    Args:
        config: the settings of the backend.
        common: arguments that all backends of a comparison have: what is said of them is not said again.

    Returns:
        The label. Empty with learned widths, trained levels or sparsity, where the weights' values alone do not say
        the cast.
    """
    if any(one is not None and (one.learned or one.levels or one.sparsity) for one in config.all_settings):
        return ""
    weights = config.weights
    label = weights.name
    if weights.grid_text != Config.make(label).weights.grid_text:
        label += f", {weights.block_text}, {weights.scale or 'no scale'}"
    base = Config.make(**names_chosen(common))
    for name in ("include", "exclude"):
        patterns = getattr(config, name)
        if patterns != getattr(base, name):
            label += f", {name} {' '.join(patterns or ('nothing',))}"
    return label + "".join(f"; {rule.text}" for rule in config.rules if rule not in base.rules)


def names_chosen(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of arguments of `gws_compile.backend` those that say which weights are cast, and which of them otherwise."""
    return {name: value for name, value in arguments.items() if name in ("include", "exclude", "rules")}


def usual_settings(
    fmts: Iterable[str],
    methods: Iterable[str] = DEFAULT_METHODS,
    recipes: Iterable[str] = (),
    common: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[ComparedSetting]:
    """Plain training, each format with each method, and each recipe.

    Args:
        fmts: as ``fmt`` of `gws_compile.backend`.
        methods: keys of `METHODS`.
        recipes: as ``recipe`` of `gws_compile.backend`.
        common: further arguments of `gws_compile.backend` for all, such as ``exclude``.

    Raises:
        ComparisonError: an unknown format, method or recipe; the message says what is accepted.
    """
    fmts, methods = list(fmts), list(methods)
    for method in methods:
        if method not in METHODS:
            raise ComparisonError(f"unknown method {method!r}: {nearest(method, METHODS)}")
    yield ComparedSetting(PLAIN, PLAIN, {**common, "noise": "none"}, common=common)
    seen = set()
    for method in methods:
        for fmt in fmts:
            setting = _usual(fmt, method, common)
            if setting.name not in seen:  # two formats may stand for the same average width
                seen.add(setting.name)
                yield setting
    for recipe in recipes:
        yield ComparedSetting(f"recipe {recipe}", "recipe", {**common, "recipe": recipe}, common=common)


def own_settings(
    given: Mapping[str, Mapping[str, Any]], common: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[ComparedSetting]:
    """Settings of the user's own.

    Args:
        given: arguments of `gws_compile.backend` by the names of the settings; the key ``"training"`` has arguments of
            the training function.
        common: as in `usual_settings`.

    Raises:
        ComparisonError: a bad argument.
    """
    for name, arguments in given.items():
        if not isinstance(arguments, Mapping) or not isinstance(arguments.get("training", {}), Mapping):
            raise ComparisonError(
                f"setting {name!r} must have arguments of gws_compile.backend by name, got {arguments!r}"
            )
        rest = {key: value for key, value in arguments.items() if key != "training"}
        plain = not rest  # other training, no cast
        rest = {"noise": "none"} if plain else rest
        training = arguments.get("training", {})
        yield ComparedSetting(name, PLAIN if plain else "", {**common, **rest}, training, common)


def _usual(fmt: str, method: str, common: Mapping[str, Any]) -> ComparedSetting:
    name = f"{fmt}, {METHODS[method]}"
    arguments: dict[str, Any] = {**common, "fmt": fmt}
    if method in ("cast-afterwards", "straight-through"):
        arguments["noise"] = "none"
    elif method == "no-master":
        arguments["master"] = False
    elif method == "learned":
        try:
            weights = Config.make(fmt).weights
        except ValueError as error:
            raise ComparisonError(f"method 'learned': {error}") from None
        arguments = {**common, "bits": LearnedBits(average=weights.bits)}
        name = f"{METHODS[method]}, average {weights.bits:g}"
    else:
        arguments["noise"] = method.replace("-", "_")
    return ComparedSetting(name, method, arguments, common=common)
