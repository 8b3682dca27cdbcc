"""The operator ``gws::sample_weight``: noise, then cast, of one weight; ``gws::bits_gradient`` for learned widths; and
``gws::weight_maximum``, for maxima over more than one rank.

One node per weight in every graph. The eager kernels (`gws_compile.ops.eager`) and Inductor's lowerings
(`gws_compile.codegen.lowering`) run the same arithmetic, `gws_compile.numerics.spec`. The gradient of a sample is the
identity: block maximum, noise and cast are constants to autograd.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..numerics.blocks import block_counts, matrix_shape
from .eager import bits_gradient_eager, maximum_eager, sample_eager
from .sample_arguments import BitsGradientArguments, MaximumArguments, SampleArguments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Weight dtypes the operator takes."""

MAX_ELEMENTS = 2**32
"""A weight's element index is one 32-bit word: a larger weight would repeat its noise."""


@torch.library.custom_op("gws::sample_weight", mutates_args=())
def sample_weight(
    w: torch.Tensor,
    key: torch.Tensor | None,
    clock: torch.Tensor | None,
    batch_dims: int,
    fmt: str,
    bits: float | None,
    noise: str,
    block: list[int],
    scale: str,
    learned: torch.Tensor | None,
    rule: str,
    whole: list[int],
    offset: list[int],
    maxima: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    keep: bool,
    switch: int,
    products: str,
    version: int,
) -> torch.Tensor:
    """Sample a weight: ``cast(w + R * a * 2**(1 - bits))``, ``a`` the block maximum (arXiv 2505.11170, eq. 3).

    Args:
        w: the weight, float32, bfloat16 or float16, two or more dims.
        key: int32, (2,): the weight's two key words. None where nothing is drawn for it, nor for an operand that its
            products are with. One tensor for each weight, so that compilers find the kernels of weights of one shape to
            be the same.
        clock: int32, (5,): the number of the draw; -1 to draw or 0 to cast ``w`` as it is; -1 where learned widths are
            frozen, else 0; the bits of the float32 ``2**(1 - b)`` where a schedule moves the width b, else 0; bits for
            the kinds of products that are in high precision now, see ``switch``. None where nothing of it is needed.
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        fmt: the ``spec`` of the element format.
        bits: bit width b of the noise amplitude; None where the clock says it.
        noise: one of `gws_compile.numerics.noise.NOISES`.
        block: block shape; 0 for a side that is as long as the matrix.
        scale: one of `gws_compile.numerics.scales.SCALES`, or ``""`` for no block scale.
        learned: float32, the parameter b_i of learned widths, see
            `gws_compile.numerics.widths.parameter_shape`; None for the fixed width ``bits``.
        rule: `WidthRule.spec` of its meaning; empty for a fixed width. While noise is drawn, the cast is to ``fmt``;
            without noise, and with frozen widths, to the format that the block's width stands for.
        whole: shape of the weight of which ``w`` is one rank's part; empty where it is whole.
        offset: index of the part's first element in the whole weight; empty likewise.
        maxima: int32, what of `weight_maximum` this call cannot compute, since ``w`` is one rank's part: of the blocks,
            (matrices, block rows, block columns), where they are as long as the weight; of the matrices,
            (matrices, 1, 1), for the scale ``"nvfp4"``. None where it has all it needs.
        out_dtype: what the reads would convert the sample to, such as bfloat16 under autocast: the sample comes in this
            dtype, its values the same as if converted behind the operator. The weight's own when None.
        keep: whether backward keeps the sample, or computes it again. It changes no value: the mark that makes the
            difference is not seen by compile caches, which would take one setting's code for the other.
        switch: bits of the clock's fifth word: while one of them is set, ``w`` stays as it is. 0 for never.
        products: how the other operands of the products that read the weight are rounded, forward and backward: the
            text of a `gws_compile.settings.operands.ProductSettings`, for the passes over AOTAutograd's graph; empty
            where they stay as they are. It changes no value here.
        version: `OPERATOR_VERSION`.

    Returns:
        The sampled weight: shape and strides of ``w``, every value on the grid of its block.
    """
    given = SampleArguments(
        w,
        key,
        clock,
        batch_dims,
        fmt,
        bits,
        noise,
        block,
        scale,
        learned,
        rule,
        whole,
        offset,
        maxima,
        out_dtype,
        keep,
        switch,
        products,
        version,
    )
    spec = given.spec(w.dtype)
    sampled = sample_eager(w, spec, batch_dims, block, key, clock, learned, whole, offset, maxima=maxima)
    return sampled.to(out_dtype or w.dtype)


