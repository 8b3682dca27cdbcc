"""The operator ``gws::sample_weight``: noise, then cast, of one weight.

One node per weight in every graph; the eager kernel here and the Inductor lowering in `gws_compile.lowering` run the
same arithmetic (`noise`, `cast`). Its gradient is the identity: block maximum, noise and cast
are constants to autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .cast import block_scale, cast, needs_block_maximum
from .config import check_block
from .formats import FloatFormat
from .learned import WidthRule, block_grid, cast_to_grid, width, width_gradient
from .learned import amplitude as width_amplitude
from .noise import add_noise, fixed_amplitude, random_word, signed_draw
from .primitives import TorchPrimitives

OPERATOR_VERSION = 7
"""Part of every call's arguments. Compile caches see a graph's arguments, not the lowering's source: raise it whenever
noise, cast or lowering change what they compute."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Weight dtypes the operator takes."""

MAX_ELEMENTS = 2**32
"""A weight's element index is one 32-bit word: a larger weight would repeat its noise."""


def matrix_shape(shape: Sequence[int], batch_dims: int) -> tuple[int, int, int]:
    """How a weight of this shape is blocked: (matrices, rows, columns).

    Args:
        shape: two or more dims.
        batch_dims: leading dims that count matrices: 1 for expert weights (E, a, b), 0 for a matrix and for a
            convolution weight (out, in, kh, kw), which is blocked as (out, in * kh * kw).
    """
    return math.prod(shape[:batch_dims]), shape[batch_dims], math.prod(shape[batch_dims + 1 :])


