"""Have backward compute the sampled weights again instead of keeping them."""

from __future__ import annotations

from gws_compile.settings.arguments import Backward
from gws_compile.torch_internals import graphs

from .rewrite_context import Rewrite
from .sample_nodes import arguments_of

# Activation checkpointing numbers its regions from 1 upwards; each of ours is a region of its own, numbered far away.
_FIRST_GROUP = 1 << 20


def mark_recompute(rewrite: Rewrite, *, backward: Backward) -> None:
    """Under ``backward="recompute"``, mark each sampled weight so that the partitioner saves the weight itself.

    The sample is a pure function of weight, key and clock, so gradients stay bit-identical. Where the reads of a sample
    convert it to different dtypes, under autocast, the converted copies are kept: no mark reaches them.

    Inside an activation checkpoint nothing is marked: what the checkpoint computes again is its own decision.

    Requires the samples of `insert_samples`, with the dtypes of `fold_casts` and the masks of `insert_masks`.

    Args:
        rewrite: the graph; the samples' metadata change.
        backward: ``"save"`` or ``"recompute"``.
    """
    if backward == "recompute":
        outside = sorted(
            (sample for sample in rewrite.samples if sample.module is rewrite.module), key=lambda sample: sample.node
        )
        for group, sample in enumerate(outside, _FIRST_GROUP):
            for node in (sample.node, *sample.masks):
                graphs.mark_recompute(node, group)


def without_marks(rewrite: Rewrite) -> None:
    """Have the samples say that backward keeps them, where the pass is left out: compile caches see this, no marks."""
    for sample in rewrite.samples:
        arguments_of(sample.node).write(sample.node, keep=True)
