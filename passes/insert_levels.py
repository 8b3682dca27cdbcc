"""What `insert_samples` puts in front of a weight's reads where its format is a table of levels that are trained."""

from __future__ import annotations

import torch
from torch import fx

from gws_compile.config import Config
from gws_compile.levels.arguments import LevelsArguments
from gws_compile.numerics.blocks import block_argument
from gws_compile.torch_internals.fake_tensors import fake_like
from gws_compile.torch_internals.graphs import add_placeholder, example_value

from .weights import Weight


def add_levels(gm: fx.GraphModule, weight: Weight, number: int) -> fx.Node:
    """An input for the levels of a weight, float32, (levels,)."""
    levels = weight.sampled_as.levels
    assert levels is not None
    parameter = torch.empty(len(levels.table), dtype=torch.float32, device=weight.device, requires_grad=True)
    return add_placeholder(gm.graph, f"gws_levels_{number}", fake_like(parameter, example_value(weight.node)))


def insert_cast(graph: fx.Graph, weight: Weight, held: fx.Node, levels: fx.Node | None, config: Config) -> fx.Node:
    """Cast a weight where the graph inserts nodes now.

    Before::

        linear(x, weight, bias)

    After::

        cast_to_levels = gws.cast_to_levels(weight, gws_levels_0, [-1.0, 0.0, 1.0], 0, [32, 32], 'amax', ...)
        linear(x, cast_to_levels, bias)

    Args:
        graph: the graph, or a checkpoint's body.
        weight: the weight.
        held: its node there.
        levels: the input of its levels there; None of a frozen weight, whose levels are those of its settings.
        config: ``backward``.
    """
    settings = weight.sampled_as
    assert settings.levels is not None
    given = LevelsArguments(
        w=held,
        levels=levels,
        table=list(settings.levels.table),
        batch_dims=weight.reads[0].batch_dims,
        block=block_argument(settings.block),
        scale=settings.scale or "",
        keep=config.backward == "save",
    )
    return graph.create_node("call_function", torch.ops.gws.cast_to_levels.default, given.call(), name="cast_to_levels")
