"""What is compared: `ComparedSetting`, and the usual ones by format and method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..config import Config
from ..settings.learned_bits import LearnedBits
from ..settings.nearest import nearest

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
        config: the settings, checked.
    """

    name: str
    method: str
    arguments: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            Config.make(**self.arguments)
        except (TypeError, ValueError) as error:  # a TypeError for an argument that there is not
            raise ValueError(f"setting {self.name!r}: {error}") from None

    @property
    def config(self) -> Config:
        """The settings of the backend."""
        return Config.make(**self.arguments)

    @property
    def trains_plain(self) -> bool:
        """Whether the training is the plain one."""
        return self.method in (PLAIN, "cast-afterwards")

    @property
    def grid(self) -> str:
        """The label of the grid that its weights are cast to, see `grid_label`; empty where that is no fixed one."""
        return grid_label(self.config)

    @property
    def text(self) -> str:
        """Everything that decides what its runs compute, so that a run of another is not taken for one of it."""
        arguments = sorted((name, repr(value)) for name, value in self.arguments.items())
        return repr((self.trains_plain, arguments, sorted((k, repr(v)) for k, v in self.training.items())))


def grid_label(config: Config) -> str:
    """What tables call the grid of a backend's weights: ``"fp4_e2m1"``, or ``"int3, row, amax"`` for another block.

    Empty with learned widths, trained levels or sparsity, where the weights' values alone do not say the cast.
    """
    if any(one is not None and (one.learned or one.levels or one.sparsity) for one in config.all_settings):
        return ""
    weights = config.weights
    label = weights.name
    if weights.grid_text != Config.make(label).weights.grid_text:
        label += f", {weights.block_text}, {weights.scale or 'no scale'}"
    return label + "".join(f"; {rule.text}" for rule in config.rules)


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
        ValueError: an unknown format, method or recipe; the message says what is accepted.
    """
    fmts, methods = list(fmts), list(methods)
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}: {nearest(method, METHODS)}")
    yield ComparedSetting(PLAIN, PLAIN, {**common, "noise": "none"})
    seen = set()
    for method in methods:
        for fmt in fmts:
            setting = _usual(fmt, method, common)
            if setting.name not in seen:  # two formats may stand for the same average width
                seen.add(setting.name)
                yield setting
    for recipe in recipes:
        yield ComparedSetting(f"recipe {recipe}", "recipe", {**common, "recipe": recipe})


def own_settings(
    given: Mapping[str, Mapping[str, Any]], common: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[ComparedSetting]:
    """Settings of the user's own.

    Args:
        given: arguments of `gws_compile.backend` by the names of the settings; the key ``"training"`` has arguments of
            the training function.
        common: as in `usual_settings`.

    Raises:
        ValueError: a bad argument.
    """
    for name, arguments in given.items():
        if not isinstance(arguments, Mapping) or not isinstance(arguments.get("training", {}), Mapping):
            raise ValueError(f"setting {name!r} must have arguments of gws_compile.backend by name, got {arguments!r}")
        rest = {key: value for key, value in arguments.items() if key != "training"}
        plain = not rest  # other training, no cast
        rest = {"noise": "none"} if plain else rest
        yield ComparedSetting(name, PLAIN if plain else "", {**common, **rest}, arguments.get("training", {}))


def _usual(fmt: str, method: str, common: Mapping[str, Any]) -> ComparedSetting:
    name = f"{fmt}, {METHODS[method]}"
    arguments: dict[str, Any] = {**common, "fmt": fmt}
    if method in ("cast-afterwards", "straight-through"):
        arguments["noise"] = "none"
    elif method == "no-master":
        arguments["master"] = False
    elif method == "learned":
        weights = Config.make(fmt).weights
        arguments = {**common, "bits": LearnedBits(average=weights.bits)}
        name = f"{METHODS[method]}, average {weights.bits:g}"
    else:
        arguments["noise"] = method.replace("-", "_")
    return ComparedSetting(name, method, arguments)
