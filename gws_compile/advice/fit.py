"""The law's coefficients from runs: robust least squares, with what the runs cannot determine left as it was."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tabulate import tabulate

from .quantities import quantity
from .runs import Run, check_runs
from .scope import Range, Scope
from .terms import NAMES, Array, Points, log_gradient, terms

SPARE_RUNS = 2
"""Runs beyond the number of free coefficients that a fit takes, so that a spread is left to be seen."""

_HELD_FIRST = ("delta", "nu", "alpha", "beta", "gamma", "n", "d", "eps")
"""Of coefficients that the runs cannot tell apart, the first of these is held: exponents are the least one's own."""

_WIDEST = dict.fromkeys(("n", "d", "gamma"), 1e8) | dict.fromkeys(("alpha", "beta", "delta", "nu", "eps"), 1e2)
"""By which factor an interval may span from end to end; a coefficient with a wider one is held."""

_FARTHEST = dict.fromkeys(("n", "d", "gamma"), 1e6) | dict.fromkeys(("alpha", "beta", "delta", "nu", "eps"), 20.0)
"""By which factor a coefficient may leave the law that the fit begins with; it goes farther where its term is noise."""

_TERMS = (("delta", "nu", "gamma"), ("alpha", "n"), ("beta", "d"), ("eps",))
"""What stands in one term of the law, each in the order in which it is held."""

_STARTS = 8
_HUBER = 1.345  # of the spread: 95 % efficient with normal errors (Huber, Robust Statistics, 1981)
_POOR = 0.02
_LOST = 1e3  # the residual of a step beyond what float64 holds; a descent turns back


