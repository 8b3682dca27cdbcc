"""Calls of the operator as the backend makes them."""

import torch

import gws_compile.codegen.lowering  # noqa: F401  registers the lowerings
from gws_compile.ops.sample_arguments import OPERATOR_VERSION

KEY = torch.tensor([123456789, -987654321], dtype=torch.int32)
CLOCK = torch.tensor([7, -1, 0, 0, 0], dtype=torch.int32)


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
    switch=0,
):
    key, clock = (None, clock if switch else None) if noise == "none" else (KEY, clock)
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
        switch,
        "",
        OPERATOR_VERSION,
    )


def sample(*args):
    return torch.ops.gws.sample_weight.default(*args)


def cut(w, offset, local):
    """The part of a tensor with this offset and shape, contiguous."""
    return w[tuple(slice(o, o + n) for o, n in zip(offset, local, strict=True))].contiguous()


def clock_of_width(bits):
    """`CLOCK` of a schedule that is at this width."""
    return torch.cat([CLOCK[:3], torch.tensor([2.0 ** (1.0 - bits)]).view(torch.int32), CLOCK[4:]])


def maximum(w, *, batch_dims=0, block=(0, 0), finite=False):
    return torch.ops.gws.weight_maximum.default(w, batch_dims, list(block), finite, OPERATOR_VERSION)


def whole_maxima(w, *, scale="floor", block=(32, 32), batch_dims=0, **_):
    """What of a whole weight the calls for its parts are given: the maxima of its matrices, or of its blocks."""
    if scale == "nvfp4":
        return maximum(w, batch_dims=batch_dims, finite=True)
    return maximum(w, batch_dims=batch_dims, block=block)


def sample_parts(parts, cases, maxima=None):
    """The samples of parts of weights.

    Args:
        parts: `cut` out of whole weights.
        cases: of each (shape of the whole, offset, shape of the part, settings).
        maxima: of each; None where no part needs any.
    """
    return [
        sample(*arguments(part, part=(shape, offset), maxima=given, **settings))
        for part, given, (shape, offset, _, settings) in zip(parts, maxima or [None] * len(parts), cases, strict=True)
    ]
