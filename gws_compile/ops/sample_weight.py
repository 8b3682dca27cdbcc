"""The operator ``gws::sample_weight``: noise, then cast, of one weight; and ``gws::bits_gradient`` for learned widths.

One node per weight in every graph. The eager kernels (`gws_compile.ops.eager`) and Inductor's lowerings
(`gws_compile.codegen.lowering`) run the same arithmetic, `gws_compile.numerics.spec`. The gradient of a sample is the
identity: block maximum, noise and cast are constants to autograd.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..numerics.blocks import check_block
from .eager import bits_gradient_eager, sample_eager
from .sample_arguments import BitsGradientArguments, SampleArguments

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
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        fmt: `FloatFormat.spec` of the element format.
        bits: bit width b of the noise amplitude.
        noise: one of `gws_compile.numerics.noise.NOISES`.
        block: block shape, two positive ints.
        scale: ``"floor"``, ``"ceil"``, or ``""`` for no block scale.
        learned: float32, the parameter b_i of learned widths, see
            `gws_compile.numerics.widths.parameter_shape`; None for the fixed width ``bits``.
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
        out_dtype,
        keep,
        version,
    )
    sampled = sample_eager(w, given.spec(w.dtype), batch_dims, check_block(block), key, clock, learned, whole, offset)
    return sampled.to(out_dtype or w.dtype)


@sample_weight.register_fake
def _(*arguments: Any) -> torch.Tensor:
    given = SampleArguments(*arguments)
    w: torch.Tensor = given.w
    if w.dtype not in DTYPES:
        raise TypeError(f"gws::sample_weight takes weights of {', '.join(map(str, DTYPES))}, got {w.dtype}")
    given.check_version()
    return torch.empty_like(w, dtype=given.out_dtype or w.dtype)


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
    spec = BitsGradientArguments(
        grad, w, key, clock, learned, batch_dims, noise, block, rule, whole, offset, version
    ).spec
    return bits_gradient_eager(grad, w, key, clock, learned, spec, batch_dims, check_block(block), whole, offset)


@bits_gradient.register_fake
def _(*arguments: Any) -> torch.Tensor:
    return torch.empty_like(BitsGradientArguments(*arguments).learned)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    given = SampleArguments(*inputs)
    ctx.dtype = given.w.dtype
    ctx.learned = given.learned is not None and given.noise != "none"
    if ctx.learned:
        ctx.save_for_backward(given.w, given.key, given.clock, given.learned)
        ctx.rest = replace(given, w=None, key=None, clock=None, learned=None)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    bits = None
    if ctx.learned and SampleArguments.needs_gradient(ctx, "learned"):
        w, key, clock, learned = ctx.saved_tensors
        sampled = replace(ctx.rest, w=w, key=key, clock=clock, learned=learned)
        bits = bits_gradient(*BitsGradientArguments.behind(sampled, grad).call())
    return SampleArguments.gradients(w=grad.to(ctx.dtype), learned=bits)


sample_weight.register_autograd(_backward, setup_context=_setup_context)
