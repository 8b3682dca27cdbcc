"""Have the sample come in the dtype that its reads convert it to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from gws_compile import torch_internals
from gws_compile.config import Config

from . import operations

_OUT_DTYPE = -3  # position in the arguments of gws::sample_weight


def convert_samples(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Config) -> fx.GraphModule:
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

    Requires the sampled weights of `sample_weights`.

    Args:
        gm: the rewritten graph; changed in place, and its checkpoint bodies.
        example_inputs: unused.
        config: unused.
    """
    _convert(gm, {})
    return gm


def _convert(gm: fx.GraphModule, around: dict[str, torch.dtype | None]) -> None:
    autocast = {}
    for node, regions in _autocast_regions(gm, around):
        body = torch_internals.checkpoint_body(node)
        if body is not None:
            inner = getattr(gm, str(body.target))
            if isinstance(inner, fx.GraphModule):
                _convert(inner, regions)
        elif operations.name_of(node) in operations.AUTOCAST:
            autocast[node] = _autocast_dtype(node, regions)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.gws.sample_weight.default):
        weight = node.meta["gws_weight"]
        wanted = {dtype or autocast.get(read) or weight.dtype for read, dtype in _reads_of(node, None)}
        if len(wanted) != 1 or wanted == {weight.dtype} or not wanted.issubset(_DTYPES):
            continue
        (dtype,) = wanted
        args = list(node.args)
        args[_OUT_DTYPE] = dtype
        node.args = tuple(args)
        node.meta["example_value"] = torch_internals.example_value(node).to(dtype)
    gm.recompile()


_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def _reads_of(node: fx.Node, dtype: torch.dtype | None) -> Iterator[tuple[fx.Node, torch.dtype | None]]:
    """Everything that the value in ``node`` reaches through views, with the dtype that the way first converts it to."""
    for user in node.users:
        if operations.is_transparent(user, node):
            yield from _reads_of(user, dtype or _converts_to(user))
        else:
            yield user, dtype


def _converts_to(node: fx.Node) -> torch.dtype | None:
    if operations.name_of(node) not in operations.CONVERSIONS:
        return None
    value = torch_internals.example_value(node)
    return value.dtype if isinstance(value, torch.Tensor) else None


def _autocast_regions(
    gm: fx.GraphModule, around: dict[str, torch.dtype | None]
) -> Iterator[tuple[fx.Node, dict[str, torch.dtype | None]]]:
    """The nodes, each with the regions that it is in: device type -> dtype, None where autocast is off.

    A device type that is not there is left to the mode in which the graph is traced.
    """
    regions = [around]
    for node in gm.graph.nodes:
        name = operations.name_of(node)
        if name == "_enter_autocast":
            device_type, dtype, enabled = node.args[:3]
            inside = (dtype or torch.get_autocast_dtype(device_type)) if enabled else None
            regions.append({**regions[-1], device_type: inside})
        elif name == "_exit_autocast":
            regions.pop()
        else:
            yield node, regions[-1]


def _autocast_dtype(read: fx.Node, regions: dict[str, torch.dtype | None]) -> torch.dtype | None:
    """What autocast converts a read's operands to; None where it is off."""
    value = next((torch_internals.example_value(n) for n in read.all_input_nodes), None)
    device_type = value.device.type if isinstance(value, torch.Tensor) else "cpu"
    if device_type in regions:
        return regions[device_type]
    if not torch.amp.is_autocast_available(device_type):  # meta
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
