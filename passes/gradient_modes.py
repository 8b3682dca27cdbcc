"""Where in a graph gradients are recorded: ``no_grad``, ``enable_grad`` and ``inference_mode`` are nodes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from . import operations
from .bodies import nodes


@dataclass(frozen=True)
class Mode:
    """The mode that a node runs in.

    Attributes:
        enabled: what it computes is recorded.
        outside: the transforms of `torch.func.grad` that it stands in stand where gradients are enabled. Without, only
            the gradients that such a transform takes itself flow.
    """

    enabled: bool
    outside: bool = True


RECORDED = Mode(enabled=True)

Modes = Mapping[fx.Node, Mode]


def gradient_modes(module: fx.GraphModule, enabled: bool) -> Modes:
    """The mode of each node of a graph, and of the bodies of its checkpoints, which begin in that of their call.

    A graph that goes on behind a graph break inside such a region enters it again by nodes of its own.

    Args:
        module: the graph.
        enabled: whether it is entered with gradients enabled.
    """
    modes: dict[fx.Node, Mode] = {}
    mode, inference = Mode(enabled), False
    left: dict[fx.Node, tuple[Mode, bool]] = {}  # what the regions of inference mode go back to
    transforms: list[Mode] = []
    for _, node in nodes(module):
        name = operations.name_of(node)
        if name == "_set_grad_enabled":
            mode = replace(mode, enabled=bool(node.args[0]))
        elif name == "_enter_inference_mode":
            # With False it ends inference mode, and the no_grad around it too.
            left[node] = mode, inference
            inference = bool(node.args[0])
            mode = replace(mode, enabled=not inference)
        elif name == "_exit_inference_mode":
            (entered,) = node.all_input_nodes
            mode, inference = left[entered]
        elif name == "_grad_increment_nesting":
            transforms.append(mode)
            mode = replace(mode, outside=mode.enabled and not inference and mode.outside)
        elif name == "_grad_decrement_nesting" and transforms:
            mode = replace(mode, outside=transforms.pop().outside)
        modes[node] = replace(mode, enabled=mode.enabled and not inference)
    return modes
