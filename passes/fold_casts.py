"""Have the sample come in the dtype that its reads convert it to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from gws_compile.ops.sample_arguments import SampleArguments
from gws_compile.torch_internals.graphs import example_value

from . import operations
from .bodies import nodes
from .graph_walk import Step
from .rewrite_context import Rewrite

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
        node: _autocast_dtype(node, regions)
        for node, regions in _autocast_regions(rewrite.module)
        if operations.name_of(node) in operations.AUTOCAST
    }
    for sample in rewrite.samples:
        dtype = sample.weight.dtype
        wanted = {converted or autocast.get(node) or dtype for node, converted in _uses(sample.steps, None)}
        if len(wanted) != 1 or wanted == {dtype} or not wanted.issubset(_DTYPES):
            continue
        (dtype,) = wanted
        SampleArguments.of(sample.node).write(sample.node, out_dtype=dtype)
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


def _autocast_regions(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, dict[str, torch.dtype | None]]]:
    """The nodes, each with the regions that it is in: device type -> dtype, None where autocast is off.

    A device type that is not there is left to the mode in which the graph is traced. The body of a checkpoint lies in
    the regions around its node.
    """
    regions: list[dict[str, torch.dtype | None]] = [{}]
    for _, node in nodes(gm):
        name = operations.name_of(node)
        if name == "_enter_autocast":
            entered: Any = node.args[:3]
            device_type, dtype, enabled = entered
            inside = (dtype or torch.get_autocast_dtype(device_type)) if enabled else None
            regions.append({**regions[-1], device_type: inside})
        elif name == "_exit_autocast":
            regions.pop()
        else:
            yield node, regions[-1]


def _autocast_dtype(read: fx.Node, regions: dict[str, torch.dtype | None]) -> torch.dtype | None:
    """What autocast converts a read's operands to; None where it is off."""
    value = next((example_value(n) for n in read.all_input_nodes), None)
    device_type = value.device.type if isinstance(value, torch.Tensor) else "cpu"
    if device_type in regions:
        return regions[device_type]
    if not torch.amp.is_autocast_available(device_type):  # meta
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
