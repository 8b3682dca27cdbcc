"""The nodes that stand between a weight and its reads: those of two operators, told apart by their targets."""

from __future__ import annotations

import torch
from torch import fx

import gws_compile.levels.operators
import gws_compile.ops.sample_weight  # noqa: F401  (registers the operator)
from gws_compile.levels.arguments import LevelsArguments
from gws_compile.ops.sample_arguments import SampleArguments

SAMPLES = (torch.ops.gws.sample_weight.default, torch.ops.gws.cast_to_levels.default)
"""The operators: of weights in a format, and of those with levels that are trained."""


def is_sample(node: fx.Node) -> bool:
    """Whether a node is a sample, or cast, of a weight."""
    return node.op == "call_function" and node.target in SAMPLES


def arguments_of(node: fx.Node) -> SampleArguments | LevelsArguments:
    """The arguments of such a node."""
    if node.target is torch.ops.gws.cast_to_levels.default:
        return LevelsArguments.of(node)
    return SampleArguments.of(node)
