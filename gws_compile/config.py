"""The settings of a backend: what each is (`Settings`), and the frozen, validated `Config` that is made of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch

from .numerics.blocks import Block
from .numerics.elements import ElementFormat
from .numerics.noise import Noise
from .numerics.presets import read_format
from .numerics.scales import Scale
from .numerics.spec import SampleSpec
from .recipes import as_recipe
from .settings.attention import AttentionLike, AttentionOperands, as_attention
from .settings.learned_bits import LearnedBits
from .settings.levels import Levels
from .settings.operands import Operand, OperandLike, ProductSettings, as_operand, check_role
from .settings.recipe import Recipe
from .settings.rules import Rule, RuleLike, make_rules
from .settings.schedule import Schedule
from .settings.sparsity import PrunedGroups, Sparsity, SparsityLike
from .settings.weight_settings import (
    DEFAULT_FORMAT,
    GivenSettings,
    ScaleSetting,
    WeightSettings,
    check_bits_of,
    check_choice,
)
from .warning import GwsWarning

Resample = Literal["step", "forward"]
Backward = Literal["save", "recompute"]
Inner = str | Callable[..., Any]

DEFAULT_EXCLUDE = (
    "lm_head.*",
    "*.lm_head.*",
    "embed_out.*",
    "*.embed_out.*",
    "head.weight",
    "*.head.weight",
    "output.weight",
    "*.output.weight",
    "score.weight",
    "*.score.weight",
    "classifier.weight",
    "*.classifier.weight",
    "gate.weight",
    "*.gate.weight",
    "*router*",
)
"""Names left alone by default: output heads and the routers of expert mixtures."""

INNERS = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class Setting:
    """One argument of `gws_compile.backend`, as whatever takes settings knows it.

    Attributes:
        name: of the argument.
        default: its default.
        help: what it means, on one line; the documentation of `gws_compile.backend` says the same words.
        metavar: what stands for its value in the help of a command.
        several: whether it has several values, which a command line may give one by one.
        option: what the option of a command is called that gives one of several; the name when empty.
    """

    name: str
    default: Any
    help: str
    metavar: str = "TEXT"
    several: bool = False
    option: str = ""


@dataclass(frozen=True)
class Settings:
    """The arguments of `gws_compile.backend`, not checked yet: their types, defaults and help are written here alone.

    `gws_compile.backend` and `Config.make` have these arguments with these defaults; the keys of a TOML file, the
    variables of the environment and the options of the command line are made of `SETTINGS`.
    """

    fmt: str | ElementFormat | Levels | None = field(
        default=None,
        metadata={
            "help": 'format of the cast: a name in `FORMATS`, any "eXmY", "int2" to "int8", a `FloatFormat` or '
            "`IntFormat`; a name in `PRESETS`, which also says block and scale; or `Levels`, which are trained; "
            f'"{DEFAULT_FORMAT}" when None. With learned widths it is the format of training, and the widest of their '
            "formats (bf16) when None.",
            "metavar": "FORMAT",
        },
    )
    noise: Noise | None = field(
        default=None,
        metadata={
            "help": 'law of R: "rounded_normal", round(N(0,1) / 2); "uniform", DiffQ\'s U(-1/2, 1/2); "none", the cast '
            'alone with a straight-through gradient. When None "rounded_normal", or what the recipe says; with '
            '`Levels` "none".',
            "metavar": "LAW",
        },
    )
    bits: float | LearnedBits | None = field(
        default=None,
        metadata={
            "help": "bit width b, 2 to 24, of the noise amplitude; when None the format's mantissa bits + 2, and N for "
            "intN. `LearnedBits` for widths that are trained.",
            "metavar": "NUMBER",
        },
    )
    block: Block | None = field(
        default=None,
        metadata={
            "help": "rows and columns that share a maximum and a scale, None for a whole side: (1, None) is a row, "
            "(None, None) the matrix. The preset's, or (32, 32), when None.",
            "metavar": "ROWSxCOLUMNS",
        },
    )
    scale: ScaleSetting = field(
        default="auto",
        metadata={
            "help": 'the block scale\'s rule: "floor" (OCP MX v1.0), "ceil", "amax" (exact, float32), "nvfp4" (two '
            'levels), or None for no scale. "auto" is the preset\'s, "amax" for integers, "floor" otherwise.',
            "metavar": "RULE",
        },
    )
    sparsity: SparsityLike = field(
        default=None,
        metadata={
            "help": 'which elements of weights are zero: "2:4" or another "N:M", N of M consecutive inputs that are '
            "kept, or `PrunedGroups` of whole rows or columns. Dense when None.",
            "metavar": "SPARSITY",
        },
    )
    rules: Iterable[RuleLike] = field(
        default=(),
        metadata={
            "help": 'settings by name, the first that matches wins: (glob, "nvfp4"), (glob, {"fmt": ..., "bits": ..., '
            '"block": ..., "scale": ..., "noise": ..., "sparsity": ...}), or (glob, None) for weights that are left '
            "alone. Weights that exclude names stay so.",
            "metavar": "GLOB=SETTINGS",
            "several": True,
            "option": "rule",
        },
    )
    schedule: Schedule | None = field(
        default=None,
        metadata={
            "help": "`Schedule` of the noise: from which draw to which, and its bit width over draws; and of the "
            "products that are rounded.",
            "metavar": "SCHEDULE",
        },
    )
    activations: OperandLike = field(
        default=None,
        metadata={
            "help": "how the activations that weights are multiplied with are rounded, an `Operand` or a format, in "
            "forward and in wgrad. Not at all when None.",
            "metavar": "OPERAND",
        },
    )
    gradients: OperandLike = field(
        default=None,
        metadata={
            "help": "how the gradients that come in from behind are rounded, an `Operand` or a format, in dgrad and in "
            "wgrad. Not at all when None.",
            "metavar": "OPERAND",
        },
    )
    attention: AttentionLike = field(
        default=None,
        metadata={
            "help": "how queries, keys, values and probabilities of attention are rounded: `AttentionOperands`, an "
            '`Operand` or a format for all four, or "fp8_tiles". Not at all when None.',
            "metavar": "OPERAND",
        },
    )
    recipe: str | Recipe | None = field(
        default=None,
        metadata={
            "help": 'settings of weights, activations, gradients and attention by one name: "mxfp8", "mxfp4", "nvfp4", '
            '"fp8_block", "fp8_tensor", "exmy", or a `Recipe`. Other arguments win over it.',
            "metavar": "NAME",
        },
    )
    include: str | Iterable[str] | None = field(
        default=None,
        metadata={
            "help": "globs on qualified names; only weights that match one are rewritten. All when None.",
            "metavar": "GLOBS",
            "several": True,
        },
    )
    exclude: str | Iterable[str] | None = field(
        default=DEFAULT_EXCLUDE,
        metadata={
            "help": "globs on qualified names that are left alone; output heads and routers by default. It wins over "
            "include.",
            "metavar": "GLOBS",
            "several": True,
        },
    )
    seed: int = field(
        default=0,
        metadata={"help": "0 to 2**64 - 1; equal seeds draw equal noise.", "metavar": "NUMBER"},
    )
    resample: Resample = field(
        default="step",
        metadata={
            "help": '"step": new noise once per optimizer step; "forward": in each graph of every training forward.'
        },
    )
    backward: Backward = field(
        default="save",
        metadata={
            "help": '"save" keeps the sampled weight for backward; "recompute" samples it again there and keeps '
            "nothing.",
        },
    )
    inner: Inner = field(
        default="inductor",
        metadata={
            "help": 'who compiles the rewritten graph: "inductor", "aot_eager", "eager", or a backend of your own, a '
            "callable (gm, example_inputs) -> callable.",
            "metavar": "COMPILER",
        },
    )
    master: bool = field(
        default=True,
        metadata={
            "help": "False to train without master weights: behind each optimizer step the sampled parameters are "
            "rounded stochastically to their format's grid, on which they lie between steps; there is no noise then.",
        },
    )
    strict: bool = field(
        default=False,
        metadata={
            "help": "an error, instead of a warning, when no weight is rewritten or an included one is left alone.",
        },
    )


DEFAULTS = Settings()

SETTINGS = tuple(Setting(setting.name, setting.default, **setting.metadata) for setting in fields(Settings))
"""In the order of the arguments."""


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
            include=None if include is None else _patterns("include", include),
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


def _patterns(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Iterable):
        raise ValueError(f"{name} must be a glob or a list of globs on weight names, got {value!r}")
    patterns = tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"{name} takes globs on weight names, such as '*.mlp.*', got {pattern!r}")
    return patterns
