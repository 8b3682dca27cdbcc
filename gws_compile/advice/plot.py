"""Pictures of the law: the loss over tokens, and over bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..figures import new_figure
from ..numerics.formats import FloatFormat
from .law import Budget, ScalingLaw
from .quantities import Block, quantity


def plot_tokens(
    path: str | Path, law: ScalingLaw, params: float, tokens: float | None, formats: Sequence[FloatFormat], block: Block
) -> None:
    """The loss over tokens for each format, with D_crit as a dot where it lies in the picture.

    Args:
        path: where the picture goes.
        law: the law.
        params: N.
        tokens: D, drawn as a line; None for none.
        formats: a curve each.
        block: elements to a scale.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure, axis = _figure()
    points = {fmt: law.critical_tokens(params, fmt.exponent_bits, fmt.mantissa_bits, block) for fmt in formats}
    low, high = law.scope.tokens
    ends = sorted(points.values())
    # From the fit's fewest tokens past the smallest D_crit, or what is asked: bf16's lies orders of magnitude off.
    last = max(10 * high, 30 * (tokens or high), *(3 * end for end in ends if end < 1e3 * max(tokens or high, ends[0])))
    across = np.geomspace(min(low, tokens or low), last, 400)
    axis.axvspan(low, high, color="0.92", label="tokens of the fit")
    plain = [law.loss(params, float(count)) for count in across]
    axis.plot(across, plain, color="black", linestyle=":", zorder=3, label="no quantization")
    for number, fmt in enumerate(sorted(formats, key=lambda fmt: points[fmt])):
        split = fmt.exponent_bits, fmt.mantissa_bits
        color = f"C{number % 10}"
        axis.plot(
            across,
            [law.loss(params, float(count), *split, block=block) for count in across],
            color=color,
            label=fmt.name,
        )
        if points[fmt] <= last:
            axis.plot([points[fmt]], [law.loss(params, points[fmt], *split, block=block)], "o", color=color)
    if tokens is not None:
        axis.axvline(tokens, color="0.5", linewidth=0.8, linestyle="--")
    top = max(plain[0], law.loss(params, tokens or high)) + 0.5 * (plain[0] - plain[-1])
    axis.set(xscale="log", xlabel="tokens", ylabel="loss (nats a token)", xlim=(across[0], last))
    axis.set_ylim(plain[-1] - 0.05 * (top - plain[-1]), top)
    axis.set_title(f"{quantity(params)} parameters, {_scaled(block)}; a dot is D_crit", fontsize=10)
    axis.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)


def plot_bits(path: str | Path, law: ScalingLaw, best: Budget, formats: Sequence[FloatFormat], block: Block) -> None:
    """The least loss that a compute budget buys with P bits, with a dot for each format and the best marked.

    Args:
        path: where the picture goes.
        law: the law.
        best: the best of the budget.
        formats: a dot each.
        block: elements to a scale.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure, axis = _figure()
    most = max([16, *(fmt.storage_bits for fmt in formats)])
    across = np.linspace(3, most, 131)
    losses = [law.real_budget(best.compute, float(bits), block).loss for bits in across]
    axis.plot(across, losses, color="black", label="best real split")
    for number, fmt in enumerate(formats):
        loss = law.format_budget(best.compute, fmt, block).loss
        axis.plot([fmt.storage_bits], [loss], "o", color=f"C{number % 10}", label=fmt.name)
    axis.axvline(best.bits, color="0.5", linewidth=0.8, linestyle="--", label=f"best: {best.bits:.2f} bits")
    axis.set(xlabel="bits P", ylabel="loss (nats a token)", xlim=(2.5, most + 0.5))
    axis.set_title(f"the best of {quantity(best.compute)} operations, {_scaled(block)}", fontsize=10)
    axis.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)


def _figure() -> tuple[Any, Any]:
    figure = new_figure(7, 4.4, what="a picture of advice", extra="advice")
    return figure, figure.subplots()


def _scaled(block: Block) -> str:
    return "a scale a channel" if block == "channel" else f"a scale for {block} elements"
