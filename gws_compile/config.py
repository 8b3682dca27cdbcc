"""The settings of a backend: a frozen, validated `Config`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from .cast import SCALES
from .formats import FloatFormat
from .learned import LearnedBits, check_bits
from .noise import NOISES

Scale = Literal["floor", "ceil"] | None
Noise = Literal["rounded_normal", "uniform", "none"]
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


@dataclass(frozen=True)
class Config:
    """Everything that decides how a graph is rewritten; `gws_compile.backend` documents each field.

    With learned widths ``learned`` says which, and ``bits`` has no meaning.
    """

    fmt: FloatFormat
    noise: Noise = "rounded_normal"
    bits: float = 0.0
    learned: LearnedBits | None = None
    block: tuple[int, int] = (32, 32)
    scale: Scale = "floor"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    seed: int = 0
    resample: Resample = "step"
    backward: Backward = "save"
    inner: Inner = "inductor"
    strict: bool = False

    @staticmethod
    def make(
        fmt: str | FloatFormat | None = None,
        *,
        noise: Noise = "rounded_normal",
        bits: float | LearnedBits | None = None,
        block: tuple[int, int] = (32, 32),
        scale: Scale = "floor",
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = DEFAULT_EXCLUDE,
        seed: int = 0,
        resample: Resample = "step",
        backward: Backward = "save",
        inner: Inner = "inductor",
        strict: bool = False,
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
        _check_choice("resample", resample, ("step", "forward"))
        _check_choice("backward", backward, ("save", "recompute"))
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


def check_block(block: object) -> tuple[int, int]:
    """A block shape as two positive ints.

    Raises:
        ValueError: anything else.
    """
    sides = tuple(block) if isinstance(block, (tuple, list)) else ()
    if len(sides) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sides):
        raise ValueError(f"block must be two positive ints (rows, columns), such as (32, 32), got {block!r}")
    return sides[0], sides[1]


def _patterns(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Iterable):
        raise ValueError(f"{name} must be a glob or a list of globs on weight names, got {value!r}")
    patterns = tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"{name} takes globs on weight names, such as '*.mlp.*', got {pattern!r}")
    return patterns
