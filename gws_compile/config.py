"""The settings of a backend: what each is (`Settings`), and the frozen, validated `Config` that is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch

from .numerics.blocks import check_block
from .numerics.formats import FloatFormat
from .numerics.noise import NOISES, Noise
from .numerics.scales import SCALES, Scale
from .numerics.spec import SampleSpec
from .numerics.widths import WidthRule

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

DEFAULT_FORMAT = "fp8_e4m3"

INNERS = ("inductor", "aot_eager", "eager")


Granularity = Literal["block", "weight"]

DEFAULT_FORMATS = ("fp4_e2m1", "fp6_e3m2", "fp8_e4m3", "fp12_e4m7", "bf16")


@dataclass(frozen=True)
class LearnedBits:
    """Bit widths that are trained along with the weights (arXiv 2505.11170, section 3).

    The width of a block (or weight) is ``b = target + b_i * (init - target)``, kept within ``min`` and ``max``; the
    float32 ``b_i``, 1 at the start, is what an optimizer moves: give it `Backend.parameters`.

    Args:
        init: width at the start.
        target: width at ``b_i = 0``: what weight decay on ``b_i``, and `Backend.bit_loss`, pull towards.
        granularity: ``"block"``, a width for each block, or ``"weight"``.
        min: smallest width.
        max: largest width.
        average: the average width, over all elements, that training is to end with. `Backend.bit_loss` is then an
            augmented Lagrangian of this constraint, to be added to the loss as it is.
        formats: what widths stand for in noise-free calls: the first format whose mantissa bits + 2 reach the width, or
            else the last. Ascending in mantissa bits.

    Raises:
        ValueError: a bad value; the message names it and what is accepted.
    """

    init: float = 6.0
    target: float = 4.0
    granularity: Granularity = "block"
    min: float = 2.0
    max: float = 10.0
    average: float | None = None
    formats: tuple[str | FloatFormat, ...] = DEFAULT_FORMATS

    def __post_init__(self) -> None:
        for name in ("min", "max", "init", "target"):
            check_bits(f"LearnedBits.{name}", getattr(self, name))
        if not self.min < self.max:
            raise ValueError(f"LearnedBits.min must be below max, got min={self.min:g}, max={self.max:g}")
        for name in ("init", "target", "average"):
            value = getattr(self, name)
            if value is not None and not (check_bits(f"LearnedBits.{name}", value) and self.min <= value <= self.max):
                raise ValueError(
                    f"LearnedBits.{name} must lie within min={self.min:g} and max={self.max:g}, got {value:g}"
                )
        if self.init == self.target:
            raise ValueError(
                f"LearnedBits.init and target must differ, got {self.init:g} for both: widths move between them as "
                "target + b_i * (init - target)"
            )
        if self.granularity not in ("block", "weight"):
            raise ValueError(f"LearnedBits.granularity must be 'block' or 'weight', got {self.granularity!r}")
        if isinstance(self.formats, str) or not self.formats:
            raise ValueError(f"LearnedBits.formats must be a list of formats, got {self.formats!r}")
        formats = tuple(FloatFormat.parse(fmt) for fmt in self.formats)
        object.__setattr__(self, "formats", formats)
        mantissas = [fmt.mantissa_bits for fmt in formats]
        if mantissas != sorted(mantissas) or len(set(formats)) != len(formats) or mantissas[-1] > 22:
            raise ValueError(
                "LearnedBits.formats must be different and ascend in mantissa bits, at most 22, got "
                + ", ".join(f"{fmt.name} ({fmt.mantissa_bits})" for fmt in formats)
            )

    @property
    def widest(self) -> FloatFormat:
        """The format of the largest widths."""
        fmt = self.formats[-1]
        assert isinstance(fmt, FloatFormat)
        return fmt

    @property
    def rule(self) -> WidthRule:
        """What a width parameter means to the operator."""
        formats = tuple(FloatFormat.parse(fmt) for fmt in self.formats)
        return WidthRule(float(self.init), float(self.target), float(self.min), float(self.max), formats)


def check_bits(name: str, value: object) -> float:
    """A bit width as a float.

    Raises:
        ValueError: no number from 2 to 24.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 2 <= value <= 24
        or not math.isfinite(value)
    ):
        raise ValueError(f"{name} must be a number from 2 to 24, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class Setting:
    """One argument of `gws_compile.backend`, as whatever takes settings knows it.

    Attributes:
        name: of the argument.
        default: its default.
        help: what it means, on one line; the documentation of `gws_compile.backend` says the same words.
        metavar: what stands for its value in the help of a command.
        several: whether it has several values, which a command line may give one by one.
    """

    name: str
    default: Any
    help: str
    metavar: str = "TEXT"
    several: bool = False


@dataclass(frozen=True)
class Settings:
    """The arguments of `gws_compile.backend`, not checked yet: their types, defaults and help are written here alone.

    `gws_compile.backend` and `Config.make` have these arguments with these defaults; the keys of a TOML file, the
    variables of the environment and the options of the command line are made of `SETTINGS`.
    """

    fmt: str | FloatFormat | None = field(
        default=None,
        metadata={
            "help": 'element format of the cast: a name in `FORMATS`, any "eXmY", or a `FloatFormat`; '
            f'"{DEFAULT_FORMAT}" when None. With learned widths it is the format of training, and the widest of their '
            "formats (bf16) when None.",
            "metavar": "FORMAT",
        },
    )
    noise: Noise = field(
        default="rounded_normal",
        metadata={
            "help": 'law of R: "rounded_normal", round(N(0,1) / 2); "uniform", DiffQ\'s U(-1/2, 1/2); "none", the cast '
            "alone with a straight-through gradient.",
            "metavar": "LAW",
        },
    )
    bits: float | LearnedBits | None = field(
        default=None,
        metadata={
            "help": "bit width b, 2 to 24, of the noise amplitude; the format's mantissa bits + 2 when None. "
            "`LearnedBits` for widths that are trained.",
            "metavar": "NUMBER",
        },
    )
    block: tuple[int, int] = field(
        default=(32, 32),
        metadata={"help": "rows and columns that share a maximum and a scale.", "metavar": "ROWSxCOLUMNS"},
    )
    scale: Scale = field(
        default="floor",
        metadata={
            "help": 'the block scale\'s rule: "floor" (OCP MX v1.0), "ceil", or None for no scale.',
            "metavar": "RULE",
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

    With learned widths ``learned`` says which, and ``bits`` has no meaning.
    """

    fmt: FloatFormat
    noise: Noise
    bits: float
    learned: LearnedBits | None
    block: tuple[int, int]
    scale: Scale
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    seed: int
    resample: Resample
    backward: Backward
    inner: Inner
    strict: bool

    @staticmethod
    def make(
        fmt: str | FloatFormat | None = DEFAULTS.fmt,
        *,
        noise: Noise = DEFAULTS.noise,
        bits: float | LearnedBits | None = DEFAULTS.bits,
        block: tuple[int, int] = DEFAULTS.block,
        scale: Scale = DEFAULTS.scale,
        include: str | Iterable[str] | None = DEFAULTS.include,
        exclude: str | Iterable[str] | None = DEFAULTS.exclude,
        seed: int = DEFAULTS.seed,
        resample: Resample = DEFAULTS.resample,
        backward: Backward = DEFAULTS.backward,
        inner: Inner = DEFAULTS.inner,
        strict: bool = DEFAULTS.strict,
    ) -> Config:
        """Check every argument and build the configuration.

        Raises:
            ValueError: a bad value; the message names it and what is accepted.
        """
        learned = bits if isinstance(bits, LearnedBits) else None
        if fmt is None:
            fmt = DEFAULT_FORMAT if learned is None else learned.widest
        fmt = FloatFormat.parse(fmt)
        _check_choice("noise", noise, NOISES)
        _check_choice("scale", scale, SCALES)
        _check_choice("resample", resample, get_args(Resample))
        _check_choice("backward", backward, get_args(Backward))
        if learned is not None:
            if noise == "none":
                raise ValueError("bits=LearnedBits(...) learns from the noise: noise must not be 'none'")
            if fmt.mantissa_bits > 22:
                raise ValueError(f"with bits=LearnedBits(...) fmt has at most 22 mantissa bits, got {fmt.name}")
        if bits is None or isinstance(bits, LearnedBits):
            bits = fmt.noise_bits
        if not (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**64):
            raise ValueError(f"seed must be an int in 0 .. 2**64 - 1, got {seed!r}")
        if not (callable(inner) or (isinstance(inner, str) and inner in INNERS)):
            raise ValueError(f"inner must be one of {', '.join(map(repr, INNERS))} or a callable, got {inner!r}")
        if not isinstance(strict, bool):
            raise ValueError(f"strict must be True or False, got {strict!r}")
        return Config(
            fmt=fmt,
            noise=noise,
            bits=check_bits("bits", bits),
            learned=learned,
            block=check_block(block),
            scale=scale,
            include=None if include is None else _patterns("include", include),
            exclude=_patterns("exclude", exclude or ()),
            seed=seed,
            resample=resample,
            backward=backward,
            inner=inner,
            strict=strict,
        )

    def sample_spec(self, dtype: torch.dtype) -> SampleSpec:
        """How a weight of this dtype is sampled in training."""
        rule = None if self.learned is None else self.learned.rule
        return SampleSpec(self.fmt, self.noise, self.bits, self.scale, rule, dtype)

    def texts(self) -> dict[str, str]:
        """The settings by the names of the arguments of `gws_compile.backend`, as text for a report."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if values.pop("learned") is not None:
            values["bits"] = self.learned
        if callable(self.inner):
            values["inner"] = getattr(self.inner, "__name__", type(self.inner).__name__)
        return {name: _text(value) for name, value in values.items()}


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _check_choice(name: str, value: object, accepted: Iterable[object]) -> None:
    choices = tuple(accepted)
    if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _patterns(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Iterable):
        raise ValueError(f"{name} must be a glob or a list of globs on weight names, got {value!r}")
    patterns = tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"{name} takes globs on weight names, such as '*.mlp.*', got {pattern!r}")
    return patterns
