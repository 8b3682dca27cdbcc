"""Who writes: one rank, to which the others bring their shards, and which tells them how it went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from ..torch_internals.distributed import is_sharded, whole_tensor


@dataclass
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
    _gathers: Iterator[torch.Tensor] = field(default_factory=lambda: iter(()))

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

    def gathered(self, tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The whole tensors, one by one, on the CPU, outside autograd."""
        self._gathers = (whole_tensor(tensor.detach()).cpu() for tensor in tensors)
        return self._gathers

    def tell(self, work: Callable[[], object]) -> object:
        """Do the work of the writing rank, and give its result, or its error, to all.

        The work takes all that it has of `gathered`; where it fails, the rest is gathered all the same, since the other
        ranks wait.

        Raises:
            RuntimeError: the writing rank failed; on that rank it is its own error.
        """
        result: object = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
            if self.together:
                for _ in self._gathers:
                    pass
        if self.together:
            told = [(result, None if error is None else f"{type(error).__name__}: {error}")]
            torch.distributed.broadcast_object_list(told, src=0)
            if error is None and told[0][1] is not None:
                raise RuntimeError(f"the export failed on rank 0: {told[0][1]}")
            result = told[0][0]
        if error is not None:
            raise error
        return result