@sample_weight.register_fake
def _(*arguments: Any) -> torch.Tensor:
    given = SampleArguments(*arguments)
    w: torch.Tensor = given.w
    if w.dtype not in DTYPES:
        raise TypeError(f"gws::sample_weight takes weights of {', '.join(map(str, DTYPES))}, got {w.dtype}")
    given.check_version()
    return torch.empty_like(w, dtype=given.out_dtype or w.dtype)


@torch.library.custom_op("gws::weight_maximum", mutates_args=())
def weight_maximum(w: torch.Tensor, batch_dims: int, block: list[int], finite: bool, version: int) -> torch.Tensor:
    """Largest magnitude of each block of a weight, as bits: what has to be known of all ranks' parts before a sample.

    Args:
        w: the weight, or a part of it, of whatever size.
        batch_dims, block, version: of `sample_weight`.
        finite: leave out what is NaN or Inf.

    Returns:
        int32, (matrices, block rows, block columns): the bits of the float32 maximum, a NaN's above all others; the
        largest of two ranks' is that of both.
    """
    return maximum_eager(w, batch_dims, block, finite=finite)


@weight_maximum.register_fake
def _(*arguments: Any) -> torch.Tensor:
    given = MaximumArguments(*arguments)
    matrices, rows, cols = matrix_shape(given.w.shape, given.batch_dims)
    maxima: torch.Tensor = given.w.new_empty([matrices, *block_counts(given.block, rows, cols)], dtype=torch.int32)
    return maxima


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
    maxima: torch.Tensor | None,
    version: int,
) -> torch.Tensor:
    """Gradient of a learned width's parameter (arXiv 2505.11170): R is drawn again from its counter.

    ``dL/db = -ln 2 * 2**(1 - b) * a * sum over the block of (dL/dw_hat * R)``, summed over the blocks of a weight that
    has one width; times ``init - target``; zero where the width would leave its range.

    Args:
        grad: gradient of the sampled weight, of its shape.
        w, key, clock, learned, batch_dims, noise, block, rule, whole, offset, maxima, version: of `sample_weight`.

    Returns:
        float32, shape of ``learned``.
    """
    spec = BitsGradientArguments(
        grad, w, key, clock, learned, batch_dims, noise, block, rule, whole, offset, maxima, version
    ).spec
    return bits_gradient_eager(grad, w, key, clock, learned, spec, batch_dims, block, whole, offset, maxima=maxima)


@bits_gradient.register_fake
def _(*arguments: Any) -> torch.Tensor:
    return torch.empty_like(BitsGradientArguments(*arguments).learned)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    given = SampleArguments(*inputs)
    ctx.dtype = given.w.dtype
    ctx.learned = given.learned is not None and given.noise != "none"
    if ctx.learned:
        ctx.save_for_backward(given.w, given.key, given.clock, given.learned, given.maxima)
        ctx.rest = replace(given, w=None, key=None, clock=None, learned=None, maxima=None)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    bits = None
    if ctx.learned and SampleArguments.needs_gradient(ctx, "learned"):
        w, key, clock, learned, maxima = ctx.saved_tensors
        sampled = replace(ctx.rest, w=w, key=key, clock=clock, learned=learned, maxima=maxima)
        bits = bits_gradient(*BitsGradientArguments.behind(sampled, grad).call())
    return SampleArguments.gradients(w=grad.to(ctx.dtype), learned=bits)


sample_weight.register_autograd(_backward, setup_context=_setup_context)
