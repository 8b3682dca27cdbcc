"""Inductor's lowering of ``gws::sample_weight`` and of its gradient.

The arithmetic of `noise`, `cast` and `learned` becomes loop-level code, in the loops of `weight_loops`; on a CPU, where
nothing is to be fused with the sample, the kernel of `cpp_kernel`.

Importing this module registers the lowerings; the backend does so before it compiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cast import block_scale, cast, needs_block_maximum
from .cpp_kernel import Sampling, sample
from .formats import FloatFormat
from .learned import Grid, WidthRule, block_grid, cast_to_grid, width, width_gradient
from .learned import amplitude as width_amplitude
from .noise import add_noise, fixed_amplitude, random_word, signed_draw
from .primitives import Value
from .torch_internals import inductor
from .weight_loops import Loader, Loops, loops_over


def _lower(
    w: Any,
    key: Any,
    clock: Any,
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
    out_dtype: torch.dtype | None,
    keep: bool,
    version: int,
) -> Any:
    element_format = FloatFormat.parse(fmt)
    widths = None if learned is None else WidthRule.parse(rule)
    alone = not inductor().has_pointwise_user()
    if alone:
        sampling = Sampling(element_format, bits, noise, scale or None, widths, w.get_dtype())
        sampled = sample(w, key, clock, learned, sampling, batch_dims, block, whole, offset, out_dtype)
        if sampled is not None:
            return sampled
    # Learned widths take several values for each block, which are stored: on a GPU, in a kernel of their own.
    loops = loops_over(w, batch_dims, block, whole, in_blocks=alone and learned is None)
    p = loops.p
    if widths is None:
        amplitude, to_grid = _of_fixed_width(loops, element_format, bits, noise, scale or None)
    else:
        amplitude, to_grid = _of_widths(loops, learned, widths, clock, element_format, noise, scale or None)
    load = loops.sampled_load()
    word = load_clock = None
    if noise != "none":
        word, load_clock = _random_word(loops, whole, offset, key, clock), clock.make_loader()

    def element(index: Sequence[Any]) -> Value:
        y, at = load(index), loops.block_of(index)
        if amplitude is not None and word is not None and load_clock is not None:
            y = add_noise(p, noise, y, amplitude(at), word(index), load_clock([1]))
        return to_grid(y, at)

    return loops.store(element, out_dtype or w.get_dtype())


_ToGrid = Callable[[Value, Sequence[Any]], Value]
"""The cast of a float32 value, given the index of its block."""


def _of_fixed_width(
    loops: Loops, fmt: FloatFormat, bits: float, noise: str, scale: str | None
) -> tuple[Loader | None, _ToGrid]:
    """The noise's amplitude by block, None without noise; and the cast."""
    p, dtype = loops.p, loops.w.get_dtype()
    if not needs_block_maximum(fmt, scale, noise):
        return None, lambda y, at: cast(p, y, None, None, fmt, scale, dtype)
    amax = loops.maximum()
    amplitude = inverse = None
    if noise != "none":
        amplitude = loops.of_blocks(lambda at: fixed_amplitude(p, amax(at), bits))
    if fmt.scaled and scale is not None:
        inverse = loops.of_blocks(lambda at: block_scale(p, amax(at), fmt, scale, dtype)[0])
    x = loops.of_blocks(lambda at: block_scale(p, amax(at), fmt, scale, dtype)[1])

    def to_grid(y: Value, at: Sequence[Any]) -> Value:
        return cast(p, y, inverse(at) if inverse else None, x(at), fmt, scale, dtype)

    return amplitude, to_grid


def _of_widths(
    loops: Loops,
    learned: Any,
    rule: WidthRule,
    clock: Any,
    fmt: FloatFormat,
    noise: str,
    scale: str | None,
) -> tuple[Loader | None, _ToGrid]:
    """The same of learned widths: amplitude and grid of each block are stored."""
    p, amax, load_learned = loops.p, loops.maximum(), _load_learned(learned)
    load_clock = None if noise == "none" else clock.make_loader()

    def grid(at: Sequence[Any]) -> Grid:
        b = width(p, load_learned(at), rule)
        drawing = None if load_clock is None else p.iand(load_clock([1]), p.ixor(load_clock([2]), -1))
        return block_grid(p, b, amax(at), drawing, fmt, rule, scale, loops.w.get_dtype())

    def stored(name: str) -> Loader:
        return loops.stored(lambda at: p.iadd(getattr(grid(at), name), 0), torch.int32)

    amplitude = None
    if noise != "none":
        amplitude = loops.stored(
            lambda at: width_amplitude(p, width(p, load_learned(at), rule), amax(at)), torch.float32
        )
    fields = Grid(stored("x"), stored("largest"), stored("smallest"), stored("shift"))
    return amplitude, lambda y, at: cast_to_grid(p, y, fields.map(lambda load: load(at)))


def _load_learned(learned: Any) -> Loader:
    """The loader of a learned parameter by block index: one for all blocks, for each, or for each of a matrix."""
    load = learned.make_loader()
    dims = len(learned.get_size())
    return lambda index: load(list(index)[len(index) - dims :])


def _random_word(loops: Loops, whole: Sequence[int], offset: Sequence[int], key: Any, clock: Any) -> Loader:
    """The random word of an element, by the loops' index."""
    load_key, load_clock = key.make_loader(), clock.make_loader()
    element_index = loops.element_index(whole, offset)

    def word(index: Sequence[Any]) -> Value:
        return random_word(loops.p, element_index(index), (load_key([0]), load_key([1])), load_clock([0]))

    return word


def _lower_gradient(
    grad: Any,
    w: Any,
    key: Any,
    clock: Any,
    learned: Any,
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
    widths = WidthRule.parse(rule)
    loops = loops_over(w, batch_dims, block, whole, in_blocks=False)
    p = loops.p
    word = _random_word(loops, whole, offset, key, clock)
    load_grad, load_clock, load_learned = grad.make_loader(), clock.make_loader(), _load_learned(learned)

    def product(index: Sequence[Any]) -> Value:
        r = signed_draw(p, noise, word(index), load_clock([1]))
        return p.fmul(ind.ops.to_dtype(load_grad(index), torch.float32), r)

    load_amax, load_sum = loops.maximum(), loops.reduce("sum", product, torch.float32)

    def gradient(index: Sequence[Any]) -> Value:
        b = width(p, load_learned(index), widths)
        return p.fmul(p.fmul(load_sum(index), width_amplitude(p, b, load_amax(index))), -math.log(2.0))

    dims = len(learned.get_size())
    if dims == 0:
        total = ind.sum(
            ind.Pointwise.create(
                device=w.get_device(), dtype=torch.float32, inner_fn=gradient, ranges=list(loops.blocks)
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
