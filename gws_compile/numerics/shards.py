"""Weights of which every rank holds a part (DTensor): each rank samples its part of the whole weight's sample.

The noise of an element is that of its index in the whole weight. The maximum of a block that is as long as the weight
is that over the ranks among which the block lies; any other block must lie on one rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .blocks import Block, clamped, matrix_shape


@dataclass(frozen=True)
class ShardRange:
    """The part of a weight that a rank holds.

    Attributes:
        whole: shape of the weight.
        local: shape of the part.
        offset: index, in the whole weight, of the part's first element.
        empty_somewhere: some rank has no part.
    """

    whole: tuple[int, ...]
    local: tuple[int, ...]
    offset: tuple[int, ...]
    empty_somewhere: bool = False

    def cut_block(self, batch_dims: int, block: Block) -> str | None:
        """Why a block that is not as long as the weight lies on several ranks; None if none does.

        Args:
            batch_dims: leading dims that count matrices; see `gws_compile.numerics.blocks.matrix_shape`.
            block: block shape.
        """
        rows = (self.offset[batch_dims], self.local[batch_dims], self.whole[batch_dims])
        # Columns are the dims behind the rows, flattened: the part is one range of them if only the first is cut.
        first = batch_dims + 1
        inner = math.prod(self.whole[first + 1 :])
        columns = (self.offset[first] * inner, self.local[first] * inner, self.whole[first] * inner)
        sides = clamped(block, rows[2], columns[2])
        if self.local[first + 1 :] != self.whole[first + 1 :] and sides[1] < columns[2]:
            return f"dim {first + 1} or a later one is sharded, inside the columns of its blocks"
        for what, (start, size, total), side in zip(("rows", "columns"), (rows, columns), sides, strict=True):
            if (side < total and start % side) or (side < total and start + size < total and (start + size) % side):
                return f"{what} {start} to {start + size} of {total} lie here, and a block has {side}"
        return None

    def spread_dims(self, batch_dims: int, block: Block) -> tuple[int, ...]:
        """The dims of the weight that are cut inside of its blocks, since these are as long as the weight.

        Args:
            batch_dims, block: as in `cut_block`, which has found nothing.
        """
        _, rows, cols = matrix_shape(self.whole, batch_dims)
        sides = clamped(block, rows, cols)
        long = [sides[0] == rows] + [sides[1] == cols] * (len(self.whole) - batch_dims - 1)
        dims = range(batch_dims, len(self.whole))
        return tuple(dim for dim, spans in zip(dims, long, strict=True) if spans and self.local[dim] < self.whole[dim])


def element_index(
    local: Sequence[int], whole: Sequence[int], offset: Sequence[int], device: torch.device
) -> torch.Tensor:
    """int32, shape ``local``: each element's row-major index in the whole weight, mod 2**32."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for size, count, start in zip(whole, local, offset, strict=True):
        total = total[..., None] * size + torch.arange(start, start + count, device=device)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def from_local_like(local: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The DTensor whose part on this rank is ``local``, placed as ``weight`` is; its gradient comes back placed so."""
    from torch.distributed.tensor import DTensor

    assert isinstance(weight, DTensor)
    return DTensor.from_local(
        local, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
