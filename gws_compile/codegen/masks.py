"""Inductor's lowerings of ``gws::element_mask`` and ``gws::apply_mask``: elementwise, so that they are fused.

Each element of a group looks at all of it. There is no sort in the code. ``gws::group_mask`` has no lowering: it sorts
a number for each row or column, in eager torch.

Importing this module registers the lowerings; the backend does so before it compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..numerics.float32 import MAGNITUDE
from ..numerics.primitives import Value
from ..numerics.sparsity import rank_in_group
from ..ops.masks import mask_dtype
from ..torch_internals import inductor
from .inductor_primitives import InductorPrimitives

Index = Sequence[Any]


def _lower_element_mask(w: Any, batch_dims: int, over_rows: bool, kept: int, of: int, version: int) -> Any:
    w.realize()  # each element is read again and again
    groups = _Groups(w, batch_dims, over_rows, kept, of)
    if w.get_device().type == "cpu" and not over_rows:
        return groups.among_neighbours()
    return groups.by_position()


class _Groups:
    """The groups of N of M in a weight.

    Args:
        w: the weight.
        batch_dims, over_rows, kept, of: of the operator.
    """

    def __init__(self, w: Any, batch_dims: int, over_rows: bool, kept: int, of: int) -> None:
        self.p = InductorPrimitives()
        self._w, self._batch_dims, self._over_rows, self._kept, self._of = w, batch_dims, over_rows, kept, of
        self._shape = w.get_size()
        self._trailing = self._shape[batch_dims + 1 :]
        self._load = w.make_loader()

    def by_position(self) -> Any:
        """The mask, each element compared with those at the positions 0 to M - 1 of its group."""
        p, of = self.p, self._of
        magnitude: Callable[[Index], Value] = self._magnitude
        if self._w.get_device().type == "cpu" and self._w.get_dtype() != torch.float32:
            # Beside 16-bit values a C++ loop exchanges floats and their bits one by one: once for each is enough.
            stored = self._tensor(self._magnitude, torch.int32, self._shape)
            stored.realize()
            magnitude = stored.make_loader()

        def element(index: Index) -> Value:
            place = self._along(index)
            first = inductor.floordiv(place, of) * of
            position = inductor.ops.index_expr(inductor.modular(place, 1, of), torch.int32)
            return rank_in_group(p, magnitude(index), position, lambda k: magnitude(self._at(index, first + k)), of)

        return self._mask(element)

    def among_neighbours(self) -> Any:
        """The same, each element compared with those at distances up to M - 1, of those that are in its group.

        What is compared then lies one vector behind another, while the positions of a group are gathered one by one:
        in C++ that takes a small part of the time. Magnitudes are stored with a margin in front of each row and behind
        it, so that nothing beyond the buffer is read. What lies in the margin is in no group, whatever it is.
        """
        p, of, edge = self.p, self._of, self._of - 1
        rows = inductor.product(self._shape[: self._batch_dims + 1])
        cols = inductor.product(self._trailing)

        def place_of(index: Index) -> Index:
            row = inductor.flatten(index[: self._batch_dims + 1], self._shape[: self._batch_dims + 1])
            return [row, self._along(index) + edge]

        magnitudes = inductor.scatter(
            self._w.get_device(),
            torch.int32,
            self._magnitude,
            list(self._shape),
            place_of,
            [rows, cols + 2 * edge],
        )
        load = magnitudes.make_loader()
        positions = self._tensor(
            lambda index: inductor.ops.index_expr(inductor.modular(index[0], 1, of), torch.int32), torch.int32, [cols]
        )
        positions.realize()
        table = positions.get_name()  # its own loader computes them anew

        def element(index: Index) -> Value:
            row, here = place_of(index)
            own, position = load([row, here]), inductor.ops.load(table, self._along(index))
            rank: Value = 0
            for distance in range(1, of):
                in_front, behind = (load([row, here + d]) for d in (-distance, distance))
                # As large is enough for one in front.
                larger = p.iselect(p.ilt(p.isub(own, 1), in_front), 1, 0)
                rank = p.iadd(rank, p.iselect(p.ilt(distance - 1, position), larger, 0))
                larger = p.iselect(p.ilt(own, behind), 1, 0)
                rank = p.iadd(rank, p.iselect(p.ilt(position, of - distance), larger, 0))
            return rank

        return self._mask(element)

    def _mask(self, rank: Callable[[Index], Value]) -> Any:
        p, dtype = self.p, mask_dtype(self._w.get_device())

        def element(index: Index) -> Value:
            kept = p.ilt(rank(index), self._kept)
            return kept if dtype == torch.bool else p.iselect(kept, 1, 0)

        return self._tensor(element, dtype, self._shape)

    def _along(self, index: Index) -> Any:
        dims = self._batch_dims
        return index[dims] if self._over_rows else inductor.flatten(index[dims + 1 :], self._trailing)

    def _at(self, index: Index, place: Any) -> Index:
        dims = self._batch_dims
        if self._over_rows:
            return [*index[:dims], place, *index[dims + 1 :]]
        return [*index[: dims + 1], *inductor.unflatten(place, self._trailing)]

    def _magnitude(self, index: Index) -> Value:
        value = inductor.ops.to_dtype(self._load(index), torch.float32)
        return self.p.iand(self.p.float_bits(value), MAGNITUDE)

    def _tensor(self, element: Callable[[Index], Value], dtype: torch.dtype, ranges: Sequence[Any]) -> Any:
        return inductor.pointwise(device=self._w.get_device(), dtype=dtype, value=element, ranges=list(ranges))


def _lower_apply_mask(x: Any, mask: Any, through: Any, version: int) -> Any:
    ops, dtype = inductor.ops, x.get_dtype()
    load, load_mask = x.make_loader(), mask.make_loader()
    sizes, masked = x.get_size(), mask.get_size()

    def element(index: Index) -> Value:
        here = [0 if n == 1 and size != 1 else i for i, n, size in zip(index, masked, sizes, strict=True)]
        kept = load_mask(here)
        kept = kept if mask.get_dtype() == torch.bool else ops.lt(ops.constant(0, torch.int32), kept)
        return ops.where(kept, load(index), ops.constant(0.0, dtype))

    return inductor.pointwise(device=x.get_device(), dtype=dtype, value=element, ranges=list(sizes))


inductor.register_lowering(torch.ops.gws.element_mask.default, _lower_element_mask)
inductor.register_lowering(torch.ops.gws.apply_mask.default, _lower_apply_mask)
