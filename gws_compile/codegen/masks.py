"""Inductor's lowerings of ``gws::element_mask`` and ``gws::apply_mask``: elementwise, so that they are fused.

Each element of a group looks at all of it. There is no sort in the code. ``gws::group_mask`` has no lowering: it sorts
a number for each row or column, in eager torch.

Importing this module registers the lowerings; the backend does so before it compiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..numerics.float32 import MAGNITUDE
from ..numerics.primitives import Value
from ..numerics.sparsity import rank_in_group
from ..ops import masks  # noqa: F401  (registers the operators)
from ..torch_internals import inductor
from .inductor_primitives import InductorPrimitives

Index = Sequence[Any]


def _lower_element_mask(w: Any, batch_dims: int, over_rows: bool, kept: int, of: int, version: int) -> Any:
    p, shape = InductorPrimitives(), w.get_size()
    trailing = shape[batch_dims + 1 :]
    w.realize()  # each element is read again and again
    load = w.make_loader()

    def along(index: Index) -> Any:
        return index[batch_dims] if over_rows else inductor.flatten(index[batch_dims + 1 :], trailing)

    def at(index: Index, place: Any) -> Index:
        if over_rows:
            return [*index[:batch_dims], place, *index[batch_dims + 1 :]]
        return [*index[: batch_dims + 1], *inductor.unflatten(place, trailing)]

    def magnitude(index: Index) -> Value:
        return p.iand(p.float_bits(inductor.ops.to_dtype(load(index), torch.float32)), MAGNITUDE)

    def element(index: Index) -> Value:
        place = along(index)
        first = inductor.floordiv(place, of) * of
        position = inductor.ops.index_expr(inductor.modular(place, 1, of), torch.int32)
        rank = rank_in_group(p, magnitude(index), position, lambda k: magnitude(at(index, first + k)), of)
        return p.ilt(rank, kept)

    return inductor.pointwise(device=w.get_device(), dtype=torch.bool, value=element, ranges=list(shape))


def _lower_apply_mask(x: Any, mask: Any, through: Any, version: int) -> Any:
    ops, dtype = inductor.ops, x.get_dtype()
    load, load_mask = x.make_loader(), mask.make_loader()
    sizes, masked = x.get_size(), mask.get_size()

    def element(index: Index) -> Value:
        here = [0 if n == 1 and size != 1 else i for i, n, size in zip(index, masked, sizes, strict=True)]
        return ops.where(load_mask(here), load(index), ops.constant(0.0, dtype))

    return inductor.pointwise(device=x.get_device(), dtype=dtype, value=element, ranges=list(sizes))


inductor.register_lowering(torch.ops.gws.element_mask.default, _lower_element_mask)
inductor.register_lowering(torch.ops.gws.apply_mask.default, _lower_apply_mask)
