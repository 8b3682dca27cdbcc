"""The checked settings of a backend: the frozen `Config`, made of what `gws_compile.settings.arguments` lists."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from .numerics.blocks import Block
from .numerics.elements import ElementFormat
from .numerics.noise import Noise
from .numerics.presets import read_format
from .numerics.scales import Scale
from .numerics.spec import SampleSpec
from .recipes import as_recipe
from .settings.arguments import DEFAULTS, INNERS, SETTINGS, Backward, Inner, Resample
from .settings.attention import AttentionLike, AttentionOperands, as_attention
from .settings.learned_bits import LearnedBits
from .settings.levels import Levels
from .settings.operands import Operand, OperandLike, ProductSettings, as_operand, check_role
from .settings.recipe import Recipe
from .settings.rules import Rule, RuleLike, make_rules
from .settings.schedule import Schedule
from .settings.sparsity import PrunedGroups, Sparsity, SparsityLike
from .settings.weight_settings import (
    GivenSettings,
    ScaleSetting,
    WeightSettings,
    check_bits_of,
    check_choice,
)
from .warning import GwsWarning


@dataclass(frozen=True)
class Config:
    """Everything that decides how a graph is rewritten: the checked `Settings`, see there for each field.

    Attributes:
        weights: how a weight is sampled of which no rule says otherwise; ``fmt``, ``noise``, ``bits``, ``learned``,
            ``block``, ``scale`` and ``sparsity`` are its.
        rules: in their order.
    """

    weights: WeightSettings
    rules: tuple[Rule, ...]
    schedule: Schedule | None
    activations: Operand | None
    gradients: Operand | None
    attention: AttentionOperands | None
    recipe: str | Recipe | None
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    seed: int
    resample: Resample
    backward: Backward
    inner: Inner
    master: bool
    strict: bool

    @staticmethod
    def make(
        fmt: str | ElementFormat | Levels | None = DEFAULTS.fmt,
        *,
        noise: Noise | None = DEFAULTS.noise,
        bits: float | LearnedBits | None = DEFAULTS.bits,
        block: Block | None = DEFAULTS.block,
        scale: ScaleSetting = DEFAULTS.scale,
        sparsity: SparsityLike = DEFAULTS.sparsity,
        rules: Iterable[RuleLike] = DEFAULTS.rules,
        schedule: Schedule | None = DEFAULTS.schedule,
        activations: OperandLike = DEFAULTS.activations,
        gradients: OperandLike = DEFAULTS.gradients,
        attention: AttentionLike = DEFAULTS.attention,
        recipe: str | Recipe | None = DEFAULTS.recipe,
        include: str | Iterable[str] | None = DEFAULTS.include,
        exclude: str | Iterable[str] | None = DEFAULTS.exclude,
        seed: int = DEFAULTS.seed,
        resample: Resample = DEFAULTS.resample,
        backward: Backward = DEFAULTS.backward,
        inner: Inner = DEFAULTS.inner,
        master: bool = DEFAULTS.master,
        strict: bool = DEFAULTS.strict,
    ) -> Config:
        """Check every argument and build the configuration.

        Raises:
            ValueError: a bad value; the message names it and what is accepted.
        """
        for name, flag in (("master", master), ("strict", strict)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be True or False, got {flag!r}")
        made = as_recipe(recipe, None if isinstance(fmt, Levels) else fmt)
        noise = "none" if not master and noise is None and (made is None or "noise" not in made.of_weights) else noise
        if sparsity is None and made is not None:
            sparsity = made.of_weights.get("sparsity")
        given = replace(_given(made, fmt, noise, bits, block, scale), sparsity=sparsity)
        if made is not None:
            activations = made.activations if activations is None else activations
            gradients = made.gradients if gradients is None else gradients
            attention = made.attention if attention is None else attention
        if schedule is not None and not isinstance(schedule, Schedule):
            raise ValueError(f"schedule must be a Schedule or None, got {schedule!r}")
        scheduled = schedule is not None and bool(schedule.bits)
        weights = WeightSettings.make(given, scheduled=scheduled)
        check_choice("resample", resample, get_args(Resample))
        check_choice("backward", backward, get_args(Backward))
        if not (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**64):
            raise ValueError(f"seed must be an int in 0 .. 2**64 - 1, got {seed!r}")
        if not (callable(inner) or (isinstance(inner, str) and inner in INNERS)):
            raise ValueError(f"inner must be one of {', '.join(map(repr, INNERS))} or a callable, got {inner!r}")
        activations, gradients = as_operand("activations", activations), as_operand("gradients", gradients)
        check_role("activations", activations, ("forward", "wgrad"))
        check_role("gradients", gradients, ("dgrad", "wgrad"))
        config = Config(
            weights=weights,
            rules=(
                *make_rules(rules, given, scheduled=scheduled),
                *make_rules(() if made is None else made.rules, given, scheduled=scheduled),
            ),
            schedule=schedule,
            activations=activations,
            gradients=gradients,
            attention=as_attention(attention),
            recipe=recipe,
            include=None if include is None else _included(include),
            exclude=_patterns("exclude", exclude or ()),
            seed=seed,
            resample=resample,
            backward=backward,
            inner=inner,
            master=master,
            strict=strict,
        )
        _check_operands(config)
        _check_master(config)
        if schedule is not None:
            _check_schedule(schedule, config, bits)
        return config

    @property
    def fmt(self) -> ElementFormat:
        """Element format of the cast; that in which levels are stored, where they are trained."""
        return self.weights.fmt

    @property
    def noise(self) -> Noise:
        """Law of R."""
        return self.weights.noise

    @property
    def bits(self) -> float:
        """Bit width b, at the first draw where a schedule moves it; without meaning where it is learned."""
        return self.bits_at(0)

    @property
    def learned(self) -> LearnedBits | None:
        """The learned widths; None for fixed ones."""
        return self.weights.learned

    @property
    def tables(self) -> tuple[Levels, ...]:
        """The tables of levels that weights may be cast to, by their names."""
        settings = (self.weights, *(rule.settings for rule in self.rules))
        return tuple(one.levels for one in settings if one is not None and one.levels is not None)

    @property
    def block(self) -> Block:
        """Rows and columns that share a maximum and a scale."""
        return self.weights.block

    @property
    def scale(self) -> Scale:
        """Rule of the block scale."""
        return self.weights.scale

    @property
    def sparsity(self) -> Sparsity | None:
        """Which elements of a weight are zero."""
        return self.weights.sparsity

    @property
    def products(self) -> ProductSettings:
        """How the other operands are rounded in the products that read a sampled weight."""
        moved = self.schedule is not None and self.schedule.moves_products
        return ProductSettings(self.activations, self.gradients, moved)

    @property
    def attention_text(self) -> str:
        """How attention is rounded, in words; empty where it is not."""
        return "" if self.attention is None else self.attention.text

    @property
    def draws_noise(self) -> bool:
        """Whether any weight may get noise."""
        return any(one is not None and one.noise != "none" for one in self.all_settings)

    @property
    def all_settings(self) -> tuple[WeightSettings | None, ...]:
        """Those of the weights of which no rule says otherwise, and those of each rule; None where one has none."""
        return (self.weights, *(rule.settings for rule in self.rules))

    def rule_of(self, name: str | tuple[str, ...]) -> Rule | None:
        """The rule that holds of a weight: the first that matches its name, or one of its names."""
        return next((rule for rule in self.rules if rule.matches(name)), None)

    def settings_of(self, name: str | tuple[str, ...]) -> WeightSettings | None:
        """How a weight of this name, or these names, is sampled; None for one that a rule leaves alone."""
        rule = self.rule_of(name)
        return self.weights if rule is None else rule.settings

    def bits_at(self, step: int, settings: WeightSettings | None = None) -> float:
        """The bit width, where it is fixed or a schedule moves it, at a draw.

        Args:
            step: number of the draw.
            settings: of the weight; the backend's own when None.
        """
        settings = settings or self.weights
        width = self.schedule.width(step) if self.schedule is not None and settings.scheduled else None
        return settings.bits if width is None else width

    def sample_spec(self, dtype: torch.dtype) -> SampleSpec:
        """How a weight of this dtype is sampled in training, of which no rule says otherwise."""
        return self.weights.sample_spec(dtype)

    def texts(self) -> dict[str, str]:
        """The settings by the names of the arguments of `gws_compile.backend`, as text for a report."""
        values: dict[str, Any] = {setting.name: getattr(self, setting.name) for setting in SETTINGS}
        values["fmt"] = self.weights.name
        if self.learned is not None:
            values["bits"] = self.learned
        elif self.weights.scheduled:
            values["bits"] = "of the schedule"
        values["rules"] = tuple(rule.text for rule in self.rules)
        for name in ("activations", "gradients", "attention"):
            values[name] = None if values[name] is None else values[name].text
        if isinstance(self.recipe, Recipe):
            values["recipe"] = "a Recipe"
        if callable(self.inner):
            values["inner"] = getattr(self.inner, "__name__", type(self.inner).__name__)
        return {name: _text(value) for name, value in values.items()}


def _given(
    recipe: Recipe | None,
    fmt: str | ElementFormat | Levels | None,
    noise: Noise | None,
    bits: float | LearnedBits | None,
    block: Block | None,
    scale: ScaleSetting,
) -> GivenSettings:
    """What is given of the weights; what is not, the recipe says. A format has its own width, block and scale."""
    of_recipe = {} if recipe is None else recipe.of_weights
    if fmt is not None and of_recipe.get("fmt") != fmt:
        of_recipe = {key: value for key, value in of_recipe.items() if key in ("noise", *_kept(of_recipe, fmt))}
    return GivenSettings(
        fmt=of_recipe.get("fmt") if fmt is None else fmt,
        noise=of_recipe.get("noise") if noise is None else noise,
        bits=of_recipe.get("bits") if bits is None else bits,
        block=of_recipe.get("block") if block is None else block,
        scale=of_recipe.get("scale", "auto") if scale == "auto" else scale,
    )


def _kept(of_recipe: dict[str, Any], fmt: str | ElementFormat | Levels) -> tuple[str, ...]:
    """What a recipe says of the weights beside their format, where that is given in another spelling."""
    if isinstance(fmt, Levels):
        return ()
    try:
        return ("block", "scale", "bits") if of_recipe.get("fmt") == read_format(fmt)[0] else ()
    except ValueError:
        return ()


def _check_operands(config: Config) -> None:
    rounded = [name for name in ("activations", "gradients") if getattr(config, name) is not None]
    if config.tables and config.products.change_something:
        raise ValueError(
            "fmt=Levels(...) is not multiplied with rounded operands: leave out "
            f"{' and '.join(rounded) or 'the schedule of products'}"
        )
    if config.inner == "eager" and config.products.change_something:
        raise ValueError(
            f"inner='eager' has no graph of the products in which {' and '.join(rounded) or 'operands'} could be "
            "rounded: use 'aot_eager' or 'inductor'"
        )
    if config.products.rounds:
        for where, settings in (("block", config.weights), *((rule.text, rule.settings) for rule in config.rules)):
            rows, cols = (None, None) if settings is None else settings.block
            if (rows or math.inf) > (cols or math.inf):
                raise ValueError(
                    f"{where}: with activations or gradients, blocks of weights run along what a product sums over, "
                    f"their second side, got {(rows, cols)}; write {(cols, rows)}"
                )
    gradients, activations = config.gradients, config.activations
    sparse = any(one is not None and one.sparsity is not None for one in config.all_settings)
    if sparse and activations is not None and activations.hadamard and activations.rounds_in("forward"):
        raise ValueError(
            f"activations: hadamard={activations.hadamard} transforms the weights of the forward too, and a sparse "
            "weight is not sparse any more behind it: leave hadamard or sparsity out, or give "
            "products=('wgrad',)"
        )
    if gradients is not None and gradients.hadamard and activations is None:
        _warn(
            f"gradients: hadamard={gradients.hadamard} transforms the activations of wgrad too, and activations=None "
            "does not round them there: give both"
        )


def _check_master(config: Config) -> None:
    if config.master:
        return
    for where, settings in (("", config.weights), *((f"{rule.text}: ", rule.settings) for rule in config.rules)):
        if settings is None:
            continue
        if settings.noise != "none":
            raise ValueError(
                f"{where}with master=False weights lie on their grid and get no noise: noise must be 'none', or left "
                f"out, got {settings.noise!r}"
            )
        if settings.levels is not None:
            raise ValueError(
                f"{where}with master=False fmt must be a format, got {settings.levels}: levels that are trained would "
                "move under the weights that lie on them"
            )
        if isinstance(settings.sparsity, PrunedGroups):
            raise ValueError(
                f"{where}with master=False sparsity must be 'N:M' or None, got {str(settings.sparsity)!r}: without the "
                "rows or columns that are pruned a block has another scale than the one that it was written with"
            )


def _check_schedule(schedule: Schedule, config: Config, bits: float | LearnedBits | None) -> None:
    weights = config.weights
    if schedule.changes_nothing:
        _warn("schedule=Schedule() changes nothing: give start, stop, bits, or the steps of a product")
    elif not config.draws_noise and (schedule.draws_from_to or schedule.bits):
        _warn(f"schedule=Schedule({schedule}) has no effect with noise='none'")
    if schedule.attention != (0, None) and config.attention is None:
        _warn("Schedule.attention has no effect with attention=None")
    moved = [one for one in ("forward", "dgrad", "wgrad") if getattr(schedule, one) != (0, None)]
    if moved == ["wgrad"] and not config.products.rounds:
        _warn("Schedule.wgrad has no effect: neither activations nor gradients are rounded")
    if not schedule.bits:
        return
    if bits is not None and weights.learned is None:
        raise ValueError(f"bits={bits!r} and Schedule.bits both say the bit width: leave one of them out")
    for step, width in schedule.bits:
        check_bits_of(weights.fmt, f"Schedule.bits at step {step}", width)
        learned = weights.learned
        if learned is not None and not learned.min <= width <= learned.max:
            raise ValueError(
                f"Schedule.bits at step {step} must lie within LearnedBits.min={learned.min:g} and "
                f"max={learned.max:g}, got {width:g}"
            )


def _warn(message: str) -> None:
    warnings.warn(message, GwsWarning, stacklevel=4)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join("all" if one is None else str(one) for one in value) or "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _included(value: str | Iterable[str]) -> tuple[str, ...]:
    patterns = _patterns("include", value)
    if not patterns:
        raise ValueError(f"include={value!r} matches no weight; give globs on weight names, or None for all")
    return patterns


def _patterns(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Iterable):
        raise ValueError(f"{name} must be a glob or a list of globs on weight names, got {value!r}")
    patterns = tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"{name} takes globs on weight names, such as '*.mlp.*', got {pattern!r}")
    return patterns
