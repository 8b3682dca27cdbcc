"""The oracle of one weight: what a read of it multiplies by, in eager torch, and the gradient of its learned width.

What is sampled is said by the package's public references, `gws_compile.sample` and `gws_compile.quantize`. These know
one width for all blocks; with learned widths the value is the eager kernel's, held here to the equation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

import gws_compile
from gws_compile import LearnedBits
from gws_compile.numerics.keys import key_words
from gws_compile.numerics.spec import SampleSpec
from gws_compile.ops.eager import sample_eager

from . import widths
from .case import Settings
from .naming import Draws


class _Straight(torch.autograd.Function):
    """A value for a weight, with the weight's gradient: the identity."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


@dataclass
class Hat:
    """A noisy sample that a forward has taken.

    Attributes:
        name: the weight's.
        weight: its value.
        value: the sample; gradients are taken by it.
        step: the draw's number.
        flat: see `Reads.hat`.
        noise: whether it was drawn.
    """

    name: str
    weight: torch.Tensor
    value: torch.Tensor
    step: int
    flat: bool
    noise: bool


@dataclass
class Reads:
    """What one forward reads.

    Attributes:
        settings: of the backend.
        names: the qualified names of parameters by their ids.
        draws: the clock.
        widths: the parameters of learned widths by the weights' names; a weight without is at its start.
        unique: says by which name a weight draws.
        noise: False inside ``noise(False)``.
        reruns: the part that is read now is called by an ``autograd.Function``, from outside of what is compiled.
        hats: the samples, by the weights' ids.
        casts: what else was multiplied by.
        hidden: the weights of which a part that ``reruns`` has reads in regions without gradients. The function has
            gradients disabled as a whole, which hides the regions: the run in forward has noise there, the one in
            backward has not.
        buffers: what the forward makes of buffers, by their ids.
        began: it has come to a weight that trains, and so counts for the clock.
    """

    settings: Settings
    names: Mapping[int, str]
    draws: Draws
    widths: Mapping[str, torch.Tensor]
    unique: Callable[[str], str]
    noise: bool = True
    reruns: bool = False
    hats: dict[int, Hat] = field(default_factory=dict)
    casts: list[torch.Tensor] = field(default_factory=list)
    hidden: set[str] = field(default_factory=set)
    buffers: dict[int, torch.Tensor] = field(default_factory=dict)
    began: bool = False

    def hat(self, w: torch.Tensor, *, flat: bool = False, table: bool = False) -> torch.Tensor:
        """What a read of a weight multiplies by: its sample, while gradients are enabled and it requires some.

        Args:
            w: the weight.
            flat: three dims are blocked as (first, the rest): a 1-d convolution's.
            table: it is looked up as well, so that only a pattern of ``include`` has it sampled.
        """
        name = self.names[id(w)]
        if not self._selected(name, table=table):
            return w
        if not (torch.is_grad_enabled() and w.requires_grad):
            if self.reruns and w.requires_grad and self.settings.noise != "none":
                self.hidden.add(name)
                self.unique(name)
            return self._cast(name, w, flat)
        if id(w) not in self.hats:
            self.hats[id(w)] = self._sample(name, w, flat)
        return self.hats[id(w)].value

    def cast(self, w: torch.Tensor, *, flat: bool = False) -> torch.Tensor:
        """What a read of the detached weight multiplies by."""
        name = self.names[id(w)]
        return self._cast(name, w, flat) if self._selected(name) else w.detach()

    def buffer(self, buffer: torch.Tensor) -> torch.Tensor:
        """A buffer, as the forward may change it."""
        return self.buffers.setdefault(id(buffer), buffer.detach().clone())

    def _selected(self, name: str, *, table: bool = False) -> bool:
        settings = self.settings
        exclude = gws_compile.DEFAULT_EXCLUDE if settings.exclude is None else settings.exclude
        if any(fnmatchcase(name, pattern) for pattern in exclude):
            return False
        if settings.include is None:
            return not table
        return any(fnmatchcase(name, pattern) for pattern in settings.include)

    def _sample(self, name: str, w: torch.Tensor, flat: bool) -> Hat:
        settings = self.settings
        if settings.noise != "none" and not self.began:
            self.draws.forward()
            self.began = True
        noise = self.noise and settings.noise != "none"
        value = _matrix(w.detach(), flat)
        if settings.noise != "none":  # with the noise switched off, it is the clock that says so
            self.unique(name)
        if not noise:
            value = self._quantized(name, w, flat)
        elif settings.learned is None:
            value = gws_compile.sample(
                value,
                settings.fmt or "fp8_e4m3",
                name=self.unique(name),
                step=self.draws.step,
                seed=settings.seed,
                noise=settings.noise,  # type: ignore[arg-type]
                bits=settings.bits,
                block=settings.block,
                scale=settings.scale,  # type: ignore[arg-type]
            )
        else:
            value = self._sample_at_learned_width(name, value, widths.learned_of(settings))
        hat = _Straight.apply(w, value.view(w.shape))  # type: ignore[no-untyped-call]
        return Hat(name, w.detach().clone(), hat, self.draws.step, flat, noise)

    def _sample_at_learned_width(self, name: str, w: torch.Tensor, learned: LearnedBits) -> torch.Tensor:
        settings, parameter = self.settings, self.parameter(name, w)
        fmt = gws_compile.FloatFormat.parse(settings.fmt or learned.widest)
        spec = SampleSpec(fmt, settings.noise, fmt.noise_bits, settings.scale, learned.rule, w.dtype)  # type: ignore[arg-type]
        key = torch.tensor(key_words(settings.seed, self.unique(name)), dtype=torch.int32)
        clock = torch.tensor([self.draws.step, -1, 0, 0, 0], dtype=torch.int32)
        value = sample_eager(w, spec, int(w.ndim == 3), settings.block, key, clock, parameter)
        if not widths.is_sample(settings, learned, value, w, parameter, self._r(name, w.shape, self.draws.step)):
            raise AssertionError(f"the eager kernel's sample of {name} is not what the equation says")
        return value

    def _r(self, name: str, shape: Sequence[int], step: int) -> torch.Tensor:
        """R of every element, float64: a weight of ones, in a format that holds every float32, moves by R / 2."""
        moved = gws_compile.sample(
            torch.ones(shape),
            "e8m23",
            name=self.unique(name),
            step=step,
            seed=self.settings.seed,
            noise=self.settings.noise,  # type: ignore[arg-type]
            bits=2.0,
            block=self.settings.block,
            scale=None,
        )
        return (moved.double() - 1) * 2

    def parameter(self, name: str, w: torch.Tensor) -> torch.Tensor:
        """The width parameter of a weight."""
        known = self.widths.get(name)
        return widths.at_start(self.settings, w) if known is None else known

    def _cast(self, name: str, w: torch.Tensor, flat: bool) -> torch.Tensor:
        self.casts.append(self._quantized(name, w, flat))
        return self.casts[-1]

    def _quantized(self, name: str, w: torch.Tensor, flat: bool) -> torch.Tensor:
        settings, value, learned = self.settings, _matrix(w.detach(), flat), widths.learned_of(self.settings)
        if learned is not None and w.requires_grad:
            return widths.quantized(settings, learned, value, self.parameter(name, value)).view(w.shape)
        fmt = settings.fmt or ("fp8_e4m3" if learned is None else learned.widest)
        return gws_compile.quantize(value, fmt, block=settings.block, scale=settings.scale).view(w.shape)  # type: ignore[arg-type]

    def width_gradient(self, hat: Hat, gradient: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The gradient of a weight's width parameter: see `fuzz.widths.gradient`."""
        learned, w = widths.learned_of(self.settings), _matrix(hat.weight, hat.flat)
        assert learned is not None
        parameter = self.parameter(hat.name, w)
        if not hat.noise:
            return torch.zeros_like(parameter), 0.0
        r = self._r(hat.name, w.shape, hat.step)
        return widths.gradient(self.settings, learned, _matrix(gradient, hat.flat), w, parameter, r)


def _matrix(w: torch.Tensor, flat: bool) -> torch.Tensor:
    return w.flatten(1) if flat or w.ndim > 3 else w
