"""The inputs that a rewritten graph takes behind its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gws_compile.numerics.blocks import Block
from gws_compile.numerics.shards import ShardRange
from gws_compile.settings.levels import Levels


@dataclass(frozen=True)
class InputLayout:
    """The inputs that the rewritten graph takes behind its own.

    For each device: an int32 (2,) key of each weight and an int32 (5,) clock, in this order. Then the parameters of
    learned widths, and behind them those of levels.

    Attributes:
        positions: per device, the input positions of the weights that the keys are of.
        names: per device, those weights' qualified names.
        trainable: input position, name and ``requires_grad`` of each rewritten weight, where noise depends on it.
        drawing: input positions of the weights with whose keys something is drawn.
        training: whether a call is a training forward of which a draw's number is needed.
        learned: the weights whose widths, or levels, are inputs, in this order.
    """

    positions: dict[torch.device, tuple[int, ...]] = field(default_factory=dict)
    names: dict[torch.device, tuple[str, ...]] = field(default_factory=dict)
    trainable: tuple[tuple[int, str, bool], ...] = ()
    drawing: frozenset[int] = frozenset()
    training: bool = False
    learned: tuple[LearnedInput, ...] = ()


@dataclass(frozen=True)
class LearnedInput:
    """A weight whose bit widths, or levels, the graph takes as an input.

    Attributes:
        position: input position of the weight.
        name: its qualified name.
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        block: shape of its blocks.
        shard: the part that this rank holds, where the weight is a DTensor.
        levels: the table that its levels began as; None where its widths are the input.
    """

    position: int
    name: str
    batch_dims: int
    block: Block
    shard: ShardRange | None
    levels: Levels | None = None
