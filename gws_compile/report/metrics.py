"""What the cast, and the noise, do to the weights, as numbers, tables and JSON: `Metrics`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from tabulate import tabulate


@dataclass(frozen=True)
class WeightMetrics:
    """What the cast does to one weight ``w``; ``c = cast(w)`` without noise, ``w_hat`` with that of the current draw.

    Of a sparse weight ``w`` is what is kept, with zeros in all other places.

    The sums and shares are over all elements, in float64, with ``w`` as the graphs read it. A weight with a NaN or an
    Inf has NaN for its ratios; the elements of its broken blocks count in no share.

    Attributes:
        name: the weight's unique name, as in `Backend.state_dict`.
        shape: of the whole weight.
        dtype: the one in which it is sampled, such as ``"float32"``.
        fmt: the format it is cast to without noise; ``"by width"`` where that follows from learned widths.
        bits: bit width b of the noise, with learned widths their average over the elements; None without noise.
        sqnr: signal to quantization noise of the cast alone, in dB: ``10 log10(sum w**2 / sum (w - c)**2)``. Inf for a
            weight that lies on the grid as it is.
        sqnr_noise: the same with the noise: ``10 log10(sum w**2 / sum (w - w_hat)**2)``; None for a weight without.
        saturated: share of elements with ``|w|`` above the largest value of their block's grid.
        flushed: share of elements with ``w != 0`` and ``c == 0``.
        exact: share of elements with ``c == w``.
        zeros: share of elements with ``c == 0``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    fmt: str
    bits: float | None
    sqnr: float
    sqnr_noise: float | None
    saturated: float
    flushed: float
    exact: float
    zeros: float


class Metrics(Mapping[str, WeightMetrics]):
    """The metrics of the sampled weights, by name; ``print(metrics)`` shows a table.

    Attributes:
        step: number of the draw whose noise `WeightMetrics.sqnr_noise` was computed with.
    """

    def __init__(self, weights: Iterable[WeightMetrics], step: int) -> None:
        self._weights = {weight.name: weight for weight in weights}
        self.step = step

    def __getitem__(self, name: str) -> WeightMetrics:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def scalars(self, prefix: str = "gws/", *, per_weight: bool = False) -> dict[str, float]:
        """Numbers for a logger, without those that are no finite numbers.

        Args:
            prefix: in front of every name.
            per_weight: also those of each weight, as ``<prefix><weight>/sqnr`` and so on.

        Returns:
            ``sqnr_min`` and ``sqnr_mean`` over the weights, in dB (and the same of ``sqnr_noise``); ``saturated``,
            ``flushed``, ``exact``, ``zeros`` and ``bits`` over all elements. Empty where there are no weights.
        """
        values: dict[str, float | None] = {}
        for field in ("sqnr", "sqnr_noise"):
            ratios = [getattr(weight, field) for weight in self._weights.values()]
            finite = [ratio for ratio in ratios if ratio is not None and math.isfinite(ratio)]
            if finite:
                values[f"{field}_min"], values[f"{field}_mean"] = min(finite), sum(finite) / len(finite)
        for field in ("saturated", "flushed", "exact", "zeros", "bits"):
            values[field] = self._mean(field)
        if per_weight:
            for weight in self._weights.values():
                for field in ("sqnr", "sqnr_noise", "saturated", "flushed", "exact", "zeros", "bits"):
                    values[f"{weight.name}/{field}"] = getattr(weight, field)
        return {prefix + name: v for name, v in values.items() if v is not None and math.isfinite(v)}

    def _mean(self, field: str) -> float | None:
        known = [(getattr(w, field), prod(w.shape)) for w in self._weights.values() if getattr(w, field) is not None]
        total = sum(n for _, n in known)
        return sum(value * n for value, n in known) / total if total else None

    def to_json(self) -> str:
        """``{"step": ..., "weights": [...]}``, keyed as `WeightMetrics`; a ratio that is Inf or NaN is null."""
        weights = [{key: _finite(value) for key, value in asdict(w).items()} for w in self._weights.values()]
        return json.dumps({"step": self.step, "weights": weights}, indent=2)

    def __str__(self) -> str:
        if not self._weights:
            return "gws_compile: no sampled weights (nothing has been compiled, or the model is gone)"
        rows = [
            (
                w.name,
                w.fmt,
                "" if w.bits is None else f"{w.bits:.3g}",
                f"{w.sqnr:.2f}",
                "" if w.sqnr_noise is None else f"{w.sqnr_noise:.2f}",
                *(f"{100 * share:.3f} %" for share in (w.saturated, w.flushed, w.exact, w.zeros)),
            )
            for w in self._weights.values()
        ]
        return tabulate(
            rows,
            headers=(
                "weight",
                "format",
                "bits",
                "SQNR, dB",
                "with noise",
                "saturated",
                "flushed to 0",
                "exact",
                "zeros",
            ),
            colalign=("left", "left", *["right"] * 7),
            disable_numparse=True,
        )

    __repr__ = __str__


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
