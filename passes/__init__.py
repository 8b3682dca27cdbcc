"""The graph passes, one file each, in the order in which they run.

    find_reads      lists the graph's weights, and follows each to what uses it        changes nothing
    select_weights  says how each is sampled, or why it is left alone             changes nothing
    insert_samples  puts ``gws::sample_weight`` between a weight and its reads         new nodes, new inputs
                    (of trained levels ``gws::cast_to_levels``, see `insert_levels`)
    fold_casts      has a sample come in the dtype that its reads convert it to        the samples' arguments
    insert_masks    has what a sparse weight does not keep be zero, in front of a sample and behind it     new nodes
    mark_recompute  marks the samples that backward is to draw again                   the samples' metadata
    round_attention takes attention apart and rounds what it multiplies                new nodes, a clock

The graph of an optimizer's step is another one, with a pass of its own: `passes.round_updates`.

What weights are multiplied with is rounded later, forward and backward, in AOTAutograd's graph: `passes.products`.

A pass is a function of a `Rewrite`, the graph with what is known of it, and of settings of its own, which are bound
when it is put on the list, `passes_of`. It says in its docstring what it requires and what it provides. Passes know
nothing of one another; shared by them are

    rewrite_context `Rewrite`, what they hand to one another       weights           `Weight` and its uses
    graph_walk      views and checkpoint bodies                    input_layout      the inputs that are added
    operations      what an operation does with a weight           parameter_constants  what is computed of parameters
    runner          runs them, timed, logged and traced              weight_maxima     maxima over several ranks
    sparse_weights  whether a weight can be sparse
    sample_nodes    the nodes of samples, and their arguments
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import fx

from gws_compile.config import Config

from .attention import round_attention
from .find_reads import find_reads
from .fold_casts import fold_casts
from .graph_walk import samples
from .input_layout import InputLayout, LearnedInput
from .insert_masks import insert_masks
from .insert_samples import insert_samples, without_samples
from .mark_recompute import mark_recompute, without_marks
from .rewrite_context import AttentionUse, Rewrite
from .runner import SKIP_VARIABLE, Pass, run
from .select_weights import select_weights, treatment_of
from .weights import Read, Weight, keep_weights, weights_of

__all__ = [
    "SKIP_VARIABLE",
    "AttentionUse",
    "InputLayout",
    "LearnedInput",
    "Pass",
    "Read",
    "Rewrite",
    "Weight",
    "passes_of",
    "rewrite",
    "samples",
    "treatment_of",
    "weights_of",
]


def passes_of(
    config: Config,
    *,
    names: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    is_table: Callable[[Weight], bool] = lambda weight: False,
) -> tuple[Pass, ...]:
    """The passes in their order, with their settings bound.

    Args:
        config: the settings of a backend.
        names: `Weight.names` of the graph's weights by their sources, where they are known.
        is_table: whether an earlier graph looks rows up in a weight: where a graph break, or DDP's graph splitting,
            lies between embedding and head, the head's graph cannot tell that its weight is tied.
    """
    return (
        Pass(find_reads, {"names": names, "is_table": is_table}),
        Pass(select_weights, {"config": config}),
        Pass(insert_samples, {"config": config}, without=without_samples),
        Pass(fold_casts, {}, without=lambda rewrite: None),
        Pass(insert_masks, {}),
        Pass(mark_recompute, {"backward": config.backward}, without=without_marks),
        Pass(
            round_attention,
            {
                "attention": config.attention,
                "scheduled": config.schedule is not None and config.schedule.attention != (0, None),
            },
            without=lambda rewrite: None,
        ),
    )


def rewrite(
    gm: fx.GraphModule,
    config: Config,
    *,
    number: int = 0,
    names: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    is_table: Callable[[Weight], bool] = lambda weight: False,
) -> Rewrite:
    """Run every pass on a copy of Dynamo's graph, which stays as it is.

    Args:
        gm: the graph, while it is traced.
        config: the settings.
        number: of the graph among the backend's, for log and trace.
        names, is_table: see `passes_of`.
    """
    rewritten = Rewrite.of(gm)
    run(passes_of(config, names=names, is_table=is_table), rewritten, number)
    keep_weights(rewritten.module, rewritten.weights)
    return rewritten
