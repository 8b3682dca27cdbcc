"""Pictures of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .compared_settings import METHODS, PLAIN
from .rows import ComparedRow

_MARKERS = "os^Dvp*X"


def losses_figure(rows: Sequence[ComparedRow]) -> Any | None:
    """Deployed loss less that of plain training, by format, a marker for each method.

    Rows that are no format with a method stand behind, by their names.

    Returns:
        A figure of matplotlib; None where there is nothing to compare.
    """
    shown = [row for row in rows if row.minus_plain is not None]
    if not shown:
        return None
    figure = _figure(max(7.0, 1.5 + 0.8 * len({_place(row) for row in shown})), 4.8)
    axes = figure.subplots()
    places = list(dict.fromkeys(_place(row) for row in shown))
    methods = list(dict.fromkeys(row.method for row in shown))
    for number, method in enumerate(methods):
        mine = [row for row in shown if row.method == method]
        aside = 0.6 * ((number + 0.5) / len(methods) - 0.5)
        axes.errorbar(
            [places.index(_place(row)) + aside for row in mine],
            [row.minus_plain.mean for row in mine if row.minus_plain],
            [_half(row.minus_plain) for row in mine if row.minus_plain],
            fmt=_MARKERS[number % len(_MARKERS)],
            capsize=3,
            label=METHODS.get(method, method or "own settings"),
        )
    axes.axhline(0, color="gray", linestyle="--", label="plain")
    axes.set_xticks(range(len(places)), places, rotation=20 if max(map(len, places)) < 12 else 45, ha="right")
    axes.set_yscale("symlog", linthresh=_linear(row.minus_plain.mean for row in shown if row.minus_plain))
    axes.set(ylabel="deployed loss - plain", title="Held-out loss of the deployed weights, paired by seed")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def robustness_figure(rows: Sequence[ComparedRow], labels: Sequence[str]) -> Any | None:
    """Loss of each row's weights behind a cast to each preset, less that of plain training.

    Returns:
        A figure of matplotlib; None where no row has casts.
    """
    shown = [row for row in rows if row.casts]
    if not shown or len(labels) < 2:
        return None
    figure = _figure(9.5, 5.2)
    axes = figure.subplots()
    for number, row in enumerate(shown):
        known = [(place, row.casts[label]) for place, label in enumerate(labels) if label in row.casts]
        axes.errorbar(
            [place for place, _ in known],
            [value.mean for _, value in known],
            [_half(value) for _, value in known],
            color="black" if row.method == PLAIN else f"C{number % 10}",
            linestyle="-" if row.method == PLAIN else ("--", "-.", ":")[number // 10 % 3],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
            capsize=2,
            label=row.name,
        )
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels, rotation=20, ha="right")
    means = [value.mean for row in shown for value in row.casts.values()]
    axes.set_yscale("symlog", linthresh=_linear(means))
    axes.set(xlabel="cast to", ylabel="loss - plain", title="The same weights, cast to other formats")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    return figure


def _place(row: ComparedRow) -> str:
    return row.grid if row.method in METHODS and row.grid else row.name


def _half(value: Any) -> float:
    return 0.0 if math.isnan(value.half) else float(value.half)


def _linear(values: Any) -> float:
    """Below this the axis is linear: half of the differences are larger."""
    sizes = sorted(abs(value) for value in values)
    return max(sizes[len(sizes) // 2], 1e-4)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture of a comparison needs matplotlib: pip install 'gws-compile[examples]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
