"""Inductor's lowering of ``gws::sample_weight``: the arithmetic of `noise` and `cast` as loop-level code.

Two loops per weight: a reduction for the block maxima, which Inductor stores (1/1024 of the weight's elements), and a
pointwise one, which fuses with whatever reads the sampled weight. The pointwise loop runs over the weight's own index,
with the block maximum read at the divided index: written over (block row, row, block column, column) instead, Inductor
keeps a float32 copy of the result.

Importing this module registers the lowering; the backend does so before it compiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cast import cast, needs_block_maximum
from .formats import FloatFormat
from .learned import Grid, WidthRule, block_grid, cast_to_grid, width, width_gradient
from .learned import amplitude as width_amplitude
from .noise import add_noise, fixed_amplitude, random_word, signed_draw
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


class _Weight:
    """A weight in loops over its own index and over its blocks."""

    def __init__(self, w: Any, batch_dims: int, block: Sequence[int]) -> None:
        ind = inductor()
        # Read by a reduction and by a pointwise loop: a weight that is a view of something is stored first.
        w.realize()
        self.shape: Sequence[Any] = w.get_size()
        self.matrices, self.rows, self.cols = matrix_shape(self.shape, batch_dims)
        self.block = block
        self.blocks = [self.matrices, ind.ceildiv(self.rows, block[0]), ind.ceildiv(self.cols, block[1])]
        self._w = w
        self._batch_dims = batch_dims

    def block_of(self, index: Sequence[Any]) -> list[Any]:
        """Index of an element in the weight's own dims -> index of its block."""
        ind = inductor()
        matrix, row, col = _matrix_index(index, self.shape, self._batch_dims)
        return [
            matrix,
            ind.block_index(row, self.rows, self.block[0]),
            ind.block_index(col, self.cols, self.block[1]),
        ]

    def _by_block(self, value: Callable[[Sequence[Any]], Value]) -> Any:
        """A float32 value of each element, given by its index, as (matrices, block rows, rows, block cols, cols).

        Zero beyond the edges of partial blocks.
        """
        ind = inductor()
        ops, (br, bc) = ind.ops, self.block

        def element(index: Sequence[Any]) -> Value:
            m, bi, ri, bj, ci = index
            row, col = bi * br + ri, bj * bc + ci
            leading = ind.unflatten(m, self.shape[: self._batch_dims])
            trailing = ind.unflatten(col, self.shape[self._batch_dims + 1 :])
            inside = [
                ops.lt(ops.index_expr(i, torch.int32), ops.index_expr(n, torch.int32))
                for i, n, side in ((row, self.rows, br), (col, self.cols, bc))
                if n % side != 0
            ]

            def inner() -> Value:
                return value([*leading, row, *trailing])

            if not inside:
                return inner()
            return ops.masked(inside[0] if len(inside) == 1 else ops.and_(*inside), inner, 0.0)

        _, block_rows, block_cols = self.blocks
        return ind.Pointwise.create(
            device=self._w.get_device(),
            dtype=torch.float32,
            inner_fn=element,
            ranges=[self.matrices, block_rows, br, block_cols, bc],
        )

    def maximum(self) -> Any:
        """The reduction: float32 (matrices, block rows, block columns); see `sampling.block_maximum`."""
        ind = inductor()
        load = self._w.make_loader()
        amax = ind.amax(self._by_block(lambda i: ind.ops.abs(ind.ops.to_dtype(load(i), torch.float32))), [2, 4])
        amax.realize()
        return amax

    def sum(self, value: Callable[[Sequence[Any]], Value]) -> Any:
        """The sum of a float32 value of each element over its block."""
        total = inductor().sum(self._by_block(value), [2, 4])
        total.realize()
        return total

    def of_blocks(self, value: Callable[[Sequence[Any]], Value], dtype: torch.dtype) -> Any:
        """A stored tensor with a value for each block."""
        stored = inductor().Pointwise.create(
            device=self._w.get_device(), dtype=dtype, inner_fn=value, ranges=list(self.blocks)
        )
        stored.realize()
        return stored


def _load_learned(learned: Any) -> Callable[[Sequence[Any]], Value]:
    """The loader of a learned parameter by block index: one for all blocks, for each, or for each of a matrix."""
    load = learned.make_loader()
    dims = len(learned.get_size())
    return lambda index: load(list(index)[len(index) - dims :])


