"""The arguments of `gws_compile.backend`: types, defaults and help, written once; nothing is checked here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..numerics.blocks import Block
from ..numerics.elements import ElementFormat
from ..numerics.noise import Noise
from .attention import AttentionLike
from .learned_bits import LearnedBits
from .levels import Levels
from .operands import OperandLike
from .recipe import Recipe
from .rules import RuleLike
from .schedule import Schedule
from .sparsity import SparsityLike
from .weight_settings import DEFAULT_FORMAT, ScaleSetting

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
