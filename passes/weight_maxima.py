"""Which maxima of a sharded weight are those over several ranks."""

from __future__ import annotations

from gws_compile.numerics.blocks import Block
from gws_compile.numerics.scales import needs_block_maximum
from gws_compile.numerics.shards import ShardRange
from gws_compile.settings.weight_settings import WeightSettings


def maxima_of(settings: WeightSettings) -> tuple[Block, bool]:
    """Of which blocks a sample has to know maxima that may lie on several ranks; and whether over what is finite alone.

    The scale ``"nvfp4"`` has a level for the whole matrix.
    """
    return ((None, None), True) if settings.scale == "nvfp4" else (settings.block, False)


def spread_dims(shard: ShardRange, batch_dims: int, settings: WeightSettings) -> tuple[int, ...]:
    """The dims of a weight over which ranks have to compute maxima together; all ranks of the weight agree on them."""
    if not needs_block_maximum(settings.fmt, settings.scale, settings.noise):
        return ()
    return shard.spread_dims(batch_dims, maxima_of(settings)[0])
