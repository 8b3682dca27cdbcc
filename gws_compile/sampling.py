"""The operator ``gws::sample_weight``: noise, then cast, of one weight.

One node per weight in every graph; the eager kernel here and the Inductor lowering in `gws_compile.lowering` run the
same arithmetic (`noise`, `cast`). Its gradient is the identity: block maximum, noise and cast
are constants to autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .cast import cast, needs_block_maximum
from .config import check_block
from .formats import FloatFormat
from .noise import add_noise, random_word
from .primitives import TorchPrimitives

OPERATOR_VERSION = 3
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
    keys: torch.Tensor | None,
    clock: torch.Tensor | None,
    row: int,
    batch_dims: int,
    fmt: FloatFormat,
    bits: float,
    noise: str,
    block: tuple[int, int],
    scale: str | None,
    whole: Sequence[int] = (),
    offset: Sequence[int] = (),
) -> torch.Tensor:
    """The eager kernel; arguments as in `sample_weight`."""
    if not w.numel():
        return torch.empty_like(w)
    p = TorchPrimitives()
    m, r, c = matrix_shape(w.shape, batch_dims)
    y = w.detach().reshape(m, r, c).to(torch.float32)
    amax = None
    if needs_block_maximum(fmt, scale, noise):
        amax = block_maximum(y, block)
        rows = torch.arange(r, device=w.device) // block[0]
        cols = torch.arange(c, device=w.device) // block[1]
        amax = amax[:, rows[:, None], cols]
    if noise != "none":
        assert keys is not None
        assert clock is not None
        assert amax is not None
        index = element_index(w.shape, whole or w.shape, offset or [0] * w.ndim, w.device).view(m, r, c)
        word = random_word(p, index, (keys[row, 0], keys[row, 1]), clock[0])
        y = add_noise(p, noise, y, amax, bits, word, clock[1])
    result = cast(p, y, amax, fmt, scale, w.dtype).to(w.dtype).view(w.shape)
    return torch.empty_like(w).copy_(result)


@torch.library.custom_op("gws::sample_weight", mutates_args=())
def sample_weight(
    w: torch.Tensor,
    keys: torch.Tensor | None,
    clock: torch.Tensor | None,
    row: int,
    batch_dims: int,
    fmt: str,
    bits: float,
    noise: str,
    block: list[int],
    scale: str,
    whole: list[int],
    offset: list[int],
    version: int,
) -> torch.Tensor:
    """Sample a weight: ``cast(w + R * a * 2**(1 - bits))``, ``a`` the block maximum (arXiv 2505.11170, eq. 3).

    Args:
        w: the weight, float32, bfloat16 or float16, two or more dims.
        keys: int32, (weights, 2): the two key words of each weight. None when ``noise`` is ``"none"``.
        clock: int32, (2,): the number of the draw, and -1 to draw or 0 to cast ``w`` as it is. None likewise.
        row: the row of ``keys`` that is this weight's.
        batch_dims: see `matrix_shape`.
        fmt: `FloatFormat.spec` of the element format.
        bits: bit width b of the noise amplitude.
        noise: one of `gws_compile.noise.NOISES`.
        block: block shape, two positive ints.
        scale: ``"floor"``, ``"ceil"``, or ``""`` for no block scale.
        whole: shape of the weight of which ``w`` is one rank's part; empty where it is whole.
        offset: index of the part's first element in the whole weight; empty likewise.
        version: `OPERATOR_VERSION`.

    Returns:
        The sampled weight: shape, dtype and strides of ``w``, every value on the grid of its block.
    """
    return sample_eager(
        w,
        keys,
        clock,
        row,
        batch_dims,
        FloatFormat.parse(fmt),
        bits,
        noise,
        check_block(block),
        scale or None,
        whole,
        offset,
    )


@sample_weight.register_fake
def _(
    w: torch.Tensor,
    keys: torch.Tensor | None,
    clock: torch.Tensor | None,
    row: int,
    batch_dims: int,
    fmt: str,
    bits: float,
    noise: str,
    block: list[int],
    scale: str,
    whole: list[int],
    offset: list[int],
    version: int,
) -> torch.Tensor:
    if w.dtype not in DTYPES:
        raise TypeError(f"gws::sample_weight takes weights of {', '.join(map(str, DTYPES))}, got {w.dtype}")
    if version != OPERATOR_VERSION:
        raise RuntimeError(f"gws::sample_weight is at version {OPERATOR_VERSION}, the graph was made for {version}")
    return torch.empty_like(w)


def _backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (grad, *[None] * 12)


sample_weight.register_autograd(_backward)
