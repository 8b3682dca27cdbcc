"""Decide which of the weights that were found are rewritten, and say why the others are not."""

from __future__ import annotations

from gws_compile.config import Config
from gws_compile.numerics.scales import needs_block_maximum
from gws_compile.numerics.shards import ShardRange
from gws_compile.ops.sample_weight import DTYPES, MAX_ELEMENTS
from gws_compile.weight_names import first_match

from .rewrite_context import Rewrite
from .weights import Use, Weight


def select_weights(rewrite: Rewrite, *, config: Config) -> None:
    """Set `Weight.reason` on every weight that is to be left alone, and `Weight.noisy` on the others.

    Noise is for weights that are trained: frozen ones, and all of a graph that is traced with gradients disabled, get
    the cast alone.

    Requires the weights of `find_reads`; the graph is not changed.

    Args:
        rewrite: the graph.
        config: ``include`` and ``exclude`` decide by name.

    Raises:
        ValueError: a rank's shard of a weight does not consist of whole blocks.
    """
    for weight in rewrite.weights:
        weight.reason = _reason(weight, config) or weight.reason
    for weight in rewrite.selected:
        weight.noisy = config.noise != "none" and weight.trainable and rewrite.gradients
        if weight.shard is not None:
            _check_shard(weight, weight.shard, config)


def _check_shard(weight: Weight, shard: ShardRange, config: Config) -> None:
    if not needs_block_maximum(config.fmt, config.scale, config.noise):
        return
    cut = shard.cut_block(weight.reads[0].batch_dims, config.block)
    if cut is not None:
        raise ValueError(
            f"{weight.name}: a shard of shape {shard.local} of the whole weight {shard.whole} cuts through a block of "
            f"{config.block}: {cut}. Use a block that divides the shard, another number of ranks, or exclude the weight"
        )


def _reason(weight: Weight, config: Config) -> str | None:
    if not weight.reads:
        return _unread(weight)
    if weight.written:
        return "written in place inside the graph"
    included = config.include is not None and first_match(weight.name, config.include)
    if config.include is not None and not included:
        return f"no include pattern matches ({', '.join(config.include)})"
    pattern = first_match(weight.name, config.exclude)
    if pattern is not None:
        return f"matches the exclude pattern {pattern!r}"
    if weight.embedded and not included:
        return "also an embedding table (tied); name it in include to rewrite its matrix products"
    if weight.dtype not in DTYPES:
        return f"{str(weight.dtype).removeprefix('torch.')} weights are not sampled"
    if any(n == 0 for n in weight.shape):
        return "empty"
    if weight.shard is not None and 0 in weight.shard.local:
        return "no part of it lies on this rank"
    if _elements(weight) > MAX_ELEMENTS:
        return f"more than {MAX_ELEMENTS} elements: its noise would repeat"
    return _computed(weight)


def _computed(weight: Weight) -> str | None:
    for use in weight.other_uses:
        if use.computes_for:
            return f"computed with before {use.computes_for} reads it: {use.op}{_at(use)}"
    return None


def _at(use: Use) -> str:
    return f" at {use.location}" if use.location else ""


def _unread(weight: Weight) -> str:
    if weight.embedded:
        return "embedding look-up"
    if weight.written:
        return "written in place inside the graph"
    if not weight.other_uses:
        return "not used in the graph"
    if computed := _computed(weight):
        return computed
    for use in weight.other_uses:
        if use.kind == "nested":
            return f"inside {use.op}{_at(use)}, a higher-order operator whose body is not rewritten"
        if use.kind == "unknown":
            return (
                f"used by {use.op}{_at(use)}, which gws_compile does not know: please report it with this line; if it "
                "multiplies by the weight, it belongs into READS in gws_compile/passes/operations.py, else into OTHERS"
            )
    uses = ", ".join(dict.fromkeys(use.op for use in weight.other_uses))
    return f"no matrix product or convolution reads it, only: {uses}"


def _elements(weight: Weight) -> int:
    total = 1
    for n in weight.shape:
        total *= n
    return total