@dataclass(frozen=True)
class FittedCoefficient:
    """One coefficient of a fit.

    Attributes:
        name: as in `gws_compile.ScalingLaw`.
        value: what came out, or what it was held at.
        low: lower end of the 95 % interval; None where it was held.
        high: upper end.
        start: the value of the law that the fit began with.
        held: why the runs cannot determine it, and what runs would; None where they do.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    start: float
    held: str | None = None


@dataclass(frozen=True)
class LawFit:
    """A fit; ``str()`` is its table.

    Attributes:
        coefficients: all eight.
        runs: how many it was fitted to.
        error: root mean square of log(predicted loss / loss), over all runs, outliers too.
    """

    coefficients: tuple[FittedCoefficient, ...]
    runs: int
    error: float

    @property
    def held(self) -> dict[str, str]:
        """Coefficients that were held -> the reason."""
        return {one.name: one.held for one in self.coefficients if one.held is not None}

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "runs": self.runs,
            "error": self.error,
            "coefficients": {
                one.name: {"value": one.value, "low": one.low, "high": one.high, "start": one.start, "held": one.held}
                for one in self.coefficients
            },
        }

    def __str__(self) -> str:
        rows = [
            (
                one.name,
                f"{one.value:.5g}",
                "held" if one.low is None or one.high is None else f"{one.low:.4g} to {one.high:.4g}",
                f"{one.start:.5g}",
            )
            for one in self.coefficients
        ]
        table = tabulate(
            rows,
            headers=("coefficient", "value", "95 % interval", "before"),
            colalign=("left", "right", "left", "right"),
            disable_numparse=True,
        )
        lines = [
            table,
            f"{self.runs} runs; the law misses their losses by {100 * self.error:.2g} % (root mean square). Intervals: "
            "from the covariance of Huber's estimate, with Student's t.",
        ]
        if self.error > _POOR:
            lines.append(f"That is more than {100 * _POOR:.0f} %: the law does not describe these runs.")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.held.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"held as before: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines)


def fit_law(
    runs: Iterable[Run | dict[str, Any]] | dict[str, Any], start: Array, log2_channel: float
) -> tuple[LawFit, Scope]:
    """Fit the coefficients; see `gws_compile.ScalingLaw.fit`.

    Args:
        runs: the runs.
        start: (8,), coefficients that the fit begins with and that are kept where the runs cannot determine them.
        log2_channel: log2(B) of a scale a channel, which is not fitted.

    Raises:
        ValueError: fewer than 3 runs that the law is about, or a run that lacks something.
        ImportError: scipy is missing.
    """
    checked = check_runs(runs)
    if len(checked) <= SPARE_RUNS:
        raise ValueError(
            f"a fit takes {SPARE_RUNS + 1} runs or more, {SPARE_RUNS} beyond the free coefficients; there are "
            f"{len(checked)}"
        )
    optimize, stats = _scipy("scipy.optimize"), _scipy("scipy.stats")
    at, losses = _points(checked, log2_channel), np.array([run.loss for run in checked])
    held = _undetermined(checked, at, start)
    while True:
        for name in _HELD_FIRST:
            free = [one for one in NAMES if one not in held]
            if len(free) + SPARE_RUNS <= len(checked):
                break
            if name in free:
                held[name] = _too_few(checked, free)
        indices = [NAMES.index(one) for one in NAMES if one not in held]
        logs, covariance = _solve(optimize, at, losses, start, indices)
        reach = float(stats.t.ppf(0.975, len(checked) - len(indices)))
        wide = _run_off(logs - np.log(start), indices) or _too_wide(covariance, reach, indices)
        if wide is None or len(indices) == 1:
            break
        held[wide] = "the runs say too little of it: " + _wanted(wide, checked)
    half = reach * np.sqrt(np.diag(covariance))
    found = [
        FittedCoefficient(name, float(start[i]), None, None, float(start[i]), held[name])
        if name in held
        else FittedCoefficient(
            name,
            math.exp(logs[i]),
            math.exp(logs[i] - half[indices.index(i)]),
            math.exp(min(logs[i] + half[indices.index(i)], 700.0)),
            float(start[i]),
        )
        for i, name in enumerate(NAMES)
    ]
    error = float(np.sqrt(np.mean(_residuals(np.exp(logs), at, losses) ** 2)))
    return LawFit(tuple(found), len(checked), error), _scope(checked, sorted(held, key=NAMES.index))


def _scipy(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError("a fit needs scipy: pip install 'gws-compile[advice]'") from None


def _points(runs: Sequence[Run], log2_channel: float) -> Points:
    def column(values: Iterable[float]) -> Array:
        return np.array(list(values), dtype=np.float64)

    return Points(
        column(run.params for run in runs),
        column(run.tokens for run in runs),
        column(0 if run.fmt is None else run.fmt.exponent_bits for run in runs),
        column(0 if run.fmt is None else run.fmt.mantissa_bits for run in runs),
        column(
            0 if run.fmt is None else log2_channel if run.block == "channel" else math.log2(run.block) for run in runs
        ),
    )


def _residuals(coefficients: Array, at: Points, losses: Array) -> Array:
    return np.asarray(np.log(terms(coefficients, at).loss / losses))


def _undetermined(runs: Sequence[Run], at: Points, start: Array) -> dict[str, str]:
    """The coefficients to hold so that the derivatives by the others are independent, with the reasons."""
    held: dict[str, str] = {}
    while True:
        free = [name for name in NAMES if name not in held]
        columns = log_gradient(start, at)[:, [NAMES.index(name) for name in free]]
        lengths = np.linalg.norm(columns, axis=0)
        empty = [name for name, length in zip(free, lengths, strict=True) if length < 1e-12]
        if empty:
            held.update({name: _wanted(name, runs) for name in empty})
            continue
        _, singular, rows = np.linalg.svd(columns / lengths, full_matrices=True)
        rank = int(np.sum(singular > 1e-8 * singular[0]))
        if rank == len(free):
            return held
        # The null space's vectors show which columns depend on each other.
        shares = np.sqrt(np.sum(rows[rank:] ** 2, axis=0))
        name = next(name for name in _HELD_FIRST if name in free and shares[free.index(name)] > 1e-4)
        held[name] = _too_few(runs, free) if rank == len(runs) else _wanted(name, runs)


def _too_few(runs: Sequence[Run], free: Sequence[str]) -> str:
    return f"{len(runs)} runs are too few to free it with the others: that takes {len(free) + SPARE_RUNS} runs"


def _wanted(name: str, runs: Sequence[Run]) -> str:
    """What runs would determine a coefficient."""
    rounded = [run.fmt for run in runs if run.fmt is not None]
    takes, have = {
        "n": ("3 or more numbers of parameters, far apart", _count(run.params for run in runs)),
        "d": ("3 or more numbers of tokens, far apart", _count(run.tokens for run in runs)),
        "gamma": ("float formats narrow enough to cost loss", _count(fmt.storage_bits for fmt in rounded) + " widths"),
        "delta": ("several numbers of exponent bits", _count(fmt.exponent_bits for fmt in rounded)),
        "nu": ("several numbers of mantissa bits", _count(fmt.mantissa_bits for fmt in rounded)),
        "eps": ("several numbers of parameters and of tokens, far apart", _count(run.params for run in runs)),
    }[{"alpha": "n", "beta": "d"}.get(name, name)]
    return f"it takes runs with {takes}; there are {have}"


def _count(values: Iterable[float]) -> str:
    distinct = sorted(set(values))
    if not distinct:
        return "0"
    shown = ", ".join(map(quantity, distinct[:4])) + (", ..." if len(distinct) > 4 else "")
    return f"{len(distinct)} ({shown})"


def _solve(optimize: Any, at: Points, losses: Array, start: Array, free: Sequence[int]) -> tuple[Array, Array]:
    """The logarithms of all coefficients, (8,), and the covariance of the free ones' logarithms."""
    whole = np.log(start)

    def logs(part: Array) -> Array:
        filled = whole.copy()
        filled[free] = part
        return filled

    def residuals(part: Array) -> Array:
        with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
            return np.nan_to_num(_residuals(np.exp(logs(part)), at, losses), nan=_LOST, posinf=_LOST, neginf=-_LOST)

    def jacobian(part: Array) -> Array:
        with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
            return np.nan_to_num(log_gradient(np.exp(logs(part)), at)[:, free], nan=0.0, posinf=0.0, neginf=0.0)

    def descend(first: Array, loss: str, spread: float) -> Any:
        # In the columns' own orthogonal coordinates the steps do not suffer from n and alpha moving together.
        _, triangle = np.linalg.qr(jacobian(first))
        back = np.linalg.pinv(triangle)
        found = optimize.least_squares(
            lambda moved: residuals(first + back @ moved),
            np.zeros(len(free)),
            lambda moved: jacobian(first + back @ moved) @ back,
            loss=loss,
            f_scale=spread,
            xtol=1e-10,
            ftol=1e-10,
            gtol=1e-10,
            max_nfev=100,
        )
        return first + back @ found.x, float(found.cost)

    tried = [descend(first, "soft_l1", 0.01) for first in _starts(optimize, at, losses, whole, free)]
    best = min(tried, key=lambda one: one[1])[0]
    spare = len(losses) - len(free)
    for _ in range(4):
        spread = _spread(residuals(best), spare)
        best, _ = descend(best, "huber", _HUBER * spread)
    return logs(best), _covariance(residuals(best), jacobian(best), spread, spare)


