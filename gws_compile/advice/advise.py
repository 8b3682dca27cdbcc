"""What the scaling law says of a model, its data and a format."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from tabulate import tabulate

from ..numerics.formats import FORMATS, FloatFormat
from ..numerics.integers import IntFormat
from ..numerics.presets import PRESETS
from .law import COMPUTE_PER_BIT, Budget, LossTerms, ScalingLaw, Split, splits
from .quantities import Block, check_block, positive, quantity

_FEWEST = 3

_BF16 = FORMATS["bf16"]


@dataclass(frozen=True)
class FormatAdvice:
    """What the law says of one format.

    Attributes:
        fmt: the format; None for no quantization.
        bits: P = E + M + 1; None for no quantization.
        params: N; of a compute budget alone, the best for this format. None where it is not known.
        tokens: D, likewise.
        terms: the loss, term by term; None where N or D is not known.
        cost_over_bf16: the format's term less that of E8M7 at the same N, D and block; None where there is no loss.
        critical_tokens: D_crit; None without N, and for no quantization, which has none.
        past_critical: whether D is above D_crit; None where one of them is not known.
    """

    fmt: FloatFormat | None
    bits: int | None
    params: float | None
    tokens: float | None
    terms: LossTerms | None
    cost_over_bf16: float | None
    critical_tokens: float | None
    past_critical: bool | None

    @property
    def name(self) -> str:
        """The format's name, or ``"none"``."""
        return "none" if self.fmt is None else self.fmt.name

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; ``precision`` among the terms is the cost over no quantization."""
        terms = None if self.terms is None else {"loss": self.terms.loss, **dataclasses.asdict(self.terms)}
        return {
            "fmt": None if self.fmt is None else self.fmt.name,
            "bits": self.bits,
            "params": self.params,
            "tokens": self.tokens,
            "terms": terms,
            "cost_over_bf16": self.cost_over_bf16,
            "critical_tokens": self.critical_tokens,
            "past_critical": self.past_critical,
        }


@dataclass(frozen=True)
class Advice:
    """An answer of `gws_compile.advise`; ``str()`` is its table with the law's scope.

    Attributes:
        params: N as it was given.
        tokens: D as it was given.
        block: elements that share a scale.
        compute: C as it was given.
        formats: a row each.
        split: how the given bits are best split.
        best_bits: P(D), the best bits for the tokens at any compute budget; None without tokens.
        best_format: likewise, of whole numbers of bits.
        best_budget: the best bits, parameters and tokens for the compute budget alone; None otherwise.
        extrapolated: what lies outside the runs that the law is fitted to, and by which factor.
        notes: what else is to be said.
        law: the law.
    """

    params: float | None
    tokens: float | None
    block: Block
    compute: float | None
    formats: tuple[FormatAdvice, ...]
    split: Split | None
    best_bits: float | None
    best_format: FloatFormat | None
    best_budget: Budget | None
    extrapolated: tuple[str, ...]
    notes: tuple[str, ...]
    law: ScalingLaw

    @property
    def scope(self) -> str:
        """What the law was fitted to: to be read beside every figure."""
        return self.law.scope.text

    def __getitem__(self, name: str) -> FormatAdvice:
        """The row of a format, by its name; ``"none"`` is that without quantization."""
        for row in self.formats:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; the rows are {', '.join(row.name for row in self.formats)}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        split = None
        if self.split is not None:
            split = {**dataclasses.asdict(self.split), "fmt": self.split.fmt and self.split.fmt.name}
        return {
            "params": self.params,
            "tokens": self.tokens,
            "block": self.block,
            "compute": self.compute,
            "formats": [row.to_dict() for row in self.formats],
            "split": split,
            "best_bits": self.best_bits,
            "best_format": self.best_format and self.best_format.name,
            "best_budget": None if self.best_budget is None else dataclasses.asdict(self.best_budget),
            "extrapolated": list(self.extrapolated),
            "notes": list(self.notes),
            "scope": self.scope,
            "law": {
                one.name: getattr(self.law, one.name)
                for one in dataclasses.fields(self.law)
                if one.name not in ("scope", "fitted")
            },
            "fit": None if self.law.fitted is None else self.law.fitted.to_dict(),
        }

    def plot(self, path: str | Path) -> None:
        """Make a picture: the loss over tokens with D_crit of each format, or over bits for a compute budget alone.

        Args:
            path: where it goes; its ending says the format (``.png``, ``.pdf``, ``.svg``).

        Raises:
            ValueError: neither params nor a compute budget was given.
            ImportError: matplotlib is missing.
        """
        from .plot import plot_bits, plot_tokens

        formats = [row.fmt for row in self.formats if row.fmt is not None]
        if self.best_budget is not None:
            plot_bits(path, self.law, self.best_budget, formats, self.block)
        elif self.params is not None:
            plot_tokens(path, self.law, self.params, self.tokens, formats, self.block)
        else:
            raise ValueError("there is nothing to draw of tokens without params: give params, or compute alone")

    def __str__(self) -> str:
        lines = [_asked(self), *([_table(self), ""] if self.formats else [])]
        if any(row.terms for row in self.formats):
            lines.append("over bf16: the format's term less that of E8M7 at the same parameters, tokens and block")
        lines += _best(self)
        said = [f"extrapolated: {text}" for text in self.extrapolated] + [f"note: {text}" for text in self.notes]
        return "\n".join(lines + [fill(text, 110, subsequent_indent="  ") for text in [*said, f"scope: {self.scope}"]])

    __repr__ = __str__


def advise(
    params: float | None = None,
    tokens: float | None = None,
    fmt: str | FloatFormat | Sequence[str | FloatFormat] | None = None,
    *,
    block: Block = 128,
    compute: float | None = None,
    bits: int | None = None,
    law: ScalingLaw | None = None,
) -> Advice:
    """What the scaling law of floating-point quantization training says of a model, its data and formats.

    The loss and its terms, what a format costs against bf16 (E8M7 at the same block) and against no quantization, the
    number of tokens D_crit from which on more data raises the loss, and the best precision. Its scope is narrow, and
    printed with every answer; it is not this backend's setting of 32 x 32 blocks on weights alone.

    Args:
        params: N, weights of the layers' matrices, without embeddings.
        tokens: D.
        fmt: a float format, or several; the formats of `gws_compile.FORMATS` by default.
        block: elements that share a scale, along one dimension, or ``"channel"``.
        compute: C = k N P D with k = 6/16: operations, those of P bits counted as P/16 of a 16-bit one's. Alone: the
            best bits, parameters and tokens for it. With one of params and tokens the other follows, for each format.
        bits: without ``fmt``, the formats are all splits of so many bits; the best split is told.
        law: another law, such as one of `ScalingLaw.fit`; the published one by default.

    Returns:
        The answer; print it.

    Raises:
        ValueError: nothing to answer, too much given, formats without params or compute, or a bad value.
    """
    if compute is None and params is None and tokens is None and bits is None:
        raise ValueError("nothing to answer: give params, tokens, compute or bits")
    if compute is not None and params is not None and tokens is not None:
        raise ValueError("compute with both params and tokens: these three leave no choice but the format; give two")
    if fmt is not None and params is None and compute is None:
        raise ValueError(f"fmt={fmt!r} has no effect without params or compute")
    block, law = check_block(block), law or ScalingLaw()
    params = None if params is None else positive("params", params)
    tokens = None if tokens is None else positive("tokens", tokens)
    compute = None if compute is None else positive("compute", compute)
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int)):
        raise ValueError(f"bits is {bits!r}; accepted: a whole number from 3 to 32")
    split = None if bits is None else law.best_split(bits)
    formats = _formats(fmt) if fmt is not None or bits is None else splits(bits)
    rows = [_row(law, one, params, tokens, compute, block) for one in formats]
    if params is not None and tokens is not None:
        rows.append(_row(law, None, params, tokens, None, block))
    budget = law.best_budget(compute, block) if compute is not None and params is None and tokens is None else None
    best_bits = None if tokens is None else law.best_bits(tokens, block)
    known = [row for row in rows if row.params is not None]
    compared = [_BF16] if any(row.terms for row in known) else []
    found = [(row.params, row.tokens) for row in known] + ([(budget.params, budget.tokens)] if budget else [])
    return Advice(
        params=params,
        tokens=tokens,
        block=block,
        compute=compute,
        formats=tuple(known),
        split=split,
        best_bits=best_bits,
        best_format=None if tokens is None else law.best_format(tokens, block),
        best_budget=budget,
        extrapolated=law.scope.beyond(
            [one for one, _ in found if one is not None],
            [one for one in (tokens, *(two for _, two in found)) if one is not None],
            dict.fromkeys([*formats, *compared]) if known else [],
            block,
        ),
        notes=(*(_notes(formats) if known else ()), *_below(best_bits, None if budget is None else budget.bits)),
        law=law,
    )


def _formats(fmt: str | FloatFormat | Sequence[str | FloatFormat] | None) -> list[FloatFormat]:
    if fmt is None:
        return list(FORMATS.values())
    given: Iterable[Any] = [fmt] if isinstance(fmt, str) or not isinstance(fmt, Iterable) else fmt
    found = list(dict.fromkeys(_format(one) for one in given))
    if not found:
        raise ValueError("fmt is empty; accepted: a float format such as 'e4m3', or several")
    return found


def _format(fmt: Any) -> FloatFormat:
    if isinstance(fmt, IntFormat) or (isinstance(fmt, str) and IntFormat.reads(fmt)):
        raise ValueError(f"fmt is {fmt!r}, an integer format: the law is of float formats alone, such as 'e4m3'")
    if isinstance(fmt, str) and fmt in PRESETS:
        element = PRESETS[fmt].element
        raise ValueError(
            f"fmt is {fmt!r}, a preset with a block and a scale that the law does not know: give an element format "
            + (
                "such as 'e4m3'"
                if isinstance(element, IntFormat)
                else f"such as {element.spec!r}, and block=, the elements that share a scale along one dimension"
            )
        )
    return FloatFormat.parse(fmt)


def _row(
    law: ScalingLaw,
    fmt: FloatFormat | None,
    params: float | None,
    tokens: float | None,
    compute: float | None,
    block: Block,
) -> FormatAdvice:
    bits = None if fmt is None else fmt.storage_bits
    if compute is not None and fmt is not None:
        product = compute / (COMPUTE_PER_BIT * fmt.storage_bits)
        if params is not None:
            tokens = product / params
        elif tokens is not None:
            params = product / tokens
        else:
            best = law.format_budget(compute, fmt, block)
            params, tokens = best.params, best.tokens
    exponent_bits, mantissa_bits = (None, None) if fmt is None else (fmt.exponent_bits, fmt.mantissa_bits)
    terms = over = critical = past = None
    if params is not None and fmt is not None:
        critical = law.critical_tokens(params, fmt.exponent_bits, fmt.mantissa_bits, block)
    if params is not None and tokens is not None:
        terms = law.terms(params, tokens, exponent_bits, mantissa_bits, block)
        bf16 = law.terms(params, tokens, _BF16.exponent_bits, _BF16.mantissa_bits, block)
        over = terms.precision - bf16.precision
        past = None if critical is None else tokens > critical
    return FormatAdvice(fmt, bits, params, tokens, terms, over, critical, past)


def _below(*bits: float | None) -> Iterable[str]:
    """What to say of best bits that no float format has."""
    for found in bits:
        if found is not None and found < _FEWEST:
            yield f"{found:.3f} bits are fewer than a sign, an exponent and a mantissa bit take: no format is like it"


def _notes(formats: Iterable[FloatFormat]) -> Iterable[str]:
    for fmt in formats:
        if fmt != FloatFormat.make(fmt.exponent_bits, fmt.mantissa_bits):
            yield (
                f"{fmt.name}: the law knows the numbers of exponent and mantissa bits; bias and largest value do not "
                "count"
            )


def _asked(advice: Advice) -> str:
    given = [
        f"{quantity(value)} {name}"
        for name, value in (
            ("parameters", advice.params),
            ("tokens", advice.tokens),
            ("operations (6/16 N P D)", advice.compute),
        )
        if value is not None
    ]
    block = "a scale a channel" if advice.block == "channel" else f"a scale for {advice.block} elements"
    return ", ".join([*given, block]) + "\n"


def _table(advice: Advice) -> str:
    rows = advice.formats
    columns: list[tuple[str, list[str]]] = [
        ("format", [row.name for row in rows]),
        ("bits", ["-" if row.bits is None else str(row.bits) for row in rows]),
    ]
    if advice.compute is not None:
        columns += [
            ("params", [_told(row.params) for row in rows]),
            ("tokens", [_told(row.tokens) for row in rows]),
        ]
    if any(row.terms is not None for row in rows):
        found = [row.terms for row in rows if row.terms is not None]
        columns += [
            ("loss", [f"{terms.loss:.4f}" for terms in found]),
            ("N's term", [f"{terms.model:.4f}" for terms in found]),
            ("D's term", [f"{terms.data:.4f}" for terms in found]),
            ("eps", [f"{terms.floor:.4f}" for terms in found]),
            ("format's term", [_cost(terms.precision) for terms in found]),
            ("over bf16", [_cost(row.cost_over_bf16 or 0.0) for row in rows]),
        ]
    columns.append(("D_crit", [_told(row.critical_tokens) for row in rows]))
    if any(row.terms is not None for row in rows):
        columns.append(("past it", ["-" if row.past_critical is None else _yes(row.past_critical) for row in rows]))
    columns = [column for column in columns if any(text != "-" for text in column[1])]
    return tabulate(
        [list(row) for row in zip(*(texts for _, texts in columns), strict=True)],
        headers=[name for name, _ in columns],
        colalign=["left", *["right"] * (len(columns) - 1)],
        disable_numparse=True,
    )


def _told(value: float | None) -> str:
    return "-" if value is None else quantity(value)


def _cost(value: float) -> str:
    return "0" if value == 0 else f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:.1e}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _best(advice: Advice) -> list[str]:
    lines = []
    if advice.split is not None:
        split = advice.split
        whole = "" if split.fmt is None else f"; of whole numbers {split.fmt.spec}"
        lines.append(
            f"best split of {split.bits:g} bits: {split.exponent_bits:.2f} exponent and {split.mantissa_bits:.2f} "
            f"mantissa bits{whole}"
        )
    if advice.best_bits is not None and advice.best_format is not None:
        lines.append(
            f"best precision for these tokens, at any compute budget: {advice.best_bits:.3f} bits; of whole numbers "
            f"{advice.best_format.spec}"
        )
    if advice.best_budget is not None:
        best = advice.best_budget
        lines.append(
            f"best for this compute: {best.bits:.3f} bits, {quantity(best.params)} parameters, {quantity(best.tokens)} "
            f"tokens, loss {best.loss:.4f}"
        )
    return lines
