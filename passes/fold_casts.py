"""Have the sample come in the dtype that its reads convert it to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import fx

from gws_compile.torch_internals.graphs import example_value

from . import operations
from .autocast import dtype_in, with_regions
from .graph_walk import Step
from .rewrite_context import Rewrite
from .sample_nodes import arguments_of

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def fold_casts(rewrite: Rewrite) -> None:
    """Write into each sample what its reads make of it, where they agree: bfloat16, under autocast or by a cast.

    Before, under autocast, and in a module that casts its weight itself::

        sample_weight = gws.sample_weight(weight, ..., None, ...)
        linear(x, sample_weight, bias)                              # autocast casts sample_weight

        to = sample_weight_1.to(torch.bfloat16)
        linear(x, to, bias)

    After::

        sample_weight = gws.sample_weight(weight, ..., torch.bfloat16, ...)
        linear(x, sample_weight, bias)

        to = sample_weight_1.to(torch.bfloat16)                     # nothing left to do

    The values are the same. But a compiler may now write the sample in loops of its own, in which the weight is read
    once, and nothing that would be kept for backward comes behind the operator.

    Requires the samples of `insert_samples`.

    Args:
        rewrite: the graph; changed in place, and its checkpoint bodies.
    """
    if not rewrite.samples:
        return
    autocast = {
        node: dtype_in(regions, node)
        for node, regions in with_regions(rewrite.module)
        if operations.name_of(node) in operations.AUTOCAST
    }
    for sample in rewrite.samples:
        dtype = sample.weight.dtype
        wanted = {converted or autocast.get(node) or dtype for node, converted in _uses(sample.steps, None)}
        if len(wanted) != 1 or wanted == {dtype} or not wanted.issubset(_DTYPES):
            continue
        (dtype,) = wanted
        arguments_of(sample.node).write(sample.node, out_dtype=dtype)
        sample.node.meta["example_value"] = example_value(sample.node).to(dtype)


def _uses(steps: Iterable[Step], dtype: torch.dtype | None) -> Iterator[tuple[fx.Node, torch.dtype | None]]:
    """Everything that a sample reaches through views, with the dtype that the way first converts it to."""
    for step in steps:
        if step.kind == "view":
            converted = dtype or _converts_to(step.node)
            for place in step.places:
                yield from _uses(place.steps, converted)
        else:
            yield step.node, dtype


def _converts_to(node: fx.Node) -> torch.dtype | None:
    if operations.name_of(node) not in operations.CONVERSIONS:
        return None
    value = example_value(node)
    return value.dtype if isinstance(value, torch.Tensor) else None
