"""Loss curves as a picture: every model's losses above, the differences from the first one below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

mpl.use("Agg")
import matplotlib.pyplot as plt

COLORS = ("#222222", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf")


@dataclass(frozen=True)
class Curve:
    """One model's losses.

    Attributes:
        name: for the legend.
        train: the loss of each step.
        held_out: (step, loss) pairs.
    """

    name: str
    train: Sequence[float]
    held_out: Sequence[tuple[int, float]]


def plot_losses(path: Path, curves: Sequence[Curve], *, title: str, subtitle: str) -> None:
    """Draw the curves into a PNG; the first one is what the others are compared with."""
    figure, (losses, differences) = plt.subplots(
        2, 1, figsize=(9, 7), sharex=True, height_ratios=(3, 1.6), layout="constrained"
    )
    width = max(1, len(curves[0].train) // 30)
    plain = curves[0]
    for i, curve in enumerate(curves):
        color, order = COLORS[i % len(COLORS)], 10 - i
        steps, points = np.arange(1, len(curve.train) + 1), np.array(curve.held_out)
        losses.plot(steps, curve.train, color=color, alpha=0.18, linewidth=0.8)
        losses.plot(steps, _smooth(curve.train, width), color=color, linewidth=1.8, label=curve.name, zorder=order)
        losses.plot(*points.T, "o", color=color, markersize=5, markeredgecolor="white", zorder=order + 10)
        if i:
            ratio = np.array(curve.train) / np.array(plain.train) - 1
            differences.plot(steps, _smooth(ratio, width), color=color, linewidth=1.5)
            held_out = points[:, 1] / np.array(plain.held_out)[:, 1] - 1
            differences.plot(points[:, 0], held_out, "o", color=color, markersize=5, markeredgecolor="white")

    losses.plot([], [], "o", color="#888888", label="held out (cast, without noise)")
    losses.plot([], [], color="#888888", alpha=0.4, linewidth=0.8, label="each step")
    losses.set_ylabel("loss (nats per byte)")
    # The first steps fall from ln 256 in no time; leave the height to what comes after them.
    settled = np.concatenate([np.array(c.train)[len(c.train) // 20 :] for c in curves])
    low, high = settled.min(), settled.max()
    losses.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    losses.legend(frameon=False)
    losses.set_title(subtitle, fontsize=9, color="#555555", loc="left")
    losses.annotate(title, (0, 1), (0, 36), "axes fraction", textcoords="offset points", fontsize=13)

    differences.axhline(0, color=COLORS[0], linewidth=1)
    differences.set_ylabel(f"difference\nfrom {plain.name}")
    differences.set_xlabel("optimizer step")
    differences.xaxis.set_major_locator(MaxNLocator(integer=True))
    differences.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (losses, differences):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    losses.set_xlim(0, len(plain.train) * 1.01)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _smooth(values: Sequence[float] | np.ndarray, width: int) -> np.ndarray:
    """A moving average over ``width`` steps to both sides, over as many as there are at the ends."""
    total, index = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    left = np.minimum(width, index)
    # Never more to the right than to the left: the steep beginning would look flatter than it is.
    right = np.minimum(left, len(values) - 1 - index)
    return (total[index + right + 1] - total[index - left]) / (left + right + 1)
