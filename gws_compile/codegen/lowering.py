"""Inductor's lowering of ``gws::sample_weight`` and of its gradient.

The arithmetic of `gws_compile.numerics.spec` becomes loop-level code, in `ElementLoops` or `BlockLoops`; on a CPU,
where nothing is to be fused with the sample, the kernel of `gws_compile.codegen.cpp`.

Importing this module registers the lowerings; the backend does so before it compiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..numerics.primitives import Value
from ..numerics.spec import SampleSpec, Words
from ..ops import hadamard, round_operand, sample_weight  # noqa: F401  (register the operators)
from ..ops.sample_arguments import (
    BitsGradientArguments,
    MaximumArguments,
    RoundArguments,
    SampleArguments,
)
from ..torch_internals import inductor
from .block_loops import BlockLoops
from .cpp import kernel
from .element_loops import ElementLoops
from .hadamard import lower_hadamard
from .loops import Index, Loader, Loops


def _loops_over(w: Any, batch_dims: int, block: Sequence[int], whole: Sequence[int], *, in_blocks: bool) -> Loops:
    """The loops over a weight: block by block if that is wanted, and possible.

    Args:
        w: Inductor's tensor.
        batch_dims, block, whole: of the operator.
        in_blocks: whether nothing is to be fused with the result but what is written in the loops.
    """
    # Read by a reduction and by a pointwise loop: a weight that is a view of something is stored first.
    w.realize()
    if in_blocks and BlockLoops.suit(w, batch_dims, block, whole):
        return BlockLoops(w, batch_dims, block)
    return ElementLoops(w, batch_dims, block)


def _lower(*arguments: Any) -> Any:
    given = SampleArguments(*arguments)
    return _lower_cast(given, given.spec(given.w.get_dtype()))


def _lower_round(*arguments: Any) -> Any:
    given = RoundArguments(*arguments)
    if given.x.get_device().type == "cpu":
        given = replace(given, x=inductor.stored(given.x))
    return _lower_cast(given.as_sample, given.spec(given.x.get_dtype()))


def _lower_cast(given: SampleArguments, spec: SampleSpec) -> Any:
    w = given.w
    alone = not inductor.has_pointwise_user()
    if spec.needs_matrix_maximum and spec.block_values and given.maxima is None:
        given = replace(given, maxima=_maxima(w, given.batch_dims, (0, 0), finite=True))
    if alone:
        sampled = kernel.sample(given, spec)
        if sampled is not None:
            return sampled
    # Learned widths take several values for each block, which are stored: on a GPU, in a kernel of their own.
    in_blocks = alone and spec.rule is None and given.block_maxima is None
    loops = _loops_over(w, given.batch_dims, given.block, given.whole, in_blocks=in_blocks)
    key = _words(given.key) if spec.keyed else None
    clock = _words(given.clock) if spec.clocked else None
    of_block = _block_values(loops, spec, given, clock)
    load = loops.sampled_load()
    element_index = loops.element_index(*given.part) if spec.keyed else None

    def element(index: Index) -> Value:
        w, block = load(index), loops.block_of(index)
        return spec.of_element(
            loops.p,
            w,
            lambda name: of_block[name](block),
            None if element_index is None else lambda: element_index(index),
            key,
            clock,
        )

    return loops.store(element, given.out_dtype or spec.dtype)


def _maxima(w: Any, batch_dims: int, block: Sequence[int], *, finite: bool = False) -> Any:
    """int32 bits of the maxima of blocks, as a stored tensor of shape (matrices, block rows, block columns)."""
    w.realize()
    return ElementLoops(w, batch_dims, block).maximum_bits(finite=finite)


def _block_values(loops: Loops, spec: SampleSpec, given: SampleArguments, clock: Words | None) -> dict[str, Loader]:
    """The loaders of `SampleSpec.block_values`, by block: stored for learned widths, else as `Loops.of_blocks` does."""
    if not spec.block_values:
        return {}
    amax = _block_maximum(loops, given.block_maxima)
    load_learned = None if given.learned is None else _load_learned(given.learned)
    of_matrix = {} if given.matrix_maxima is None else _matrix_values(loops, spec, given.matrix_maxima)

    def of_block(name: str) -> Loader:
        def value(block: Index) -> Value:
            width_parameter = None if load_learned is None else lambda: load_learned(block)
            matrix = loops.matrix_of(block)
            values = spec.of_block(
                loops.p, lambda: amax(block), width_parameter, clock, lambda name: of_matrix[name](matrix)
            )
            return values[name]()

        return value

    if spec.rule is not None:
        return {name: loops.stored(of_block(name), dtype) for name, dtype in spec.block_values.items()}
    # Block by block, what a block has in common is computed once for it, not for each element.
    cheap = spec.is_cheap or isinstance(loops, BlockLoops)
    return {name: loops.of_blocks(of_block(name), cheap=cheap) for name in spec.block_values}


def _matrix_values(loops: Loops, spec: SampleSpec, maxima: Any) -> dict[str, Loader]:
    """The loaders of `SampleSpec.matrix_values`, by matrix, computed once for each."""
    maximum = loops.from_bits(maxima.make_loader())

    def of_matrix(name: str) -> Loader:
        return lambda matrix: spec.of_matrix(loops.p, lambda: maximum([*matrix, 0, 0]))[name]()

    return {name: loops.stored_by_matrix(of_matrix(name)) for name in spec.matrix_values}


def _block_maximum(loops: Loops, maxima: Any) -> Loader:
    """float32: the maximum of each block, computed or given."""
    return loops.maximum() if maxima is None else loops.from_bits(maxima.make_loader())


def _load_learned(learned: Any) -> Loader:
    """The loader of a width parameter by block index: one for all blocks, for each, or for each of a matrix."""
    load = learned.make_loader()
    dims = len(learned.get_size())
    return lambda index: load(list(index)[len(index) - dims :])


def _words(tensor: Any) -> Words:
    load = tensor.make_loader()
    return lambda position: load([position])


def _lower_gradient(*arguments: Any) -> Any:
    """One loop over the weight for both reductions, the block maximum and the sum of gradient times noise."""
    given = BitsGradientArguments(*arguments)
    spec = given.spec
    device, learned = given.w.get_device(), given.learned
    loops = _loops_over(given.w, given.batch_dims, given.block, given.whole, in_blocks=False)
    p = loops.p
    key, clock = _words(given.key), _words(given.clock)
    element_index = loops.element_index(given.whole, given.offset)
    load_grad, load_learned = given.grad.make_loader(), _load_learned(learned)

    def product(index: Index) -> Value:
        r = spec.of_element(p, lambda: element_index(index), key, clock)
        return p.fmul(inductor.ops.to_dtype(load_grad(index), torch.float32), r)

    amax, total = _block_maximum(loops, given.maxima), loops.reduce("sum", product, torch.float32)

    def of_block(block: Index) -> Value:
        return spec.of_block(p, lambda: total(block), lambda: amax(block), lambda: load_learned(block))

    dims = len(learned.get_size())
    if dims == 0:
        of_weight = inductor.sum(
            inductor.pointwise(device=device, dtype=torch.float32, value=of_block, ranges=list(loops.blocks)),
            [0, 1, 2],
        )
        of_weight.realize()
        load_of_weight = of_weight.make_loader()

    def of_parameter(index: Index) -> Value:
        gradient = load_of_weight([]) if dims == 0 else of_block([0] * (3 - dims) + list(index))
        return spec.of_parameter(p, gradient, learned.make_loader()(index))

    return inductor.pointwise(device=device, dtype=torch.float32, value=of_parameter, ranges=list(learned.get_size()))


def _lower_maximum(*arguments: Any) -> Any:
    given = MaximumArguments(*arguments)
    return _maxima(given.w, given.batch_dims, given.block, finite=given.finite)


inductor.register_lowering(torch.ops.gws.sample_weight.default, _lower)
inductor.register_lowering(torch.ops.gws.round_operand.default, _lower_round)
inductor.register_lowering(torch.ops.gws.hadamard.default, lower_hadamard)
inductor.register_lowering(torch.ops.gws.weight_maximum.default, _lower_maximum)
inductor.register_lowering(torch.ops.gws.bits_gradient.default, _lower_gradient)
