"""Have backward compute the sampled weights again instead of keeping them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from gws_compile import torch_internals
from gws_compile.config import Config

from . import operations

# Activation checkpointing numbers its regions from 1 upwards; each of ours is a region of its own, numbered far away.
_FIRST_GROUP = 1 << 20


def recompute_in_backward(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Config) -> fx.GraphModule:
    """Under ``backward="recompute"``, mark each sampled weight so that the partitioner saves the weight itself.

    The sample is a pure function of weight, key and clock, so gradients stay bit-identical. Under autocast the reading
    operation would cast the sample where no mark reaches, and the cast copy would be kept: so the cast is written out::

        sample_weight = gws.sample_weight(weight, ...)      # marked
        to = sample_weight.to(torch.bfloat16)               # marked
        linear(x, to, bias)

    Inside an activation checkpoint nothing is marked: what the checkpoint computes again is its own decision.

    Requires the sampled weights of `sample_weights`.

    Args:
        gm: the rewritten graph; changed in place.
        example_inputs: unused.
        config: ``backward`` decides.
    """
    if config.backward != "recompute":
        return gm
    compute_dtype = dict(_autocast_dtypes(gm))
    sampled = gm.graph.find_nodes(op="call_function", target=torch.ops.gws.sample_weight.default)
    for group, node in enumerate(sampled, _FIRST_GROUP):
        torch_internals.mark_recompute(node, group)
        weight = node.meta["gws_weight"]
        dtypes = {compute_dtype.get(read) for read in _reads_of(node)}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        if dtype is None or dtype == weight.dtype or weight.dtype == torch.float64:
            continue
        with gm.graph.inserting_after(node):
            cast = gm.graph.call_method("to", (node, dtype))
        torch_internals.mark_recompute(cast, group)
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
    gm.recompile()
    return gm


def _reads_of(node: fx.Node) -> Iterator[fx.Node]:
    """Everything that the value in ``node`` reaches through views; a use that is no read comes as itself."""
    for user in node.users:
        if operations.is_transparent(user, node):
            yield from _reads_of(user)
        else:
            yield user


def _autocast_dtypes(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, torch.dtype]]:
    """The reads that autocast casts, each with the dtype it casts to."""
    regions: list[tuple[str, torch.dtype | None]] = []
    for node in gm.graph.nodes:
        name = operations.name_of(node)
        if name == "_enter_autocast":
            device_type, dtype, enabled = node.args[:3]
            regions.append((device_type, (dtype or torch.get_autocast_dtype(device_type)) if enabled else None))
        elif name == "_exit_autocast":
            regions.pop()
        elif name in operations.AUTOCAST:
            value = next((torch_internals.example_value(n) for n in node.all_input_nodes), None)
            device_type = value.device.type if isinstance(value, torch.Tensor) else "cpu"
            ambient = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
            inside = [dtype for device, dtype in regions if device == device_type]
            dtype = inside[-1] if inside else ambient
            if dtype is not None:
                yield node, dtype
