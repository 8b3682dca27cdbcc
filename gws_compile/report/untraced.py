"""Weights that no traced graph has: listed in the report, with what is known of why."""

from __future__ import annotations

from torch import nn

from ..config import Config
from ..runtime.weight_slots import Slot
from ..torch_internals.dynamo import traces_recurrent_layers
from ..weight_names import first_match
from .records import WeightRecord

_NOT_TRACED = (
    "no traced graph has it: not used in the calls so far, or read by code that runs eagerly behind a graph break "
    "(TORCH_LOGS=graph_breaks shows where)"
)
_RECURRENT = (
    "no traced graph has it: torch does not trace {0} unless torch._dynamo.config.allow_rnn is set, and then it is "
    "rewritten"
)


def is_untraced(slot: Slot) -> bool:
    """Whether a weight stands in a model that is known, and in none of the graphs so far."""
    if slot.graphs or slot.root is None:
        return False
    # Of a model that has gone all is told; a part of one that has been replaced is no weight of it any more.
    return slot.tensor() is not None or (not slot.is_alive() and slot.root() is None)


def is_table(slot: Slot) -> bool:
    """Whether a weight is the table of an embedding layer."""
    return slot.owner_type is not None and issubclass(slot.owner_type, (nn.Embedding, nn.EmbeddingBag))


def untraced_record(slot: Slot, name: str, config: Config) -> WeightRecord:
    """The record of a weight of which `is_untraced` holds.

    Args:
        slot: the weight.
        name: how it is listed.
        config: ``exclude`` is a reason of its own.
    """
    return WeightRecord(
        name=name,
        shape=slot.shape,
        dtype=str(slot.dtype).removeprefix("torch."),
        op="",
        rewritten=False,
        reason=untraced_reason(slot, config),
        fmt="",
        bits=None,
        noise="",
        location="",
    )


def untraced_reason(slot: Slot, config: Config) -> str:
    """Why no graph has a weight, as far as is known."""
    pattern = first_match(slot.path, config.exclude)
    if pattern is not None:
        return f"matches the exclude pattern {pattern!r}"
    if is_table(slot):
        return "embedding table, in no traced graph"
    kind = slot.owner_type
    if kind is not None and issubclass(kind, nn.RNNBase) and not traces_recurrent_layers():
        return _RECURRENT.format(kind.__name__)
    return _NOT_TRACED
