"""Weights that no traced graph has: listed in the report, with what is known of why."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from .config import Config
from .names import clean, first_match
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


def unseen_weights(
    root: nn.Module, config: Config, is_seen: Callable[[str, nn.Parameter], bool]
) -> Iterator[WeightRecord]:
    """The floating-point parameters of two or more dims that are in no graph.

    Args:
        root: the model.
        config: ``exclude`` is a reason of its own.
        is_seen: whether a graph has the parameter of this name (as `gws_compile.names.clean` leaves it).
    """
    for name, parameter in ((clean(n), p) for n, p in root.named_parameters()):
        if parameter.ndim >= 2 and parameter.is_floating_point() and not is_seen(name, parameter):
            yield WeightRecord(
                name=name,
                shape=tuple(parameter.shape),
                dtype=str(parameter.dtype).removeprefix("torch."),
                op="",
                rewritten=False,
                reason=_reason(name, _owner(root, parameter), config),
                fmt="",
                bits=None,
                noise="",
                location="",
            )


def _owner(root: nn.Module, parameter: nn.Parameter) -> nn.Module:
    return next(m for m in root.modules() if any(p is parameter for p in m.parameters(recurse=False)))


def _reason(name: str, owner: nn.Module, config: Config) -> str:
    pattern = first_match(name, config.exclude)
    if pattern is not None:
        return f"matches the exclude pattern {pattern!r}"
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding table, in no traced graph"
    if isinstance(owner, nn.RNNBase) and not traces_recurrent_layers():
        return _RECURRENT.format(type(owner).__name__)
    return _NOT_TRACED
