"""Where a report gets its rows: records of what the passes found in graphs; one for what several graphs say alike."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from ..config import Config
from ..numerics.blocks import matrix_shape
from ..passes import Read, Rewrite, Weight
from ..settings.weight_settings import WeightSettings
from ..torch_internals.dynamo import compilation
from ..torch_internals.graphs import graph_break
from ..torch_internals.stack_trace import location_of, source_of, without_wrappers
from .records import GraphBreak, GraphRecord, ReadRecord, WeightRecord


def weight_record(weight: Weight, config: Config) -> WeightRecord:
    """The record of a weight of a rewritten graph.

    Args:
        weight: as the passes left it.
        config: what the graph was rewritten with.
    """
    rewritten = weight.reason is None
    settings = weight.sampled_as if rewritten else None
    noisy = weight.noisy
    rule = config.rule_of(weight.names)
    return WeightRecord(
        name=weight.name,
        shape=weight.shape,
        dtype=str(weight.dtype).removeprefix("torch."),
        op=", ".join(dict.fromkeys(read.op for read in weight.reads)),
        rewritten=rewritten,
        reason=weight.reason or "",
        fmt="" if settings is None else settings.name,
        bits=config.bits_at(0, settings) if settings is not None and noisy and settings.learned is None else None,
        noise="" if settings is None else settings.noise if noisy else "none",
        block="" if settings is None else settings.block_text,
        scale="" if settings is None else settings.scale or "none",
        rule="" if rule is None else rule.text,
        stored_bytes=None if settings is None or settings.learned is not None else _stored_bytes(weight, settings),
        location=weight.reads[0].location if weight.reads else "",
        reads=tuple(map(_read_record, weight.reads)),
        sparsity="" if settings is None or settings.sparsity is None else str(settings.sparsity),
        dense_because=weight.dense_because,
    )


def _stored_bytes(weight: Weight, settings: WeightSettings) -> int:
    return settings.stored_bytes(*matrix_shape(weight.shape, weight.reads[0].batch_dims))


def _read_record(read: Read) -> ReadRecord:
    source = source_of(read.node)
    return ReadRecord(read.op, source.location, source.code, source.stack)


def graph_record(number: int, gm: fx.GraphModule, before: str, rewritten: Rewrite) -> GraphRecord:
    """The record of a graph, made while Dynamo compiles it.

    Args:
        number: from 0, in the order of tracing.
        gm: as Dynamo gave it.
        before: its readable code.
        rewritten: as it was rewritten.
    """
    compile_id, recompiled = compilation()
    ended = graph_break(gm)
    stacks = (source_of(node).stack for node in gm.graph.nodes)
    return GraphRecord(
        number=number,
        compile_id=compile_id,
        location=next((without_wrappers(stack)[0] for stack in stacks if stack), ""),
        gradients=rewritten.gradients,
        graph_break=None if ended is None else GraphBreak(ended[0], location_of(ended[1])),
        recompiled=recompiled,
        before=before,
        graph=rewritten.module,
    )


def merged(records: Iterable[WeightRecord]) -> tuple[WeightRecord, ...]:
    """One record for a weight that several graphs treat alike; with noise, where it is sampled in one of them."""
    found: dict[tuple[object, ...], WeightRecord] = {}
    for record in records:
        key = (record.name, record.shape, record.rewritten, record.reason)
        known = found.get(key)
        if known is None or (known.noise == "none" and record.noise not in ("", "none")):
            found[key] = record
    return tuple(found.values())


def all_breaks(graphs: Iterable[GraphRecord], others: Iterable[GraphBreak]) -> tuple[GraphBreak, ...]:
    """The breaks that graphs end in, and others, each once."""
    ends = (graph.graph_break for graph in graphs)
    return tuple(dict.fromkeys([*(end for end in ends if end is not None), *others]))
