"""Have backward compute the sampled weights again instead of keeping them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from gws_compile import torch_internals
from gws_compile.config import Config

# Activation checkpointing numbers its regions from 1 upwards; each of ours is a region of its own, numbered far away.
_FIRST_GROUP = 1 << 20


def recompute_in_backward(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Config) -> fx.GraphModule:
    """Under ``backward="recompute"``, mark each sampled weight so that the partitioner saves the weight itself.

    The sample is a pure function of weight, key and clock, so gradients stay bit-identical. Where the reads of a sample
    convert it to different dtypes, under autocast, the converted copies are kept: no mark reaches them.

    Inside an activation checkpoint nothing is marked: what the checkpoint computes again is its own decision.

    Requires the sampled weights of `sample_weights`, converted by `convert_samples`.

    Args:
        gm: the rewritten graph; changed in place.
        example_inputs: unused.
        config: ``backward`` decides.
    """
    if config.backward == "recompute":
        sampled = gm.graph.find_nodes(op="call_function", target=torch.ops.gws.sample_weight.default)
        for group, node in enumerate(sampled, _FIRST_GROUP):
            torch_internals.mark_recompute(node, group)
    return gm
