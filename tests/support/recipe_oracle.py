"""Recipes a second time: an unmodified model, run eagerly, its products replaced one by one by autograd functions.

What an operand is rounded to is computed from definitions, in numpy: scales in float32, in the order in which their
sources have them, everything after that exactly, in float64.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import gws_compile
from gws_compile.numerics.integers import IntFormat
from gws_compile.numerics.keys import key_words
from gws_compile.settings.operands import Operand
from support.oracle import random_words

_LARGEST = np.float32(2.0**115)


def hadamard_matrix(size: int) -> torch.Tensor:
    """S H / sqrt(n), float64: rows are multiplied by it from the left side, ``x @ hadamard_matrix(n)``."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    signs = torch.tensor([1.0 if sign == "+" else -1.0 for sign in "+++-+------+-+--" * (size // 16)])
    return signs.double()[:, None] * h / math.sqrt(size)


def transformed(x: torch.Tensor, size: int) -> torch.Tensor:
    """The rows of a matrix, transformed in groups."""
    groups = x.double().reshape(x.shape[0], -1, size) @ hadamard_matrix(size)
    return groups.reshape(x.shape).to(x.dtype)


def scales_of(x: np.ndarray, operand: Operand) -> tuple[np.ndarray, np.ndarray]:
    """What each element of a float32 matrix is multiplied by before the cast, and behind it; float32."""
    fmt, (across, along), rule = operand.element, operand.sides, operand.rule
    if rule == "":
        return np.ones_like(x), np.ones_like(x)
    if rule == "unit":
        return np.full_like(x, fmt.max), np.full_like(x, np.float32(1 / fmt.max))
    across, along = across or x.shape[0], along or x.shape[1]
    amax = np.maximum.reduceat(np.abs(x), np.arange(0, x.shape[0], across), axis=0)
    amax = np.maximum.reduceat(amax, np.arange(0, x.shape[1], along), axis=1)
    if rule in ("floor", "ceil"):
        emax = math.floor(math.log2(fmt.max))
        exponent = np.frexp(np.maximum(amax, np.float32(2.0**-100)))[1] - 1 - emax
        if rule == "ceil":
            exponent = exponent + (amax > fmt.max * 2.0**exponent)
        scale = (2.0**exponent).astype(np.float32)
        inverse = np.float32(1) / scale
    elif rule == "amax":
        scale = np.maximum(amax, np.float32(2.0**-100)) / np.float32(fmt.max)
        inverse = np.float32(1) / scale
    else:
        assert rule == "nvfp4"
        matrix = np.abs(x).max()
        encode = min(np.float32(2688) / matrix, _LARGEST) if matrix > 0 else np.float32(1)
        stored = np.minimum(amax * (encode * np.float32(1 / 6)), np.float32(448))
        stored = torch.from_numpy(stored).to(torch.float8_e4m3fn).float().numpy()
        divisor = np.where(stored == 0, np.float32(1), stored)
        inverse = np.float32(1) / (divisor * (np.float32(1) / encode))
        scale = np.where(stored == 0, np.float32(0), divisor / encode)
    every = [s.repeat(across, 0)[: x.shape[0]].repeat(along, 1)[:, : x.shape[1]] for s in (inverse, scale)]
    return every[0], every[1]


