"""Learned widths by their equation, in float64: ``w_hat = cast(w + R * a * 2**(1 - b))``, and its gradient by b."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import gws_compile
from gws_compile import LearnedBits

from .case import Settings


def learned_of(settings: Settings) -> LearnedBits | None:
    """The `LearnedBits` of the settings."""
    if settings.learned is None:
        return None
    one = settings.learned
    formats = {} if one.formats is None else {"formats": one.formats}
    return LearnedBits(init=one.init, target=one.target, granularity=one.granularity, **formats)  # type: ignore[arg-type]


def at_start(settings: Settings, w: torch.Tensor) -> torch.Tensor:
    """The width parameter of a new weight, () or (matrices, block rows, block columns) without matrices if one."""
    assert settings.learned is not None
    if settings.learned.granularity == "weight":
        return torch.ones(())
    sides = [-(-n // b) for n, b in zip(w.shape[-2:], settings.block, strict=True)]
    matrices = w.shape[0] if w.ndim == 3 else 1
    return torch.ones(sides if matrices == 1 else [matrices, *sides])


def quantized(settings: Settings, learned: LearnedBits, w: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The cast alone: each block to the cheapest format that reaches its width."""
    where: dict[str, Any] = {"block": settings.block, "scale": settings.scale}
    widths = _each_element(_unclamped(parameter, learned).clamp(learned.min, learned.max), w, settings.block)
    formats = [gws_compile.FloatFormat.parse(fmt) for fmt in learned.formats]
    result = gws_compile.quantize(w, formats[-1], **where)
    for fmt in reversed(formats[:-1]):
        reached = widths <= fmt.mantissa_bits + 2 + 2**-10
        result = torch.where(reached, gws_compile.quantize(w, fmt, **where), result)
    return result


def is_sample(
    settings: Settings,
    learned: LearnedBits,
    value: torch.Tensor,
    w: torch.Tensor,
    parameter: torch.Tensor,
    r: torch.Tensor,
) -> bool:
    """Whether a sample is the equation's, up to the power of two, of which the kernel has six digits."""
    fmt = gws_compile.FloatFormat.parse(settings.fmt or learned.widest)
    largest = _largest(w, settings.block)
    b = _each_element(_unclamped(parameter.double(), learned).clamp(learned.min, learned.max), w, settings.block)
    exact, tolerance = w.double() + r * largest * 2 ** (1 - b), 1e-5 * largest
    scale = _scale(largest, fmt, settings.scale)
    limit = _nearest_below(fmt.max, w.dtype) * scale
    least, most = (
        (gws_compile.quantize((y / scale).float(), fmt, scale=None) * scale).clamp(-limit, limit).to(w.dtype)
        for y in (exact - tolerance, exact + tolerance)
    )
    return bool(((least <= value) & (value <= most)).all())


def gradient(
    settings: Settings,
    learned: LearnedBits,
    by_sample: torch.Tensor,
    w: torch.Tensor,
    parameter: torch.Tensor,
    r: torch.Tensor,
) -> tuple[torch.Tensor, float]:
    """The gradient of a width parameter: autograd's, of ``w + R * a * 2**(1 - b)``, with the sample's gradient.

    Zero where the width has left its range and would go on.

    Returns:
        It, and the size of what was added up, of which float32 keeps seven digits.
    """
    parameter = parameter.double().requires_grad_()
    unclamped = _unclamped(parameter, learned)
    # Beyond its range: the slope of the end from which the width may come back.
    b = unclamped + (unclamped.clamp(learned.min, learned.max) - unclamped).detach()
    power = _each_element(2 ** (1 - b), w, settings.block)
    terms = by_sample.double() * r * _largest(w, settings.block)
    size, result = (
        torch.autograd.grad((each * power).sum(), parameter, retain_graph=True)[0] for each in (terms.abs(), terms)
    )
    by_width = result * (learned.init - learned.target)  # by b, up to a positive factor
    outwards = ((unclamped > learned.max) & (by_width < 0)) | ((unclamped < learned.min) & (by_width > 0))
    return torch.where(outwards, 0.0, result).detach(), size.abs().max().item()


def _unclamped(parameter: torch.Tensor, learned: LearnedBits) -> torch.Tensor:
    return learned.target + parameter * (learned.init - learned.target)


def _each_element(values: torch.Tensor, w: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    """A value of each block, at each of its elements."""
    if values.ndim == 0:
        return values.expand(w.shape)
    rows, cols = (torch.arange(n) // b for n, b in zip(w.shape[-2:], block, strict=True))
    return values[..., rows[:, None], cols].reshape(w.shape)


def _largest(w: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    """The largest magnitude of its block, at each element, float64."""
    rows = torch.stack([part.amax(dim=-2) for part in w.double().abs().split(block[0], dim=-2)], dim=-2)
    blocks = torch.stack([part.amax(dim=-1) for part in rows.split(block[1], dim=-1)], dim=-1)
    return _each_element(blocks, w, block)


def _scale(largest: torch.Tensor, fmt: gws_compile.FloatFormat, rule: str | None) -> torch.Tensor:
    """The power of two by which the elements of a block are divided, by its largest value."""
    if rule is None or fmt.exponent_bits == 8:
        return torch.ones_like(largest)
    emax = torch.frexp(torch.tensor(fmt.max)).exponent
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - emax)
    return torch.where(largest > fmt.max * scale, 2 * scale, scale) if rule == "ceil" else scale


def _nearest_below(number: float, dtype: torch.dtype) -> float:
    """The largest value of a dtype that is not beyond a positive number."""
    value = torch.tensor(number, dtype=dtype)
    return (torch.nextafter(value, -value) if value.item() > number else value).item()
