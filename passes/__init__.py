"""The graph passes, one file each, and the order in which they run.

A pass is a function ``(gm, example_inputs, *, config) -> gm``. It says in its docstring what it requires of the graph
and what it provides; `gws_compile.passes.weights` is all they share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from gws_compile.config import Config
from gws_compile.torch_internals import copy_graph_module

from .convert import convert_samples
from .find import find_weight_reads
from .recompute import recompute_in_backward
from .sample import InputLayout, LearnedInput, input_layout, is_noisy, sample_weights
from .select import select_weights
from .weights import Read, Weight, forget_tables, set_tables, weights_of

__all__ = [
    "PASSES",
    "InputLayout",
    "LearnedInput",
    "Read",
    "Weight",
    "input_layout",
    "is_noisy",
    "rewrite",
    "weights_of",
]

PASSES: tuple[Callable[..., fx.GraphModule], ...] = (
    find_weight_reads,
    select_weights,
    sample_weights,
    convert_samples,
    recompute_in_backward,
)


def rewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    config: Config,
    is_table: Callable[[Weight], bool] = lambda weight: False,
) -> fx.GraphModule:
    """Run every pass on a copy of Dynamo's graph, which stays as it is.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        config: the settings.
        is_table: whether an earlier graph looks rows up in a weight: where a graph break, or DDP's graph splitting,
            lies between embedding and head, the head's graph cannot tell that its weight is tied.
    """
    gm = copy_graph_module(gm)
    set_tables(gm, is_table)
    for run in PASSES:
        gm = run(gm, example_inputs, config=config)
    forget_tables(gm)
    return gm
