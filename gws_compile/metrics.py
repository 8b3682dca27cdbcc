"""What the cast, and the noise, do to the weights: `Metrics`, computed on demand in eager torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from tabulate import tabulate

from .cast import block_scale, largest_value
from .config import Config
from .keys import key_words
from .learned import WidthRule, block_grid, width
from .primitives import TorchPrimitives, wrap_int32
from .sampled import Found
from .sampling import Blocks, block_maximum, matrix_shape, sample_eager
from .torch_internals import whole_tensor

_CHUNK = 2**22
"""Elements that are looked at together: bounds the memory taken, about 100 bytes each."""


@dataclass(frozen=True)
class WeightMetrics:
    """What the cast does to one weight ``w``; ``c = cast(w)`` without noise, ``w_hat`` with that of the current draw.

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
            ``flushed``, ``exact`` and ``bits`` over all elements. Empty where there are no weights.
        """
        values: dict[str, float | None] = {}
        for field in ("sqnr", "sqnr_noise"):
            ratios = [getattr(weight, field) for weight in self._weights.values()]
            finite = [ratio for ratio in ratios if ratio is not None and math.isfinite(ratio)]
            if finite:
                values[f"{field}_min"], values[f"{field}_mean"] = min(finite), sum(finite) / len(finite)
        for field in ("saturated", "flushed", "exact", "bits"):
            values[field] = self._mean(field)
        if per_weight:
            for weight in self._weights.values():
                for field in ("sqnr", "sqnr_noise", "saturated", "flushed", "exact", "bits"):
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
                *(f"{100 * share:.3f} %" for share in (w.saturated, w.flushed, w.exact)),
            )
            for w in self._weights.values()
        ]
        return tabulate(
            rows,
            headers=("weight", "format", "bits", "SQNR, dB", "with noise", "saturated", "flushed to 0", "exact"),
            colalign=("left", "left", *["right"] * 6),
            disable_numparse=True,
        )

    __repr__ = __str__


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Draw:
    """How weights are sampled now.

    Attributes:
        config: the settings.
        step: number of the draw.
        frozen: learned widths are fixed, and noisy samples are cast to their formats too.
    """

    config: Config
    step: int
    frozen: bool = False


@dataclass(frozen=True)
class Part:
    """Some rows of a weight.

    Attributes:
        w: (matrices, rows, columns), in the dtype in which the weight is sampled.
        cast: without noise, shape and dtype of ``w``.
        noisy: with the noise of the draw; None for a weight that gets none.
        largest: float64, of each element's block: the grid's largest value; NaN in a broken block.
    """

    w: torch.Tensor
    cast: torch.Tensor
    noisy: torch.Tensor | None
    largest: torch.Tensor


def parts(found: Found, parameter: torch.Tensor | None, draw: Draw, *, chunk: int | None = None) -> Iterator[Part]:
    """Sample a weight part by part, as the compiled graphs do, bit for bit.

    Args:
        found: the weight. A DTensor is gathered, which every rank has to take part in.
        parameter: that of its learned widths, see `gws_compile.learned.parameter_shape`; None for a fixed width.
        draw: how.
        chunk: elements that come together, about.
    """
    chunk = chunk or _CHUNK
    config = draw.config
    value = whole_tensor(found.value).to(found.dtype)
    count, rows, cols = whole = matrix_shape(value.shape, found.batch_dims)
    w = value.reshape(whole)
    rule = None if config.learned is None else WidthRule.of(config.learned)
    side = config.block[0]
    if parameter is not None and parameter.ndim:
        parameter = parameter.detach().view(count, -(-rows // side), -1)
    key = torch.tensor(key_words(config.seed, found.name), dtype=torch.int32, device=w.device)
    clock = torch.tensor([wrap_int32(draw.step), -1, -int(draw.frozen)], dtype=torch.int32, device=w.device)
    height = max(chunk // cols // side, 1) * side
    depth = max(chunk // (rows * cols), 1)
    for first in range(0, count, depth):
        for start in range(0, rows, height):
            part = w[first : first + depth, start : start + height]
            widths = parameter
            if widths is not None and widths.ndim:
                widths = widths[first : first + depth, start // side : -(-(start + height) // side)]
            sample = partial(
                sample_eager,
                part,
                batch_dims=1,
                fmt=config.fmt,
                bits=config.bits,
                block=config.block,
                scale=config.scale,
                learned=widths,
                rule=rule if widths is not None else None,
            )
            cast = sample(key=None, clock=None, noise="none")
            noisy = None
            if found.draws:
                noisy = sample(key=key, clock=clock, noise=config.noise, whole=whole, offset=(first, start, 0))
            yield Part(part, cast, noisy, _largest(part, widths, rule, config))


def _largest(w: torch.Tensor, widths: torch.Tensor | None, rule: WidthRule | None, config: Config) -> torch.Tensor:
    p = TorchPrimitives()
    blocks = Blocks(w, 1, config.block)
    amax = block_maximum(blocks.matrices(w), config.block)
    if widths is None or rule is None:
        _, x = block_scale(p, amax, config.fmt, config.scale, w.dtype)
        return blocks.expand(x.double() * largest_value(config.fmt, config.scale, w.dtype))
    b = width(p, widths.expand(amax.shape), rule)
    grid = block_grid(p, b, amax, None, config.fmt, rule, config.scale, w.dtype)
    largest = torch.as_tensor(grid.largest, dtype=torch.int32, device=w.device)
    return blocks.expand(p.bits_float(grid.x).double() * p.bits_float(largest).double().expand(amax.shape))


def measure(found: Found, parameter: torch.Tensor | None, bits: float, draw: Draw) -> WeightMetrics:
    """The metrics of one weight.

    Args:
        found: the weight.
        parameter: that of its learned widths; None for a fixed width.
        bits: its bit width, the average of learned ones.
        draw: how it is sampled.
    """
    sums = torch.stack([_sums(part) for part in parts(found, parameter, draw)]).sum(0).tolist()
    signal, error, noise, saturated, flushed, exact = sums
    shape = tuple(found.value.shape)
    elements = prod(shape)
    config = draw.config
    return WeightMetrics(
        name=found.name,
        shape=shape,
        dtype=str(found.dtype).removeprefix("torch."),
        fmt=config.fmt.name if parameter is None else "by width",
        bits=bits if found.draws else None,
        sqnr=_decibels(signal, error),
        sqnr_noise=_decibels(signal, noise) if found.draws else None,
        saturated=saturated / elements,
        flushed=flushed / elements,
        exact=exact / elements,
    )


def _sums(part: Part) -> torch.Tensor:
    w, c = part.w.double(), part.cast.double()
    noisy = c if part.noisy is None else part.noisy.double()
    return torch.stack(
        [
            w.square().sum(),
            (w - c).square().sum(),
            (w - noisy).square().sum(),
            (w.abs() > part.largest).sum().double(),
            ((w != 0) & (c == 0)).sum().double(),
            (w == c).sum().double(),
        ]
    )


def _decibels(signal: float, noise: float) -> float:
    if math.isnan(signal) or math.isnan(noise) or math.isinf(signal):
        return math.nan
    return 10 * math.log10(signal / noise) if noise else math.inf
