"""What the passes hand to one another: the weights of a graph and their uses.

A pass reads and writes `weights_of(gm)`, never another pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from gws_compile.sharding import ShardRange

_META = "gws_weights"
_TABLES = "gws_tables"

MATRIX_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the parameters that are listed; `gws_compile.sampling.DTYPES` are those that can be sampled."""


@dataclass
class Read:
    """A use of a weight that is a matrix product or a convolution.

    Attributes:
        node: the reading node, in the graph it stands in (a checkpoint body's, for one inside).
        op: its name, such as ``linear``.
        batch_dims: leading dims of the weight that count matrices; see `gws_compile.sampling.matrix_shape`.
        location: ``file:line`` of the user's code, empty where Dynamo recorded none.
    """

    node: fx.Node
    op: str
    batch_dims: int
    location: str


@dataclass(frozen=True)
class Use:
    """A use of a weight that is no read.

    Attributes:
        op: the operation's name.
        location: as `Read.location`.
        kind: ``"plain"`` for an operation that is known to multiply by no weight, ``"nested"`` for a higher-order
            operator, ``"unknown"`` for one that the passes do not know.
        computes_for: the operation that reads, as its weight, what this one makes of parameters alone; empty if none.
    """

    op: str
    location: str
    kind: Literal["plain", "nested", "unknown"]
    computes_for: str = ""


@dataclass
class Weight:
    """A floating-point parameter of two or more dims, as one graph sees it.

    Attributes:
        node: its placeholder in the outer graph.
        position: index of that placeholder among the graph's inputs.
        name: qualified name relative to the compiled module.
        shape, dtype, device, trainable: of the parameter; ``trainable`` is its ``requires_grad``.
        shard: the part that this rank holds, where the parameter is a DTensor.
        reads: where it is read.
        embedded: it is also the table of an embedding look-up.
        written: it is written in place.
        other_uses: what uses it otherwise.
        reason: why it is left alone; None while it is to be rewritten.
    """

    node: fx.Node
    position: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    trainable: bool
    shard: ShardRange | None = None
    reads: list[Read] = field(default_factory=list)
    embedded: bool = False
    written: bool = False
    other_uses: list[Use] = field(default_factory=list)
    reason: str | None = None


def set_weights(gm: fx.GraphModule, weights: list[Weight]) -> None:
    """Provide the graph's weights to later passes."""
    gm.meta[_META] = weights


def set_tables(gm: fx.GraphModule, is_table: Callable[[Weight], bool]) -> None:
    """Say how to know a weight that another graph looks rows up in."""
    gm.meta[_TABLES] = is_table


def forget_tables(gm: fx.GraphModule) -> None:
    """Drop what `set_tables` said: the graph is kept, and must not keep what the function refers to."""
    gm.meta.pop(_TABLES, None)


def known_table(gm: fx.GraphModule, weight: Weight) -> bool:
    """What `set_tables` says of the weight; no by default."""
    is_table: Callable[[Weight], bool] | None = gm.meta.get(_TABLES)
    return is_table is not None and is_table(weight)


def weights_of(gm: fx.GraphModule) -> list[Weight]:
    """The weights that `find_weight_reads` found.

    Raises:
        RuntimeError: the pass has not run on this graph.
    """
    if _META not in gm.meta:
        raise RuntimeError("this pass needs the graph's weights: run find_weight_reads first")
    weights: list[Weight] = gm.meta[_META]
    return weights