def rounded(
    x: torch.Tensor, operand: Operand, words: np.ndarray | None = None, *, levels: bool = False
) -> torch.Tensor:
    """The rows of a matrix, rounded; stochastically with the elements' random words. Or the levels before X."""
    values = x.detach().float().numpy()
    inverse, scale = scales_of(values, operand)
    fmt = operand.element
    q = np.minimum(np.abs(values * inverse).astype(np.float64), fmt.max)
    spacing = 1.0 if isinstance(fmt, IntFormat) else 2.0**fmt.emin
    exponent = np.maximum(np.frexp(q)[1] - 1, math.floor(math.log2(spacing)) if q.size else 0)
    exponent = exponent if not isinstance(fmt, IntFormat) else np.full_like(exponent, fmt.emin)
    unit = 2.0 ** (exponent - fmt.mantissa_bits)
    if words is None:
        level = np.minimum(np.rint(q / unit) * unit, fmt.max)
    else:
        drop = 23 - fmt.mantissa_bits
        finest = 2.0 ** (fmt.emin - 23)
        q = np.where(q < fmt.min_normal, np.rint(q / finest) * finest, q)
        # The binade of what a float32 rounds up to is not entered by these values; units are those from before.
        chance = (words.reshape(q.shape) & np.uint32((1 << drop) - 1)).astype(np.float64) / 2.0**drop
        of_floats = 2.0 ** (np.maximum(np.frexp(q)[1] - 1, fmt.emin) - fmt.mantissa_bits)
        level = np.floor(q / of_floats + chance) * of_floats
    level = np.copysign(level, values)
    result = level if levels else (level * scale).astype(np.float32)
    return torch.from_numpy(result.astype(np.float32)).to(x.dtype)


class RecipeOracle(TorchFunctionMode):
    """Runs the products of some parameters as a recipe says.

    Args:
        config: of a backend.
        names: the parameters, with their names.
        step: number of the draw.
    """

    def __init__(self, config, names: dict[nn.Parameter, str], step: int = 0) -> None:
        super().__init__()
        self.config, self.names, self.step = config, names, step
        self.calls: Counter = Counter()

    @classmethod
    def of(cls, backend, model: nn.Module, step: int = 0) -> RecipeOracle:
        """For the weights that a backend has rewritten."""
        names = {model.get_parameter(r.name): r.name for r in backend.report().rewritten}
        return cls(backend.config, names, step)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "linear" and args[1] in self.names:
            weight, bias = args[1], args[2] if len(args) > 2 else kwargs.get("bias")
            y = self.product(args[0].reshape(-1, args[0].shape[-1]), weight, weight, over_rows=False)
            y = y.reshape(*args[0].shape[:-1], -1)
            return y if bias is None else y + bias
        if name == "addmm" and args[2] in self.names:  # GPT-2's layers, (in, out)
            return args[0] + self.product(args[1], args[2], args[2].t(), over_rows=True)
        if name in ("conv2d", "conv1d") and args[1] in self.names:
            return self.convolution(function, args, kwargs)
        return function(*args, **kwargs)

    def product(self, x, weight, as_outputs, *, over_rows):
        """``x w^T``, w (outputs, inputs)."""
        return _Product.apply(x, as_outputs, self, self.names[weight], over_rows)

    def convolution(self, function, args, kwargs):
        x, weight, bias, *rest = args
        y = _Convolution.apply(x, weight, self, self.names[weight], function, rest)
        return y if bias is None else y + bias.reshape(-1, *[1] * (y.ndim - 2))

    def words(self, name: str, kind: str, number: int, shape: tuple[int, ...]) -> np.ndarray:
        """The random words of an operand, by its row-major index."""
        key = key_words(self.config.seed, name)
        place = key_words(0, f"place {2 * number + (kind == 'wgrad')}")
        mixed = tuple((k ^ p) & 0xFFFFFFFF for k, p in zip(key, place, strict=True))
        return random_words(np.arange(math.prod(shape)), mixed, self.step)

    def weight(self, name: str, w: torch.Tensor, *, over_rows: bool) -> torch.Tensor:
        """A weight, (outputs, inputs), as the product takes it that sums over its inputs, or over its outputs."""
        settings = self.config.settings_of(name)
        across, along = settings.block
        block = (along, across) if over_rows and across != along else (across, along)
        return gws_compile.quantize(w.detach().contiguous(), settings.fmt, block, settings.scale)

    def gradient(self, g, name, kind, number, size=None):
        """An incoming gradient, (rows, what is summed over); ``kind`` says how it lies in the graph."""
        operand = self.config.gradients
        if operand is None or not operand.rounds_in(kind):
            return transformed(g, size) if size else g
        g = transformed(g, size) if size else g
        if operand.rounding == "nearest":
            return rounded(g, operand)
        words = self.words(name, kind, number, tuple(g.shape))
        if kind == "wgrad":  # rounded as (tokens, outputs)
            words = words.reshape(g.shape[1], g.shape[0]).T
        return rounded(g, operand, words)

    def activation(self, x, kind, size=None):
        """An activation, (rows, what is summed over)."""
        operand = self.config.activations
        x = transformed(x, size) if size else x
        return x if operand is None or not operand.rounds_in(kind) else rounded(x, operand)

    @property
    def wgrad_size(self) -> int | None:
        """Size of the transform in wgrad."""
        return None if self.config.gradients is None else self.config.gradients.hadamard


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, oracle, name, over_rows):
        ctx.save_for_backward(x, w)
        ctx.oracle, ctx.name = oracle, name
        return oracle.activation(x, "forward") @ oracle.weight(name, w, over_rows=False).t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        oracle, name = ctx.oracle, ctx.name
        oracle.calls[name] += 1
        number, size = oracle.calls[name], oracle.wgrad_size
        dgrad = wgrad = None
        if ctx.needs_input_grad[0]:
            dgrad = oracle.gradient(g, name, "dgrad", number) @ oracle.weight(name, w, over_rows=True)
        if ctx.needs_input_grad[1]:
            turned = oracle.gradient(g.t().contiguous(), name, "wgrad", number, size)
            wgrad = turned @ oracle.activation(x.t().contiguous(), "wgrad", size).t()
        return dgrad, wgrad, None, None, None


