"""Decide which of the weights that were found are rewritten, and say why the others are not."""

from __future__ import annotations

from dataclasses import replace

from gws_compile.config import Config
from gws_compile.numerics.scales import needs_block_maximum
from gws_compile.numerics.shards import ShardRange
from gws_compile.ops.sample_weight import DTYPES, MAX_ELEMENTS
from gws_compile.settings.weight_settings import WeightSettings
from gws_compile.weight_names import first_match

from .rewrite_context import Rewrite
from .sparse_weights import decide_sparsity
from .weight_maxima import spread_dims
from .weights import Use, Weight

_NOTHING_HERE = "no part of it lies on this rank"


def select_weights(rewrite: Rewrite, *, config: Config) -> None:
    """Say how each weight is sampled, `Weight.settings`, or why not, `Weight.reason`; and which reads get noise.

    Noise is for reads by which a weight is trained: frozen weights get the cast alone, and so does a read through which
    no gradient flows to its weight.

    Requires the weights of `find_reads`; the graph is not changed.

    Args:
        rewrite: the graph.
        config: ``include``, ``exclude`` and ``rules`` decide by name.

    Raises:
        ValueError: a block of a sharded weight lies on several ranks, and is not as long as the weight; or what its
            mask is computed from does; or a sharded weight is to be cast to levels that are trained.
    """
    for weight in rewrite.weights:
        weight.settings = _along(weight, config.settings_of(weight.names), config)
        weight.reason, weight.may_be_read = _judge(weight, config)
    for weight in rewrite.weights:
        if weight.shard is not None and weight.settings is not None and weight.reads:
            _check_ranks(weight, weight.shard, weight.settings)
    for weight in rewrite.selected:
        weight.products, weight.trains = config.products, rewrite.gradients
        decide_sparsity(weight)
        for read in weight.reads:
            read.noisy = weight.sampled_as.noise != "none" and weight.trainable and read.gradients
        if weight.shard is not None:
            _check_shard(weight, weight.shard, weight.sampled_as)


def _along(weight: Weight, settings: WeightSettings | None, config: Config) -> WeightSettings | None:
    """The settings with their block turned, where it is to run along what is summed over, and that is the rows."""
    if settings is None or settings.learned is not None or not config.products.rounds or not weight.reads:
        return settings
    rows, cols = settings.block
    return replace(settings, block=(cols, rows)) if weight.reads[0].sums_over_rows else settings


def _check_ranks(weight: Weight, shard: ShardRange, settings: WeightSettings) -> None:
    if not shard.empty_somewhere or weight.reason not in (None, _NOTHING_HERE):
        return
    if spread_dims(shard, weight.reads[0].batch_dims, settings):
        raise ValueError(
            f"{weight.name}: some ranks hold no part of the weight of shape {shard.whole}, whose maxima are those over "
            f"all ranks (block {settings.block}, scale {settings.scale!r}): use another number of ranks, another block "
            "or scale, or exclude the weight"
        )


def _check_shard(weight: Weight, shard: ShardRange, settings: WeightSettings) -> None:
    if settings.levels is not None:
        raise ValueError(
            f"{weight.name}: fmt=Levels(...) trains levels of whole weights, and of this DTensor each rank has a part, "
            f"{shard.local} of {shard.whole}. Give it another format by a rule, or exclude it"
        )
    if not needs_block_maximum(settings.fmt, settings.scale, settings.noise):
        return
    cut = shard.cut_block(weight.reads[0].batch_dims, settings.block)
    if cut is not None:
        raise ValueError(
            f"{weight.name}: a shard of shape {shard.local} of the whole weight {shard.whole} cuts through a block of "
            f"{settings.block}: {cut}. Use a block that divides the shard, another number of ranks, or exclude the "
            "weight"
        )


