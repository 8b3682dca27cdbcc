"""Calls of the operator as the backend makes them."""

import torch

import gws_compile.codegen.lowering  # noqa: F401  registers the lowerings
from gws_compile.ops.sample_arguments import OPERATOR_VERSION

KEY = torch.tensor([123456789, -987654321], dtype=torch.int32)
CLOCK = torch.tensor([7, -1, 0, 0], dtype=torch.int32)


def arguments(
    w,
    *,
    fmt="e4m3",
    bits=5.0,
    noise="rounded_normal",
    block=(32, 32),
    scale="floor",
    batch_dims=0,
    learned=None,
    rule="",
    part=((), ()),
    maxima=None,
    out_dtype=None,
    clock=CLOCK,
):
    key, clock = (None, None) if noise == "none" else (KEY, clock)
    return (
        w,
        key,
        clock,
        batch_dims,
        fmt,
        bits,
        noise,
        list(block),
        scale,
        learned,
        rule,
        *map(list, part),
        maxima,
        out_dtype,
        True,
        OPERATOR_VERSION,
    )


def sample(*args):
    return torch.ops.gws.sample_weight.default(*args)


def cut(w, offset, local):
    """The part of a tensor with this offset and shape, contiguous."""
    return w[tuple(slice(o, o + n) for o, n in zip(offset, local, strict=True))].contiguous()


def sample_parts(parts, cases):
    """The samples of parts of weights.

    Args:
        parts: `cut` out of whole weights.
        cases: of each (shape of the whole, offset, shape of the part, settings).
    """
    return [
        sample(*arguments(part, part=(shape, offset), **settings))
        for part, (shape, offset, _, settings) in zip(parts, cases, strict=True)
    ]
