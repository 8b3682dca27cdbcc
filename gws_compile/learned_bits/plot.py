"""The picture of learned bit widths: a heat map of each weight, and a histogram over training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ..figures import new_figure
from .history import WidthHistory

_MOST_COLUMNS = 6


def plot_bits(
    path: str | Path, widths: dict[str, torch.Tensor], history: WidthHistory, limits: tuple[float, float]
) -> None:
    """Make a picture of the widths.

    Args:
        path: where the picture goes; its ending says the format (``.png``, ``.pdf``, ``.svg``).
        widths: by the weights' names; (block rows, block columns), with matrices in front, or ().
        history: how they moved.
        limits: smallest and largest width.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there are no widths.
    """
    if not widths:
        raise ValueError("there are no learned bit widths to draw yet: call this after the first forward")
    per_weight = all(value.ndim == 0 for value in widths.values())
    columns = 1 if per_weight else min(_MOST_COLUMNS, len(widths))
    rows = 1 if per_weight else math.ceil(len(widths) / columns)
    height = 0.28 * len(widths) + 1 if per_weight else 2.1 * rows
    figure = new_figure(max(2.4 * columns, 8), height + 3, what="plot_bits", extra="examples")
    parts: Any = figure.subfigures(2, 1, height_ratios=(height, 3))
    above, below = parts
    if per_weight:
        _bars(above.subplots(), widths, limits)
    else:
        _maps(above, widths, limits, rows, columns)
    _histogram(below.subplots(), history, widths, limits)
    figure.savefig(path, dpi=150)


def _maps(figure: Any, widths: dict[str, torch.Tensor], limits: tuple[float, float], rows: int, columns: int) -> None:
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (name, value) in zip(axes, widths.items(), strict=False):
        matrix = value.cpu().reshape(-1, value.shape[-1] if value.ndim else 1)
        image = axis.imshow(matrix.numpy(), vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
        axis.set_title(_short(name), fontsize=7)
        axis.set_xticks(range(0, matrix.shape[1], max(1, matrix.shape[1] // 4)))
        axis.set_yticks(range(0, matrix.shape[0], max(1, matrix.shape[0] // 4)))
        axis.tick_params(labelsize=6)
    for axis in axes[len(widths) :]:
        axis.axis("off")
    figure.colorbar(image, ax=list(axes), label="bit width", shrink=0.9)
    figure.suptitle("bit width of each block (block rows x block columns)", fontsize=9)


def _bars(axis: Any, widths: dict[str, torch.Tensor], limits: tuple[float, float]) -> None:
    names = list(widths)
    axis.barh(range(len(names)), [float(widths[name]) for name in names])
    axis.set_yticks(range(len(names)), [_short(name, 60) for name in names], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlim=(0, limits[1]), xlabel="bit width of each weight")


def _histogram(axis: Any, history: WidthHistory, widths: dict[str, torch.Tensor], limits: tuple[float, float]) -> None:
    shares = history.histograms()
    if len(shares) < 2:
        flat = torch.cat([value.reshape(-1).cpu() for value in widths.values()])
        axis.hist(flat.numpy(), bins=48, range=limits)
        axis.set(xlabel="bit width", ylabel="blocks", title="no training steps recorded yet")
        return
    edges = torch.linspace(*limits, shares.shape[1] + 1)
    ends = [history.steps[0] - 1, *history.steps]
    mesh = axis.pcolormesh(ends, edges.numpy(), 100 * shares.T.numpy(), cmap="magma_r", shading="flat")
    axis.figure.colorbar(mesh, ax=axis, label="% of the elements")
    axis.set(xlabel="optimizer step", ylabel="bit width")
    axis.set_title("bit widths over training", fontsize=9)


def _short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else "..." + name[-most + 3 :]
