"""The weights of a graph and their uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from gws_compile.numerics.shards import ShardRange
from gws_compile.ops.masks import WeightMask
from gws_compile.settings.operands import ProductSettings
from gws_compile.settings.weight_settings import WeightSettings

from .graph_walk import Place

_META = "gws_weights"


@dataclass
class Read:
    """A use of a weight that is a matrix product or a convolution.

    Attributes:
        node: the reading node, in the graph it stands in (a checkpoint body's, for one inside).
        op: its name, such as ``linear``.
        batch_dims: leading dims of the weight that count matrices; see `gws_compile.numerics.blocks.matrix_shape`.
        location: ``file:line`` of the user's code, empty where Dynamo recorded none.
        gradients: whether gradients flow through it to the weight: they are enabled all along the way from the weight,
            and there is no ``detach`` on it.
        noisy: whether it gets noise, not the cast alone; of `select_weights`.
        sums_over_rows: whether it sums over the rows of the weight's matrices, not over their columns; None where that
            cannot be told.
    """

    node: fx.Node
    op: str
    batch_dims: int
    location: str
    gradients: bool = True
    noisy: bool = False
    sums_over_rows: bool | None = None


@dataclass(frozen=True)
class Use:
    """A use of a weight that is no read.

    Attributes:
        op: the operation's name.
        location: as `Read.location`.
        kind: ``"plain"`` for an operation that is known to multiply by no weight, ``"nested"`` for a higher-order
            operator, ``"storage"`` for one that looks at how the weight lies in memory, ``"unknown"`` for one that the
            passes do not know.
        computes_for: the operation that reads, as its weight, what this one makes of the weight; empty if none.
        operand: of an operation that reads weights, as what it takes this one, such as ``input``; else empty.
    """

    op: str
    location: str
    kind: Literal["plain", "nested", "storage", "unknown"]
    computes_for: str = ""
    operand: str = ""

    def __str__(self) -> str:
        return f"{self.op}, as its {self.operand}" if self.operand else self.op


@dataclass
class Weight:
    """A floating-point or complex parameter of two or more dims, as one graph sees it.

    Attributes:
        place: its placeholder in the outer graph, with the way of its value to everything that uses it.
        position: index of that placeholder among the graph's inputs.
        source: where Dynamo has read it from, such as ``L['self']._modules['fc']._parameters['weight']``.
        names: what globs on its name are matched with: its qualified name relative to the compiled module and, where it
            is another one, that in the outermost module that is being called. Where a function was compiled, also its
            name behind what the function calls the model by, as in ``teacher.fc.weight``.
        shape, dtype, device, trainable: of the parameter; ``trainable`` is its ``requires_grad``.
        shard: the part that this rank holds, where the parameter is a DTensor.
        reads: where it is read.
        embedded: it is also the table of an embedding look-up.
        written: it is written in place.
        other_uses: what uses it otherwise.
        settings: how it is sampled, by its name; of `select_weights`. None for one that a rule leaves alone.
        products: how the other operands are rounded in the products that read it; of `select_weights`.
        trains: whether its graph is one of a training forward, with gradients enabled; of `select_weights`.
        dense_because: why it is not sparse, although a setting says so; empty where there is nothing to say.
        reason: why it is left alone; None while it is to be rewritten.
        may_be_read: whether it is left alone although the graph multiplies by it, or may do so: a custom operator or a
            higher-order one uses it, it is computed with before a read, or its dtype, class or place in memory is in
            the way. Not where a setting says so, nor for a table or any other weight that nothing multiplies by.
    """

    place: Place
    position: int
    source: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    trainable: bool
    shard: ShardRange | None = None
    reads: list[Read] = field(default_factory=list)
    embedded: bool = False
    written: bool = False
    other_uses: list[Use] = field(default_factory=list)
    settings: WeightSettings | None = None
    products: ProductSettings = field(default_factory=ProductSettings)
    trains: bool = False
    dense_because: str = ""
    reason: str | None = None
    may_be_read: bool = False

    @property
    def name(self) -> str:
        """Its qualified name relative to the compiled module."""
        return self.names[0]

    @property
    def node(self) -> fx.Node:
        """Its placeholder."""
        return self.place.node

    @property
    def sampled_as(self) -> WeightSettings:
        """How it is sampled, of a weight that is not left alone."""
        assert self.settings is not None
        return self.settings

    @property
    def noisy(self) -> bool:
        """Whether a read of it gets noise in this graph; others may get the cast alone all the same."""
        return any(read.noisy for read in self.reads)

    @property
    def draws(self) -> bool:
        """Whether anything is drawn with its key: noise, or the rounding of the gradients that come to its products."""
        return self.noisy or (self.trains and self.products.draws)

    @property
    def keyed(self) -> bool:
        """Whether its key and the clock are inputs."""
        return self.draws or self.products.scheduled or (self.mask is not None and self.mask.gradual)

    @property
    def mask(self) -> WeightMask | None:
        """How its mask is computed; None for a dense one."""
        if self.settings is None or self.settings.sparsity is None or not self.reads:
            return None
        return WeightMask(self.settings.sparsity, self.reads[0].batch_dims, bool(self.reads[0].sums_over_rows))

    @property
    def trains_learned(self) -> bool:
        """Whether its graph trains what is learned of it beside its values: widths by the noise, or levels."""
        leveled = self.settings is not None and self.settings.levels is not None
        return self.gradients and self.reason is None if leveled else self.noisy

    @property
    def gradients(self) -> bool:
        """Whether gradients flow to it through a read."""
        return any(read.gradients for read in self.reads)


def keep_weights(gm: fx.GraphModule, weights: list[Weight]) -> None:
    """Leave with a rewritten graph, which is kept, what is known of its weights."""
    gm.meta[_META] = weights


def weights_of(gm: fx.GraphModule) -> list[Weight]:
    """The weights of a rewritten graph.

    Raises:
        RuntimeError: it is none.
    """
    if _META not in gm.meta:
        raise RuntimeError(
            "only a graph that was rewritten has its weights with it: run gws_compile.passes.rewrite first"
        )
    weights: list[Weight] = gm.meta[_META]
    return weights
