"""Whether a weight can be as sparse as a setting says."""

from __future__ import annotations

from dataclasses import replace

from gws_compile.numerics.blocks import matrix_shape
from gws_compile.numerics.shards import ShardRange
from gws_compile.ops.masks import WeightMask
from gws_compile.settings.sparsity import KeptElements, Sparsity

from .weights import Weight


def decide_sparsity(weight: Weight) -> None:
    """Have a weight stay dense that cannot be as sparse as a setting says, and say why: `Weight.dense_because`.

    Args:
        weight: one that is sampled.

    Raises:
        ValueError: it is sharded, and groups of its elements, or what they are compared with, lie on several ranks.
    """
    settings = weight.sampled_as
    if settings.sparsity is None:
        return
    whole = weight.shape if weight.shard is None else weight.shard.whole
    weight.dense_because = _why_dense(weight, settings.sparsity, whole) or ""
    if weight.dense_because:
        weight.settings = replace(settings, sparsity=None)
    elif weight.shard is not None:
        _check_masked_shard(weight, weight.shard, settings.sparsity)


def _why_dense(weight: Weight, sparsity: Sparsity, whole: tuple[int, ...]) -> str | None:
    sides = {read.sums_over_rows: read.op for read in weight.reads}
    if None in sides:
        return f"it cannot be told which side of it {sides[None]} sums over"
    if len(sides) > 1:
        return f"{sides[False]} sums over its columns, and {sides[True]} over its rows"
    dims, over_rows = weight.reads[0].batch_dims, True in sides
    _, rows, cols = matrix_shape(whole, dims)
    if isinstance(sparsity, KeptElements):
        summed = rows if over_rows else cols
        return (
            None if summed % sparsity.of == 0 else f"{sparsity} along a side of {summed}, no multiple of {sparsity.of}"
        )
    mask = WeightMask(sparsity, dims, over_rows)
    lines = rows if mask.prunes_rows else whole[dims + 1]
    if lines % sparsity.size:
        return f"groups of {sparsity.size} do not divide its {lines} {sparsity.groups}"
    count = lines // sparsity.size
    pruned = sparsity.count(count, sparsity.stop)
    if 0 < pruned < count:
        return None
    what = f"{count} {sparsity.groups}" if sparsity.size == 1 else f"{count} groups of {sparsity.groups}"
    return f"a share of {sparsity.share:g} of its {what} is {'none' if pruned == 0 else 'all'} of them"


def _check_masked_shard(weight: Weight, shard: ShardRange, sparsity: Sparsity) -> None:
    mask = weight.mask
    assert mask is not None
    if isinstance(sparsity, KeptElements):
        cut = shard.cut_block(mask.batch_dims, (sparsity.of, 1) if mask.over_rows else (1, sparsity.of))
        if cut is not None:
            raise ValueError(
                f"{weight.name}: a shard of shape {shard.local} of the whole weight {shard.whole} cuts through the "
                f"groups of sparsity={str(sparsity)!r}: {cut}. Use another number of ranks, or a rule with "
                "sparsity=None for the weight"
            )
    elif shard.local[mask.batch_dims :] != shard.whole[mask.batch_dims :]:
        raise ValueError(
            f"{weight.name}: this rank holds {shard.local} of the whole weight {shard.whole}, and the norms of "
            f"{sparsity!r} are those of whole {sparsity.groups}, compared over all of a matrix: PrunedGroups are for "
            "weights of which a graph has all (FSDP2 gathers them); give the weight a rule with sparsity=None"
        )
