"""Who writes: one rank, to which the others bring their shards, and which tells them how it went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..torch_internals.distributed import is_sharded, whole_tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of one export.

    Tensors that are sharded (DTensors) are gathered one by one, by all ranks together. Where nothing is, ranks do not
    wait for each other: rank 0 alone may be the one that exports.

    Attributes:
        writes: whether this rank writes.
        together: whether ranks hold parts, so that all take part.
    """

    writes: bool
    together: bool

    @staticmethod
    def of(tensors: Iterable[torch.Tensor], *, stage: bool) -> Ranks:
        """The ranks for a model.

        Args:
            tensors: of its state.
            stage: it is a stage of a pipeline, of which each rank has its own.
        """
        together = any(is_sharded(tensor) for tensor in tensors)
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        first = not there or torch.distributed.get_rank() == 0
        return Ranks(writes=first or (stage and not together), together=together)

    def write(self, tensors: Sequence[torch.Tensor], work: Callable[[Iterator[torch.Tensor]], T], otherwise: T) -> T:
        """Have the writing rank do its work, and give its result, or its error, to all that hold parts.

        Args:
            tensors: what ranks gather, in this order.
            work: takes the whole tensors, one by one, on the CPU, outside autograd.
            otherwise: the result of a rank that does not write, where ranks do not wait for each other.

        Raises:
            RuntimeError: the writing rank has failed; on that rank its own error.
        """
        values = (whole_tensor(tensor.detach()).cpu() for tensor in tensors)
        result, error = otherwise, None
        if self.writes:
            try:
                result = work(values)
            except Exception as raised:
                error = raised
        if self.together:
            for _ in values:  # what the others gather too, also where the work has failed
                pass
            told = [(result, None if error is None else f"{type(error).__name__}: {error}")]
            torch.distributed.broadcast_object_list(told, src=0)
            if error is None and told[0][1] is not None:
                raise RuntimeError(f"the export failed on rank 0: {told[0][1]}")
            result = told[0][0]
        if error is not None:
            raise error
        return result
