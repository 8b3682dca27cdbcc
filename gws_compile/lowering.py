"""Inductor's lowering of ``gws::sample_weight``: the arithmetic of `noise` and `cast` as loop-level code.

Two loops per weight: a reduction for the block maxima, which Inductor stores (1/1024 of the weight's elements), and a
pointwise one, which fuses with whatever reads the sampled weight. The pointwise loop runs over the weight's own index,
with the block maximum read at the divided index: written over (block row, row, block column, column) instead, Inductor
keeps a float32 copy of the result.

Importing this module registers the lowering; the backend does so before it compiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .cast import cast, needs_block_maximum
from .formats import FloatFormat
from .noise import add_noise, random_word
from .primitives import Primitives, Value
from .sampling import matrix_shape
from .torch_internals import inductor


class InductorPrimitives:
    """`Primitives` on the values of an Inductor loop body."""

    def __init__(self) -> None:
        self._ops = inductor().ops

    def _int(self, x: Value) -> Value:
        return self._ops.constant(x, torch.int32) if isinstance(x, int) else x

    def _float(self, x: Value) -> Value:
        return self._ops.constant(x, torch.float32) if isinstance(x, float) else x

    def iadd(self, x: Value, y: Value) -> Value:
        return self._ops.add(self._int(x), self._int(y))

    def isub(self, x: Value, y: Value) -> Value:
        return self._ops.sub(self._int(x), self._int(y))

    def imul(self, x: Value, y: Value) -> Value:
        return self._ops.mul(self._int(x), self._int(y))

    def iand(self, x: Value, y: Value) -> Value:
        return self._ops.bitwise_and(self._int(x), self._int(y))

    def ior(self, x: Value, y: Value) -> Value:
        return self._ops.bitwise_or(self._int(x), self._int(y))

    def ixor(self, x: Value, y: Value) -> Value:
        return self._ops.bitwise_xor(self._int(x), self._int(y))

    def ishr(self, x: Value, count: int) -> Value:
        # Signed integers shift arithmetically; the mask removes the copies of the sign.
        return self.iand(self._ops.bitwise_right_shift(x, self._int(count)), 0xFFFFFFFF >> count)

    def imin(self, x: Value, y: Value) -> Value:
        return self._ops.minimum(self._int(x), self._int(y))

    def imax(self, x: Value, y: Value) -> Value:
        return self._ops.maximum(self._int(x), self._int(y))

    def ilt(self, x: Value, y: Value) -> Value:
        return self._ops.lt(self._int(x), self._int(y))

    def iselect(self, mask: Value, x: Value, y: Value) -> Value:
        return self._ops.where(mask, self._int(x), self._int(y))

    def fadd(self, x: Value, y: Value) -> Value:
        return self._ops.add(self._float(x), self._float(y))

    def fsub(self, x: Value, y: Value) -> Value:
        return self._ops.sub(self._float(x), self._float(y))

    def fmul(self, x: Value, y: Value) -> Value:
        return self._ops.mul(self._float(x), self._float(y))

    def fselect(self, mask: Value, x: Value, y: Value) -> Value:
        return self._ops.where(mask, self._float(x), self._float(y))

    def to_float(self, x: Value) -> Value:
        return self._ops.to_dtype(x, torch.float32, src_dtype=torch.int32)

    def float_bits(self, x: Value) -> Value:
        return self._ops.to_dtype_bitcast(x, torch.int32, torch.float32)

    def bits_float(self, x: Value) -> Value:
        return self._ops.to_dtype_bitcast(x, torch.float32, torch.int32)


def _matrix_index(index: Sequence[Any], shape: Sequence[Any], batch_dims: int) -> tuple[Any, Any, Any]:
    """Index of an element in the weight's own dims -> (matrix, row, column)."""

    def linear(dims: slice) -> Any:
        total: Any = 0
        for i, n in zip(index[dims], shape[dims], strict=True):
            total = total * n + i
        return total

    return linear(slice(0, batch_dims)), index[batch_dims], linear(slice(batch_dims + 1, None))


def _block_maximum(w: Any, batch_dims: int, block: Sequence[int]) -> Any:
    """The reduction: float32 (matrices, block rows, block columns); see `sampling.block_maximum`."""
    ind = inductor()
    ops, shape = ind.ops, w.get_size()
    matrices, rows, cols = matrix_shape(shape, batch_dims)
    br, bc = block
    load = w.make_loader()

    def element(index: Sequence[Any]) -> Value:
        m, bi, ri, bj, ci = index
        row, col = bi * br + ri, bj * bc + ci
        leading, trailing = ind.unflatten(m, shape[:batch_dims]), ind.unflatten(col, shape[batch_dims + 1 :])

        def magnitude() -> Value:
            return ops.abs(ops.to_dtype(load([*leading, row, *trailing]), torch.float32))

        inside = [
            ops.lt(ops.index_expr(i, torch.int32), ops.index_expr(n, torch.int32))
            for i, n, side in ((row, rows, br), (col, cols, bc))
            if n % side != 0
        ]
        if not inside:
            return magnitude()
        mask = inside[0] if len(inside) == 1 else ops.and_(*inside)
        return ops.masked(mask, magnitude, 0.0)

    padded = ind.Pointwise.create(
        device=w.get_device(),
        dtype=torch.float32,
        inner_fn=element,
        ranges=[matrices, ind.ceildiv(rows, br), br, ind.ceildiv(cols, bc), bc],
    )
    amax = ind.amax(padded, [2, 4])
    amax.realize()
    return amax


def _lower(
    w: Any,
    keys: Any,
    clock: Any,
    row: int,
    batch_dims: int,
    fmt: str,
    bits: float,
    noise: str,
    block: Sequence[int],
    scale: str,
    whole: Sequence[int],
    offset: Sequence[int],
    version: int,
) -> Any:
    ind = inductor()
    p: Primitives = InductorPrimitives()
    element_format = FloatFormat.parse(fmt)
    # Read twice: by the reduction and by the pointwise loop. A weight that is a view of something is stored first.
    w.realize()
    shape = w.get_size()
    numel = ind.product(whole or shape)
    _, rows, cols = matrix_shape(shape, batch_dims)
    load = w.make_loader()
    load_amax = None
    if needs_block_maximum(element_format, scale or None, noise):
        load_amax = _block_maximum(w, batch_dims, block).make_loader()
    load_keys, load_clock = (None, None) if noise == "none" else (keys.make_loader(), clock.make_loader())

    def element(index: Sequence[Any]) -> Value:
        matrix, r, c = _matrix_index(index, shape, batch_dims)
        y = ind.ops.to_dtype(load(index), torch.float32)
        amax = None
        if load_amax is not None:
            amax = load_amax([matrix, ind.block_index(r, rows, block[0]), ind.block_index(c, cols, block[1])])
        if load_keys is not None and load_clock is not None:
            at = [i + start for i, start in zip(index, offset, strict=True)] if whole else index
            linear = ind.linear_int32(at, whole or shape, numel)
            key = (load_keys([row, 0]), load_keys([row, 1]))
            word = random_word(p, linear, key, load_clock([0]))
            y = add_noise(p, noise, y, amax, bits, word, load_clock([1]))
        return ind.ops.to_dtype(cast(p, y, amax, element_format, scale or None, w.get_dtype()), w.get_dtype())

    return ind.Pointwise.create(device=w.get_device(), dtype=w.get_dtype(), inner_fn=element, ranges=list(shape))


inductor().register_lowering(torch.ops.gws.sample_weight.default, _lower)