def _starts(optimize: Any, at: Points, losses: Array, whole: Array, free: Sequence[int]) -> list[Array]:
    """Where descents begin: the exponents as they are and moved, each with the amplitudes that fit best."""
    random = np.random.default_rng(0)
    amplitudes = [NAMES.index(name) for name in ("n", "d", "eps", "gamma")]
    found = [whole[free]]
    for number in range(_STARTS - 1):
        logs = whole.copy()
        for name in ("alpha", "beta", "delta", "nu"):
            if NAMES.index(name) in free and number:
                logs[NAMES.index(name)] += 0.4 * random.standard_normal()
        parts = terms(np.exp(logs), at)
        columns = np.stack(parts, axis=-1)
        inside = [k for k, index in enumerate(amplitudes) if index in free]
        outside = [k for k in range(4) if k not in inside]
        left = (losses - columns[:, outside].sum(axis=1)) / losses
        factors, _ = optimize.nnls(columns[:, inside] / losses[:, None], left)
        for k, factor in zip(inside, np.maximum(factors, 1e-2), strict=True):
            # gamma divides its term, the others multiply theirs.
            logs[amplitudes[k]] += math.log(factor) * (-1 if k == 3 else 1)
        found.append(logs[free])
    return found


def _spread(residuals: Array, spare: int) -> float:
    """The standard deviation of the errors, from the median of the residuals' sizes."""
    median = float(np.median(np.abs(residuals)))
    return max(1.4826 * median * math.sqrt(len(residuals) / spare), 1e-9)


