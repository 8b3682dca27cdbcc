"""Regions of autocast in a graph: which dtype it converts the operands of an operation to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from gws_compile.torch_internals.graphs import example_value

from . import operations
from .bodies import nodes

Regions = dict[str, torch.dtype | None]
"""Device type -> dtype, None where autocast is off; one that is not there is left to the mode of tracing."""


def with_regions(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Regions]]:
    """The nodes, each with the regions that it is in. The body of a checkpoint lies in those around its node."""
    regions: list[Regions] = [{}]
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


def dtype_in(regions: Regions, node: fx.Node) -> torch.dtype | None:
    """What autocast converts the operands of a node to; None where it is off."""
    value = next((example_value(n) for n in node.all_input_nodes), None)
    device_type = value.device.type if isinstance(value, torch.Tensor) else "cpu"
    if device_type in regions:
        return regions[device_type]
    if not torch.amp.is_autocast_available(device_type):  # meta
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
