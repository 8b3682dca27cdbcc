"""The sample of a weight on a CPU as one C++ kernel of our own.

The loops that Inductor generates, one for the block maxima and one for the elements, both read the weight from memory,
and the second takes one vector at a time: the instructions of a random word wait for each other for some forty cycles,
and the processor finds few others to execute meanwhile. This kernel goes through the weight by parts that a core's
cache holds, first for the maxima of a part and then for its elements, and takes the elements of eight rows side by
side. It is also compiled sooner, since Inductor has no graph of each operation to schedule and print.

The arithmetic is that of `gws_compile.numerics.spec`, as `CppPrimitives` writes it down. The loops around it are in
``sample_weight.cpp.jinja``. Inductor compiles and calls it as it does its own templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from ...numerics.blocks import matrix_shape
from ...numerics.spec import SampleSpec
from ...ops.sample_arguments import SampleArguments
from ...torch_internals import inductor
from ...torch_internals.cpp_template import cpp_kernel, cpp_vector_size
from .primitives import CppPrimitives

_TYPES = {torch.float32: "Floats", torch.int32: "Ints"}
"""dtype of a value -> the C++ type of a vector of such."""

_ROWS = 8
"""How many rows are taken side by side: on 32 registers, 8 measure faster than 4, and 4 than 2."""

_CHUNK_COLS = 1024
"""Columns of a part, at most, unless a block has more."""

_MAX_PART = 1 << 17
"""Elements of a part, at most: 512 KiB of float32."""


@dataclass(frozen=True)
class _OfBlock:
    """C++ that computes what depends on a block, for a vector of blocks.

    Attributes:
        statements: on ``amax``, and on ``learned`` where widths are.
        values: name of a value -> the variable that it ends up in.
        types: name of a value -> ``"Floats"`` or ``"Ints"``.
    """

    statements: Sequence[str]
    values: Mapping[str, str]
    types: Mapping[str, str]


@dataclass(frozen=True)
class _Elements:
    """C++ that samples a vector in each of several rows.

    Attributes:
        rows: how many.
        statements: on ``w0``, ``w1``, ..., ``element0``, ... and the values of their block.
        values: the variables that the result ends up in, one for each row.
    """

    rows: int
    statements: Sequence[str]
    values: Sequence[str]


def sample(given: SampleArguments, spec: SampleSpec) -> Any:
    """The sampled weight as Inductor's tensor; None where it is not for this kernel.

    The kernel is for contiguous weights on a CPU with vectors, whose rows and blocks are whole numbers of these.
    Nothing is fused with it.

    Args:
        given: the operator's arguments; tensors are Inductor's.
        spec: what is done to an element.
    """
    w, batch_dims, block, whole = given.w, given.batch_dims, given.block, given.whole
    tensors = (given.key, given.clock, given.learned)
    size = cpp_vector_size(w.get_device())
    if size is None or (whole and batch_dims > 1):
        return None
    w.realize()  # a weight that is computed is stored first
    plain_shape = inductor.plain_shape
    shape = plain_shape(w)
    if shape is None or any(plain_shape(x) is None for x in tensors if x is not None):
        return None
    matrices, rows, cols = matrix_shape(shape, batch_dims)
    chunk_cols = max(_CHUNK_COLS // block[1], 1) * block[1]
    part = min(block[0], rows) * min(chunk_cols, cols)
    if block[1] % size or cols % size or part > _MAX_PART:
        return None
    constants: dict[str, str] = {}
    of_block = _of_block(spec, constants)
    panel_rows = min(block[0], rows)
    heights = {panel_rows, rows % block[0] or panel_rows}
    elements = [
        _of_elements(spec, count, constants)
        for count, needed in (
            (_ROWS, any(height >= _ROWS for height in heights)),
            (1, any(height % _ROWS for height in heights)),
        )
        if needed
    ]
    whole_rows, whole_cols, index_offset = _in_whole(shape, batch_dims, *given.part)
    return cpp_kernel(
        {"w": w, "key": given.key, "clock": given.clock, "learned_ptr": given.learned},
        shape,
        given.out_dtype or spec.dtype,
        _template().render,
        elements=elements,
        of_block=of_block,
        constants=constants,
        noise=spec.noisy,
        matrices=matrices,
        rows=rows,
        cols=cols,
        block_rows=block[0],
        block_cols=block[1],
        panels=-(-rows // block[0]),
        block_columns=-(-cols // block[1]),
        chunks=-(-cols // chunk_cols),
        chunk_cols=chunk_cols,
        learned_dims=len(given.learned.get_size()) if given.learned is not None else None,
        whole_rows=whole_rows,
        whole_cols=whole_cols,
        index_offset=index_offset,
    )


def _in_whole(
    shape: Sequence[int], batch_dims: int, whole: Sequence[int], offset: Sequence[int]
) -> tuple[int, int, int]:
    """Rows and columns of a matrix of the whole weight, and the element index of the part's first element in it."""
    sizes = list(whole) or list(shape)
    start = list(offset) or [0] * len(sizes)
    _, rows, cols = matrix_shape(sizes, batch_dims)
    return rows, cols, inductor.flatten(start, sizes)


_KEY = ("key0", "key1")
_CLOCK = ("step", "enabled", "frozen")
"""The variables of the words of key and clock."""


def _of_block(spec: SampleSpec, constants: dict[str, str]) -> _OfBlock:
    p = CppPrimitives(constants)
    operands = spec.of_block(p, lambda: ("amax",), lambda: ("learned",), lambda word: (_CLOCK[word],))
    values = {name: operand() for name, operand in operands.items()}
    types = {name: _TYPES[spec.block_values[name]] for name in values}
    return _OfBlock(p.statements, {name: variable for name, (variable,) in values.items()}, types)


def _of_elements(spec: SampleSpec, rows: int, constants: dict[str, str]) -> _Elements:
    p = CppPrimitives(constants)
    sampled = spec.of_element(
        p,
        tuple(f"w{row}" for row in range(rows)),
        lambda name: (name,),
        lambda: tuple(f"element{row}" for row in range(rows)),
        lambda word: (_KEY[word],),
        lambda word: (_CLOCK[word],),
    )
    return _Elements(rows, p.statements, sampled)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("sample_weight.cpp.jinja")