def _covariance(residuals: Array, columns: Array, spread: float, spare: int) -> Array:
    """Of Huber's estimate, with his correction for few runs (Robust Statistics, 1981, section 7.6)."""
    scaled = residuals / spread
    inner = np.abs(scaled) <= _HUBER
    share = max(float(np.mean(inner)), 1 / len(residuals))
    bounded = np.clip(scaled, -_HUBER, _HUBER) * spread
    correction = 1 + (len(residuals) - spare) / len(residuals) * (1 - share) / share
    variance = correction**2 * float(np.sum(bounded**2)) / spare / share**2
    return np.asarray(variance * np.linalg.pinv(columns.T @ columns, rcond=1e-14))


def _run_off(moved: Array, free: Sequence[int]) -> str | None:
    """A coefficient to hold because one of its term is far away, as happens where the term is not to be seen."""
    names = [NAMES[index] for index in free]
    far = [name for name in names if abs(moved[NAMES.index(name)]) > math.log(_FARTHEST[name])]
    return next((name for term in _TERMS if set(term) & set(far) for name in term if name in names), None)


def _too_wide(covariance: Array, reach: float, free: Sequence[int]) -> str | None:
    """A coefficient to hold because intervals are too wide; of several that move together the first to be held."""
    limits = np.array([math.log(_WIDEST[NAMES[index]]) / 2 for index in free])
    scaled = reach**2 * covariance / np.outer(limits, limits)
    if float(np.max(np.diag(scaled))) <= 1:
        return None
    _, vectors = np.linalg.eigh(scaled)
    shares = np.abs(vectors[:, -1])
    names = [NAMES[index] for index in free]
    return next(name for name in _HELD_FIRST if name in names and shares[names.index(name)] > 0.2)


def _scope(runs: Sequence[Run], held: Sequence[str]) -> Scope:
    rounded = [run for run in runs if run.fmt is not None]
    formats = [run.fmt for run in rounded if run.fmt is not None]
    blocks = [run.block for run in rounded if run.block != "channel"]
    kept = f" It keeps {', '.join(held)} of the law that it began with." if held else ""
    params, tokens = _range([run.params for run in runs]), _range([run.tokens for run in runs])
    assert params is not None
    assert tokens is not None
    return Scope(
        text=f"Fitted to {len(runs)} runs of one's own, {quantity(params[0])} to {quantity(params[1])} parameters and "
        f"{quantity(tokens[0])} to {quantity(tokens[1])} tokens.{kept} It holds for what these runs have in common: "
        "model, data, what is rounded, and how.",
        params=params,
        tokens=tokens,
        exponent_bits=_range([fmt.exponent_bits for fmt in formats]),
        mantissa_bits=_range([fmt.mantissa_bits for fmt in formats]),
        block=_range(blocks),
        channel=any(run.block == "channel" for run in rounded),
    )


def _range(values: Sequence[float]) -> Range | None:
    return (min(values), max(values)) if values else None