def _channels(x):
    return x.transpose(0, 1).reshape(x.shape[1], -1)


class _Convolution(torch.autograd.Function):
    """Activations and gradients are rounded along their channels, and along batch and places in wgrad."""

    @staticmethod
    def forward(ctx, x, w, oracle, name, function, rest):
        ctx.save_for_backward(x, w)
        ctx.oracle, ctx.name, ctx.function, ctx.rest = oracle, name, function, rest
        ctx.groups = rest[3] if len(rest) > 3 else 1
        ctx.depthwise = ctx.groups > 1 and w.shape[1] == 1
        rounded_x = x if ctx.depthwise else _along_channels(oracle.activation, x, "forward", ctx.groups)
        return function(rounded_x, oracle.weight(name, w.flatten(1), over_rows=False).view_as(w), None, *rest)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        oracle, name = ctx.oracle, ctx.name
        assert oracle.config.gradients is None or oracle.config.gradients.rounding == "nearest"

        def gradient(value, kind):
            return value if ctx.depthwise else oracle.gradient(value, name, kind, 0)

        def activation(value):
            return value if ctx.depthwise else oracle.activation(value, "wgrad")

        with torch.enable_grad():
            inputs = x.detach().requires_grad_()
            w_dgrad = oracle.weight(name, w.flatten(1), over_rows=not ctx.depthwise).view_as(w)
            out = ctx.function(inputs, w_dgrad, None, *ctx.rest)
            dgrad = torch.autograd.grad(out, inputs, _along_channels(gradient, g, "dgrad", ctx.groups))[0]
            weight = w.detach().requires_grad_()
            rounded_x = activation(_channels(x)).reshape(x.shape[1], x.shape[0], *x.shape[2:])
            out = ctx.function(rounded_x.transpose(0, 1), weight, None, *ctx.rest)
            turned = gradient(_channels(g), "wgrad").reshape(g.shape[1], g.shape[0], *g.shape[2:]).transpose(0, 1)
            wgrad = torch.autograd.grad(out, weight, turned)[0]
        return dgrad, wgrad, None, None, None, None


def _along_channels(function, x, kind, groups):
    """Each place's channels of a group as a row."""
    last = x.reshape(-1, x.shape[1] // groups, *x.shape[2:]).movedim(1, -1)
    return function(last.reshape(-1, last.shape[-1]), kind).reshape(last.shape).movedim(-1, 1).reshape(x.shape)
