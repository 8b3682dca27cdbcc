"""Weights that no traced graph has: listed in the report, with what is known of why."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from ..config import Config
from ..torch_internals.dynamo import traces_recurrent_layers
from ..weight_names import clean, first_match
from .records import WeightRecord

_NOT_TRACED = (
    "no traced graph has it: not used in the calls so far, or read by code that runs eagerly behind a graph break "
    "(TORCH_LOGS=graph_breaks shows where)"
)
_RECURRENT = (
    "no traced graph has it: torch does not trace {0} unless torch._dynamo.config.allow_rnn is set, and then it is "
    "rewritten"
)


def untraced_parameters(
    root: nn.Module, is_traced: Callable[[str, nn.Parameter], bool]
) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of two or more dims that are in no graph, with their names.

    Args:
        root: the model.
        is_traced: whether a graph has the parameter of this name (as `gws_compile.weight_names.clean` leaves it).
    """
    for name, parameter in ((clean(n), p) for n, p in root.named_parameters()):
        if parameter.ndim >= 2 and not is_traced(name, parameter):
            yield name, parameter


def untraced_records(
    root: nn.Module, config: Config, is_traced: Callable[[str, nn.Parameter], bool]
) -> Iterator[WeightRecord]:
    """The records of the floating-point ones among `untraced_parameters`.

    Args:
        root: the model.
        config: ``exclude`` is a reason of its own.
        is_traced: see `untraced_parameters`.
    """
    for name, parameter in untraced_parameters(root, is_traced):
        if parameter.is_floating_point():
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
