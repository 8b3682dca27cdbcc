"""Weights that no traced graph has: listed in the report, with what is known of why."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from .names import clean
from .report import WeightRecord
from .torch_internals import traces_recurrent_layers

_NOT_TRACED = (
    "no traced graph has it: not used in the calls so far, or read by code that runs eagerly behind a graph break "
    "(TORCH_LOGS=graph_breaks shows where)"
)
_RECURRENT = (
    "no traced graph has it: torch does not trace {0} unless torch._dynamo.config.allow_rnn is set, and then it is "
    "rewritten"
)


def unseen_weights(root: nn.Module, is_seen: Callable[[str, nn.Parameter], bool]) -> Iterator[WeightRecord]:
    """The floating-point parameters of two or more dims that are in no graph.

    Args:
        root: the model.
        is_seen: whether a graph has the parameter of this name (as `gws_compile.names.clean` leaves it).
    """
    for name, parameter in root.named_parameters():
        if parameter.ndim < 2 or not parameter.is_floating_point() or is_seen(clean(name), parameter):
            continue
        owner = root.get_submodule(name.rpartition(".")[0])
        untraced = isinstance(owner, nn.RNNBase) and not traces_recurrent_layers()
        yield WeightRecord(
            name=clean(name),
            shape=tuple(parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
            op="",
            rewritten=False,
            reason=_RECURRENT.format(type(owner).__name__) if untraced else _NOT_TRACED,
            fmt="",
            bits=None,
            noise="",
            location="",
        )
