"""Pictures of a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..figures import new_figure
from .compared_settings import METHODS, PLAIN
from .rows import ComparedRow

_WHAT = "a picture of a comparison"

_MARKERS = "os^Dvp*X"
_OWN = "own settings"


def losses_figure(rows: Sequence[ComparedRow]) -> Any | None:
    """Deployed loss less that of plain training.

    Above by format, a marker for each of the usual methods; below the other settings, by their names.

    Returns:
        A figure of matplotlib; None where there is nothing to compare.
    """
    shown = [row for row in rows if row.minus_plain is not None]
    usual, own = [row for row in shown if _is_usual(row)], [row for row in shown if not _is_usual(row)]
    if not shown:
        return None
    heights = [4.4] * bool(usual) + [1.2 + 0.25 * len(own)] * bool(own)
    width = 1.5 + 0.8 * len({row.grid for row in usual}) + (0.06 * max(len(row.name) for row in own) if own else 0.0)
    figure = new_figure(max(7.0, width), sum(heights), what=_WHAT, extra="examples")
    panels = list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    linear = _linear(row.minus_plain.mean for row in shown if row.minus_plain)
    if usual:
        _by_method(panels[0], usual, linear)
        panels[0].set_title("Held-out loss of the deployed weights, paired by seed")
    if own:
        _by_name(panels[-1], own, linear)
    return figure


def robustness_figure(rows: Sequence[ComparedRow], labels: Sequence[str]) -> Any | None:
    """Loss of each row's weights behind a cast to each preset, less that of plain training; a panel for each method.

    Returns:
        A figure of matplotlib; None where no row has casts.
    """
    shown = [row for row in rows if row.casts]
    if not shown or len(labels) < 2:
        return None
    plain = [row for row in shown if row.method == PLAIN][:1]
    groups: dict[str, list[ComparedRow]] = {}
    for row in shown:
        if row not in plain:
            groups.setdefault(_method(row), []).append(row)
    groups = groups or {"": []}
    columns = min(2, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure = new_figure(9.0 * columns, 4.6 * lines, what=_WHAT, extra="examples")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    means = [value.mean for row in shown for value in row.casts.values()]
    for panel, (name, members) in zip(panels, groups.items(), strict=False):
        for number, row in enumerate([*plain, *members]):
            _line(panel, row, labels, number)
        panel.axhline(0, color="gray", linewidth=0.8)
        panel.set_xticks(range(len(labels)), labels, rotation=20, ha="right")
        panel.set_yscale("symlog", linthresh=_linear(means))
        panel.set(xlabel="cast to", ylabel="loss - plain", title=f"The same weights, cast to other formats: {name}")
        panel.grid(axis="y", alpha=0.3)
        panel.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for panel in panels[len(groups) :]:
        panel.axis("off")
    return figure


def _by_method(panel: Any, rows: Sequence[ComparedRow], linear: float) -> None:
    grids = list(dict.fromkeys(row.grid for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    for number, method in enumerate(methods):
        mine = [row for row in rows if row.method == method]
        aside = 0.6 * ((number + 0.5) / len(methods) - 0.5)
        panel.errorbar(
            [grids.index(row.grid) + aside for row in mine],
            [row.minus_plain.mean for row in mine if row.minus_plain],
            [_half(row.minus_plain) for row in mine if row.minus_plain],
            fmt=_MARKERS[number % len(_MARKERS)],
            capsize=3,
            label=METHODS[method],
        )
    panel.axhline(0, color="gray", linestyle="--", label="plain")
    panel.set_xticks(range(len(grids)), grids, rotation=20, ha="right")
    panel.set_yscale("symlog", linthresh=linear, linscale=2)
    panel.set(ylabel="deployed loss - plain")
    panel.grid(axis="y", alpha=0.3)
    panel.legend(fontsize=8)


def _by_name(panel: Any, rows: Sequence[ComparedRow], linear: float) -> None:
    panel.errorbar(
        [row.minus_plain.mean for row in rows if row.minus_plain],
        range(len(rows)),
        xerr=[_half(row.minus_plain) for row in rows if row.minus_plain],
        fmt="o",
        capsize=3,
        label=_OWN,
    )
    panel.axvline(0, color="gray", linestyle="--")
    panel.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    panel.invert_yaxis()
    panel.set_xscale("symlog", linthresh=linear, linscale=2)
    panel.set(xlabel="deployed loss - plain")
    panel.grid(axis="x", alpha=0.3)


def _line(panel: Any, row: ComparedRow, labels: Sequence[str], number: int) -> None:
    known = [(place, row.casts[label]) for place, label in enumerate(labels) if label in row.casts]
    is_plain = row.method == PLAIN and number == 0
    panel.errorbar(
        [place for place, _ in known],
        [value.mean for _, value in known],
        [_half(value) for _, value in known],
        color="black" if is_plain else f"C{(number - 1) % 10}",
        linestyle="-" if is_plain else ("--", "-.", ":")[(number - 1) // 10 % 3],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4,
        linewidth=1,
        elinewidth=0.6,
        capsize=2,
        label=row.name,
    )


def _is_usual(row: ComparedRow) -> bool:
    return row.method in METHODS and bool(row.grid)


def _method(row: ComparedRow) -> str:
    return METHODS.get(row.method, _OWN)


def _half(value: Any) -> float:
    return 0.0 if math.isnan(value.half) else float(value.half)


def _linear(values: Iterable[float]) -> float:
    """Below this the axis is linear: half of the differences are larger."""
    sizes = sorted(abs(value) for value in values)
    return max(sizes[len(sizes) // 2], 1e-4)