def _random_word(
    shape: Sequence[Any], whole: Sequence[int], offset: Sequence[int], keys: Any, clock: Any, row: int
) -> Callable[[Sequence[Any]], Value]:
    """The random word of an element, by its index in the weight's own dims."""
    ind = inductor()
    load_keys, load_clock = keys.make_loader(), clock.make_loader()
    numel = ind.product(whole or shape)

    def word(index: Sequence[Any]) -> Value:
        at = [i + start for i, start in zip(index, offset, strict=True)] if whole else index
        linear = ind.linear_int32(at, whole or shape, numel)
        return random_word(InductorPrimitives(), linear, (load_keys([row, 0]), load_keys([row, 1])), load_clock([0]))

    return word


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
    learned: Any,
    rule: str,
    whole: Sequence[int],
    offset: Sequence[int],
    keep: bool,
    version: int,
) -> Any:
    ind = inductor()
    p: Primitives = InductorPrimitives()
    element_format = FloatFormat.parse(fmt)
    weight = _Weight(w, batch_dims, block)
    dtype = w.get_dtype()
    load = w.make_loader()
    load_amax = load_amplitude = load_grid = None
    if learned is not None:
        load_amax = weight.maximum().make_loader()
        load_amplitude, load_grid = _of_widths(
            weight, load_amax, learned, WidthRule.parse(rule), clock, element_format, noise, scale or None, dtype
        )
    elif needs_block_maximum(element_format, scale or None, noise):
        load_amax = weight.maximum().make_loader()
    word = None if noise == "none" else _random_word(weight.shape, whole, offset, keys, clock, row)
    load_clock = None if noise == "none" else clock.make_loader()

    def element(index: Sequence[Any]) -> Value:
        at = weight.block_of(index)
        y = ind.ops.to_dtype(load(index), torch.float32)
        amax = load_amax(at) if load_amax is not None and load_grid is None else None
        if word is not None and load_clock is not None:
            amplitude = fixed_amplitude(p, amax, bits) if load_amplitude is None else load_amplitude(at)
            y = add_noise(p, noise, y, amplitude, word(index), load_clock([1]))
        if load_grid is None:
            y = cast(p, y, amax, element_format, scale or None, dtype)
        else:
            y = cast_to_grid(p, y, load_grid.map(lambda field: field(at) if callable(field) else field))
        return ind.ops.to_dtype(y, dtype)

    return ind.Pointwise.create(device=w.get_device(), dtype=dtype, inner_fn=element, ranges=list(weight.shape))


def _of_widths(
    weight: _Weight,
    load_amax: Any,
    learned: Any,
    rule: WidthRule,
    clock: Any,
    fmt: FloatFormat,
    noise: str,
    scale: str | None,
    dtype: torch.dtype,
) -> tuple[Any, Grid]:
    """Amplitude and grid of each block, stored: loaders by block index, and numbers where all blocks have the same."""
    p: Primitives = InductorPrimitives()
    load_learned = _load_learned(learned)
    load_clock = None if noise == "none" else clock.make_loader()

    def grid(index: Sequence[Any]) -> Grid:
        b = width(p, load_learned(index), rule)
        drawing = None if load_clock is None else p.iand(load_clock([1]), p.ixor(load_clock([2]), -1))
        return block_grid(p, b, load_amax(index), drawing, fmt, rule, scale, dtype)

    def stored(name: str) -> Any:
        return weight.of_blocks(lambda index: p.iadd(getattr(grid(index), name), 0), torch.int32).make_loader()

    amplitude = None
    if noise != "none":
        amplitude = weight.of_blocks(
            lambda index: width_amplitude(p, width(p, load_learned(index), rule), load_amax(index)), torch.float32
        ).make_loader()
    return amplitude, Grid(stored("x"), stored("largest"), stored("smallest"), stored("shift"))


def _lower_gradient(
    grad: Any,
    w: Any,
    keys: Any,
    clock: Any,
    learned: Any,
    row: int,
    batch_dims: int,
    noise: str,
    block: Sequence[int],
    rule: str,
    whole: Sequence[int],
    offset: Sequence[int],
    version: int,
) -> Any:
    """One loop over the weight for both reductions, the block maximum and the sum of gradient times noise."""
    ind = inductor()
    p: Primitives = InductorPrimitives()
    widths = WidthRule.parse(rule)
    weight = _Weight(w, batch_dims, block)
    word = _random_word(weight.shape, whole, offset, keys, clock, row)
    load_grad, load_clock, load_learned = grad.make_loader(), clock.make_loader(), _load_learned(learned)

    def product(index: Sequence[Any]) -> Value:
        r = signed_draw(p, noise, word(index), load_clock([1]))
        return p.fmul(ind.ops.to_dtype(load_grad(index), torch.float32), r)

    load_amax, load_sum = weight.maximum().make_loader(), weight.sum(product).make_loader()

    def gradient(index: Sequence[Any]) -> Value:
        b = width(p, load_learned(index), widths)
        return p.fmul(p.fmul(load_sum(index), width_amplitude(p, b, load_amax(index))), -math.log(2.0))

    dims = len(learned.get_size())
    if dims == 0:
        total = ind.sum(
            ind.Pointwise.create(
                device=w.get_device(), dtype=torch.float32, inner_fn=gradient, ranges=list(weight.blocks)
            ),
            [0, 1, 2],
        )
        total.realize()
        load_total = total.make_loader()
    return ind.Pointwise.create(
        device=w.get_device(),
        dtype=torch.float32,
        inner_fn=lambda index: width_gradient(
            p,
            load_total([]) if dims == 0 else gradient([0] * (3 - dims) + list(index)),
            learned.make_loader()(index),
            widths,
        ),
        ranges=list(learned.get_size()),
    )


inductor().register_lowering(torch.ops.gws.sample_weight.default, _lower)
inductor().register_lowering(torch.ops.gws.bits_gradient.default, _lower_gradient)