def _judge(weight: Weight, config: Config) -> tuple[str | None, bool]:
    """Why a weight is left alone, and whether the graph may multiply by it all the same."""
    untouched = _untouched(weight)
    if untouched is not None:
        return untouched, False
    unwanted = _unwanted(weight, config)
    if unwanted is not None:
        return unwanted, False
    reason = _in_the_way(weight)
    return reason, reason is not None


def _untouched(weight: Weight) -> str | None:
    """Why nothing multiplies by a weight, where that is certain."""
    if weight.reads or any(use.kind != "plain" for use in weight.other_uses) or _computed(weight):
        return None
    if weight.embedded:
        return "embedding look-up"
    if weight.written:
        return "written in place inside the graph"
    if not weight.other_uses:
        return "not used in the graph"
    if weight.reason is not None:  # of its class, whose operations may do anything
        return None
    uses = ", ".join(dict.fromkeys(map(str, weight.other_uses)))
    return f"no matrix product or convolution reads it, only: {uses}"


def treatment_of(names: tuple[str, ...], config: Config) -> tuple[str | None, WeightSettings | None]:
    """What a weight's names alone decide: why it is left alone, None where nothing says so; and how it is sampled.

    Args:
        names: `Weight.names`.
        config: the settings.
    """
    reason = _reason_of_name(names, config)
    return reason, config.settings_of(names) if reason is None else None


def _reason_of_name(names: tuple[str, ...], config: Config) -> str | None:
    if config.include is not None and not first_match(names, config.include):
        return f"no include pattern matches ({', '.join(config.include)})"
    pattern = first_match(names, config.exclude)
    if pattern is not None:
        return f"matches the exclude pattern {pattern!r}"
    rule = config.rule_of(names)
    return f"the rule {rule.text!r} leaves it alone" if rule is not None and rule.settings is None else None


def _unwanted(weight: Weight, config: Config) -> str | None:
    """Why a weight is left alone by its name or its nature, with no loss."""
    named = _reason_of_name(weight.names, config)
    if named is not None:
        return named
    included = config.include is not None
    if weight.embedded and not included:
        return "also an embedding table (tied); name it in include to rewrite its matrix products"
    if any(n == 0 for n in weight.shape):
        return "empty"
    if weight.shard is not None and 0 in weight.shard.local:
        return _NOTHING_HERE
    return None


def _in_the_way(weight: Weight) -> str | None:
    """Why a weight cannot be sampled that is, or may be, multiplied by."""
    if weight.written:
        return "written in place inside the graph"
    if weight.reason is not None:
        return weight.reason
    for use in weight.other_uses:
        if use.kind == "storage":
            return f"{use.op}{_at(use)} looks at how it lies in memory, where a sample lies in another way"
    if not weight.reads:
        return _computed(weight) or _unseen(weight)
    if weight.dtype not in DTYPES:
        return f"{str(weight.dtype).removeprefix('torch.')} weights are not sampled"
    if _elements(weight) > MAX_ELEMENTS:
        return f"more than {MAX_ELEMENTS} elements: its noise would repeat"
    return _computed(weight)


def _computed(weight: Weight) -> str | None:
    if not weight.reads and _elements(weight) == 1:  # a gain is a number
        return None
    for use in weight.other_uses:
        if use.computes_for:
            return f"computed with before {use.computes_for} reads it: {use.op}{_at(use)}"
    return None


def _unseen(weight: Weight) -> str | None:
    """What uses a weight that is not looked into, or not known."""
    for use in weight.other_uses:
        if use.kind == "nested":
            return f"inside {use.op}{_at(use)}, a higher-order operator whose body is not rewritten"
        if use.kind == "unknown":
            return (
                f"used by {use.op}{_at(use)}, which gws_compile does not know: please report it with this line; if it "
                "multiplies by the weight, it belongs into READS in gws_compile/passes/operations.py, else into OTHERS"
            )
    return None


def _at(use: Use) -> str:
    return f" at {use.location}" if use.location else ""


def _elements(weight: Weight) -> int:
    total = 1
    for n in weight.shape:
        total *= n
    return total