def block_maximum(w: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Largest magnitude of each block.

    Args:
        w: float32, (matrices, rows, columns).
        block: block shape; sizes that are no multiple of it end in partial blocks.

    Returns:
        float32, (matrices, ceil(rows / block[0]), ceil(columns / block[1])); NaN where the block has one.
    """
    (rows, cols), (br, bc) = w.shape[1:], block
    w = torch.nn.functional.pad(w.abs(), (0, -cols % bc, 0, -rows % br))
    return w.view(w.shape[0], w.shape[1] // br, br, w.shape[2] // bc, bc).amax(dim=(2, 4))


def element_index(
    local: Sequence[int], whole: Sequence[int], offset: Sequence[int], device: torch.device
) -> torch.Tensor:
    """int32, shape ``local``: each element's row-major index in the whole weight, mod 2**32."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for size, count, start in zip(whole, local, offset, strict=True):
        total = total[..., None] * size + torch.arange(start, start + count, device=device)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def sample_eager(
    w: torch.Tensor,
    key: torch.Tensor | None,
    clock: torch.Tensor | None,
    batch_dims: int,
    fmt: FloatFormat,
    bits: float,
    noise: str,
    block: tuple[int, int],
    scale: str | None,
    learned: torch.Tensor | None = None,
    rule: WidthRule | None = None,
    whole: Sequence[int] = (),
    offset: Sequence[int] = (),
) -> torch.Tensor:
    """The eager kernel; arguments as in `sample_weight`."""
    if not w.numel():
        return torch.empty_like(w)
    p = TorchPrimitives()
    blocks = Blocks(w, batch_dims, block)
    y = blocks.matrices(w)
    if learned is None or rule is None:
        inverse = x = amplitude = None
        if needs_block_maximum(fmt, scale, noise):
            block_amax = block_maximum(y, block)
            inverse, x = map(blocks.expand, block_scale(p, block_amax, fmt, scale, w.dtype))
            amplitude = blocks.expand(fixed_amplitude(p, block_amax, bits))
    else:
        block_amax = block_maximum(y, block)
        b = width(p, learned.detach().expand(block_amax.shape), rule)
        drawing = None if clock is None else p.iand(clock[1], p.ixor(clock[2], -1))
        grid = block_grid(p, b, block_amax, drawing, fmt, rule, scale, w.dtype)
        amplitude = blocks.expand(width_amplitude(p, b, block_amax))
    if noise != "none":
        assert key is not None
        assert clock is not None
        index = blocks.matrices(element_index(w.shape, whole or w.shape, offset or [0] * w.ndim, w.device))
        word = random_word(p, index, (key[0], key[1]), clock[0])
        y = add_noise(p, noise, y, amplitude, word, clock[1])
    if learned is None:
        result = cast(p, y, inverse, x, fmt, scale, w.dtype)
    else:
        result = cast_to_grid(p, y, grid.map(blocks.expand))
    return torch.empty_like(w).copy_(result.to(w.dtype).view(w.shape))


class Blocks:
    """The blocks of a weight."""

    def __init__(self, w: torch.Tensor, batch_dims: int, block: tuple[int, int]) -> None:
        self.shape = matrix_shape(w.shape, batch_dims)
        _, rows, cols = self.shape
        self._rows = torch.arange(rows, device=w.device) // block[0]
        self._cols = torch.arange(cols, device=w.device) // block[1]
        self._block = block

    def matrices(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape as (matrices, rows, columns): a float one as float32, detached."""
        x = x.detach().reshape(self.shape)
        return x.to(torch.float32) if x.is_floating_point() else x

    def expand(self, x: object) -> torch.Tensor:
        """A value of each block, (matrices, block rows, block columns), at every element; a number as it is."""
        return x[:, self._rows[:, None], self._cols] if isinstance(x, torch.Tensor) else x  # type: ignore[return-value]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of (matrices, rows, columns) over each block."""
        (_, rows, cols), (br, bc) = self.shape, self._block
        x = torch.nn.functional.pad(x, (0, -cols % bc, 0, -rows % br))
        return x.view(x.shape[0], x.shape[1] // br, br, x.shape[2] // bc, bc).sum(dim=(2, 4))


def bits_gradient_eager(
    grad: torch.Tensor,
    w: torch.Tensor,
    key: torch.Tensor,
    clock: torch.Tensor,
    learned: torch.Tensor,
    batch_dims: int,
    noise: str,
    block: tuple[int, int],
    rule: WidthRule,
    whole: Sequence[int] = (),
    offset: Sequence[int] = (),
) -> torch.Tensor:
    """The eager kernel; arguments as in `bits_gradient`."""
    if not w.numel():
        return torch.zeros_like(learned)
    p = TorchPrimitives()
    blocks = Blocks(w, batch_dims, block)
    index = blocks.matrices(element_index(w.shape, whole or w.shape, offset or [0] * w.ndim, w.device))
    word = random_word(p, index, (key[0], key[1]), clock[0])
    product = blocks.sum(blocks.matrices(grad) * signed_draw(p, noise, word, clock[1]))
    amax = block_maximum(blocks.matrices(w), block)
    b = width(p, learned.detach().expand(amax.shape), rule)
    gradient = product * width_amplitude(p, b, amax) * -math.log(2.0)
    if learned.ndim == 0:
        gradient = gradient.sum()
    return torch.as_tensor(width_gradient(p, gradient.reshape(learned.shape), learned.detach(), rule))


@torch.library.custom_op("gws::sample_weight", mutates_args=())
def sample_weight(
    w: torch.Tensor,
    key: torch.Tensor | None,
    clock: torch.Tensor | None,
    batch_dims: int,
    fmt: str,
    bits: float,
    noise: str,
    block: list[int],
    scale: str,
    learned: torch.Tensor | None,
    rule: str,
    whole: list[int],
    offset: list[int],
    out_dtype: torch.dtype | None,
    keep: bool,
    version: int,
) -> torch.Tensor:
    """Sample a weight: ``cast(w + R * a * 2**(1 - bits))``, ``a`` the block maximum (arXiv 2505.11170, eq. 3).

    Args:
        w: the weight, float32, bfloat16 or float16, two or more dims.
        key: int32, (2,): the weight's two key words. None when ``noise`` is ``"none"``. One tensor for each weight, so
            that compilers find the kernels of weights of one shape to be the same.
        clock: int32, (3,): the number of the draw; -1 to draw or 0 to cast ``w`` as it is; -1 where learned widths are
            frozen, else 0. None likewise.
        batch_dims: see `matrix_shape`.
        fmt: `FloatFormat.spec` of the element format.
        bits: bit width b of the noise amplitude.
        noise: one of `gws_compile.noise.NOISES`.
        block: block shape, two positive ints.
        scale: ``"floor"``, ``"ceil"``, or ``""`` for no block scale.
        learned: float32, the parameter b_i of learned widths, see `gws_compile.learned.parameter_shape`; None for the
            fixed width ``bits``.
        rule: `WidthRule.spec` of its meaning; empty for a fixed width. While noise is drawn, the cast is to ``fmt``;
            without noise, and with frozen widths, to the format that the block's width stands for.
        whole: shape of the weight of which ``w`` is one rank's part; empty where it is whole.
        offset: index of the part's first element in the whole weight; empty likewise.
        out_dtype: what the reads would convert the sample to, such as bfloat16 under autocast: the sample comes in this
            dtype, its values the same as if converted behind the operator. The weight's own when None.
        keep: whether backward keeps the sample, or computes it again. It changes no value: the mark that makes the
            difference is not seen by compile caches, which would take one setting's code for the other.
        version: `OPERATOR_VERSION`.

    Returns:
        The sampled weight: shape and strides of ``w``, every value on the grid of its block.
    """
    sampled = sample_eager(
        w,
        key,
        clock,
        batch_dims,
        FloatFormat.parse(fmt),
        bits,
        noise,
        check_block(block),
        scale or None,
        learned,
        WidthRule.parse(rule) if rule else None,
        whole,
        offset,
    )
    return sampled.to(out_dtype or w.dtype)


@sample_weight.register_fake
def _(
    w: torch.Tensor,
    key: torch.Tensor | None,
    clock: torch.Tensor | None,
    batch_dims: int,
    fmt: str,
    bits: float,
    noise: str,
    block: list[int],
    scale: str,
    learned: torch.Tensor | None,
    rule: str,
    whole: list[int],
    offset: list[int],
    out_dtype: torch.dtype | None,
    keep: bool,
    version: int,
) -> torch.Tensor:
    if w.dtype not in DTYPES:
        raise TypeError(f"gws::sample_weight takes weights of {', '.join(map(str, DTYPES))}, got {w.dtype}")
    if version != OPERATOR_VERSION:
        raise RuntimeError(f"gws::sample_weight is at version {OPERATOR_VERSION}, the graph was made for {version}")
    return torch.empty_like(w, dtype=out_dtype or w.dtype)


@torch.library.custom_op("gws::bits_gradient", mutates_args=())
def bits_gradient(
    grad: torch.Tensor,
    w: torch.Tensor,
    key: torch.Tensor,
    clock: torch.Tensor,
    learned: torch.Tensor,
    batch_dims: int,
    noise: str,
    block: list[int],
    rule: str,
    whole: list[int],
    offset: list[int],
    version: int,
) -> torch.Tensor:
    """Gradient of a learned width's parameter (arXiv 2505.11170): R is drawn again from its counter.

    ``dL/db = -ln 2 * 2**(1 - b) * a * sum over the block of (dL/dw_hat * R)``, summed over the blocks of a weight that
    has one width; times ``init - target``; zero where the width would leave its range.

    Args:
        grad: gradient of the sampled weight, of its shape.
        w, key, clock, learned, batch_dims, noise, block, rule, whole, offset, version: of `sample_weight`.

    Returns:
        float32, shape of ``learned``.
    """
    return bits_gradient_eager(
        grad, w, key, clock, learned, batch_dims, noise, check_block(block), WidthRule.parse(rule), whole, offset
    )


@bits_gradient.register_fake
def _(
    grad: torch.Tensor,
    w: torch.Tensor,
    key: torch.Tensor,
    clock: torch.Tensor,
    learned: torch.Tensor,
    batch_dims: int,
    noise: str,
    block: list[int],
    rule: str,
    whole: list[int],
    offset: list[int],
    version: int,
) -> torch.Tensor:
    return torch.empty_like(learned)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    w, key, clock, batch_dims, _, _, noise, block, _, learned, rule, whole, offset, _, _, version = inputs
    ctx.dtype = w.dtype
    ctx.learned = learned is not None and noise != "none"
    if ctx.learned:
        ctx.save_for_backward(w, key, clock, learned)
        ctx.rest = (batch_dims, noise, block, rule, whole, offset, version)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    bits = None
    if ctx.learned and ctx.needs_input_grad[9]:
        bits = bits_gradient(grad, *ctx.saved_tensors, *ctx.rest)
    return (grad.to(ctx.dtype), *[None] * 8, bits, *[None] * 6)


sample_weight.register_autograd(_backward, setup_context=_setup_context)
