"""The sample of a weight on a CPU as one C++ kernel of our own.

The loops that Inductor generates, one for the block maxima and one for the elements, both read the weight from memory,
and the second takes one vector at a time: the instructions of a random word wait for each other for some forty cycles,
and the processor finds few others to execute meanwhile. This kernel goes through the weight by parts that a core's
cache holds, first for the maxima of a part and then for its elements, and takes the elements of eight rows side by
side. It is also compiled sooner, since Inductor has no graph of each operation to schedule and print.

The arithmetic is that of `noise`, `cast` and `learned`, as `CppPrimitives` writes it down. The loops around it are in
``templates/sample_weight.cpp.jinja``. Inductor compiles and calls it as it does its own templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from .cast import block_scale, cast, needs_block_maximum
from .cpp_primitives import CppPrimitives
from .formats import FloatFormat
from .learned import Grid, WidthRule, block_grid, cast_to_grid, width
from .learned import amplitude as width_amplitude
from .noise import add_noise, fixed_amplitude, random_word
from .primitives import Value
from .sampling import matrix_shape
from .torch_internals import cpp_kernel, cpp_vector_size, inductor

_ROWS = 8
"""How many rows are taken side by side: on 32 registers, 8 measure faster than 4, and 4 than 2."""

_CHUNK_COLS = 1024
"""Columns of a part, at most, unless a block has more."""

_MAX_PART = 1 << 17
"""Elements of a part, at most: 512 KiB of float32."""

_GRID = tuple(field.name for field in fields(Grid))


@dataclass(frozen=True)
class Sampling:
    """What is done to an element, see `gws_compile.sampling.sample_weight`.

    Attributes:
        fmt, bits, noise: of the operator.
        scale: of the operator; None for no block scale.
        rule: of learned widths; None for a fixed one.
        dtype: the weight's.
    """

    fmt: FloatFormat
    bits: float
    noise: str
    scale: str | None
    rule: WidthRule | None
    dtype: torch.dtype


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


def sample(
    w: Any,
    key: Any,
    clock: Any,
    learned: Any,
    sampling: Sampling,
    batch_dims: int,
    block: Sequence[int],
    whole: Sequence[int],
    offset: Sequence[int],
    out_dtype: torch.dtype | None,
) -> Any:
    """The sampled weight as Inductor's tensor; None where it is not for this kernel.

    The kernel is for contiguous weights on a CPU with vectors, whose rows and blocks are whole numbers of these.
    Nothing is fused with it.

    Args:
        w, key, clock, learned: Inductor's tensors; None as in the operator.
        sampling: what is done to an element.
        batch_dims, block, whole, offset: of the operator.
        out_dtype: of the operator.
    """
    size = cpp_vector_size(w.get_device())
    if size is None or (whole and batch_dims > 1):
        return None
    w.realize()  # a weight that is computed is stored first
    plain_shape = inductor().plain_shape
    shape = plain_shape(w)
    if shape is None or any(plain_shape(x) is None for x in (key, clock, learned) if x is not None):
        return None
    matrices, rows, cols = matrix_shape(shape, batch_dims)
    chunk_cols = max(_CHUNK_COLS // block[1], 1) * block[1]
    part = min(block[0], rows) * min(chunk_cols, cols)
    if block[1] % size or cols % size or part > _MAX_PART:
        return None
    constants: dict[str, str] = {}
    of_block = _of_block(sampling, constants)
    panel_rows = min(block[0], rows)
    heights = {panel_rows, rows % block[0] or panel_rows}
    elements = [
        _elements(sampling, of_block, count, constants)
        for count, needed in (
            (_ROWS, any(height >= _ROWS for height in heights)),
            (1, any(height % _ROWS for height in heights)),
        )
        if needed
    ]
    whole_rows, whole_cols, index_offset = _in_whole(shape, batch_dims, whole, offset)
    return cpp_kernel(
        {"w": w, "key": key, "clock": clock, "learned_ptr": learned},
        shape,
        out_dtype or sampling.dtype,
        _template().render,
        elements=elements,
        of_block=of_block,
        constants=constants,
        noise=sampling.noise != "none",
        matrices=matrices,
        rows=rows,
        cols=cols,
        block_rows=block[0],
        block_cols=block[1],
        panels=-(-rows // block[0]),
        block_columns=-(-cols // block[1]),
        chunks=-(-cols // chunk_cols),
        chunk_cols=chunk_cols,
        learned_dims=len(learned.get_size()) if learned is not None else None,
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
    return rows, cols, inductor().flatten(start, sizes)


def _of_block(sampling: Sampling, constants: dict[str, str]) -> _OfBlock:
    p = CppPrimitives(constants)
    fmt, scale, dtype, drawn = sampling.fmt, sampling.scale, sampling.dtype, sampling.noise != "none"
    amax: Value = ("amax",)
    floats: dict[str, Value] = {}
    ints: dict[str, Value] = {}
    if sampling.rule is not None:
        b = width(p, ("learned",), sampling.rule)
        drawing = p.iand(("enabled",), p.ixor(("frozen",), -1)) if drawn else None
        if drawn:
            floats["amplitude"] = width_amplitude(p, b, amax)
        grid = block_grid(p, b, amax, drawing, fmt, sampling.rule, scale, dtype)
        ints = {name: p.iadd(getattr(grid, name), 0) for name in _GRID}  # some are Python numbers
    elif needs_block_maximum(fmt, scale, sampling.noise):
        if drawn:
            floats["amplitude"] = fixed_amplitude(p, amax, sampling.bits)
        inverse, floats["x"] = block_scale(p, amax, fmt, scale, dtype)
        if inverse is not None:
            floats["inverse"] = inverse
    types = dict.fromkeys(floats, "Floats") | dict.fromkeys(ints, "Ints")
    return _OfBlock(p.statements, {name: variable for name, (variable,) in (floats | ints).items()}, types)


def _elements(sampling: Sampling, of_block: _OfBlock, rows: int, constants: dict[str, str]) -> _Elements:
    p = CppPrimitives(constants)
    block: dict[str, Value] = {name: (name,) for name in of_block.values}
    y: Value = tuple(f"w{row}" for row in range(rows))
    if sampling.noise != "none":
        element = tuple(f"element{row}" for row in range(rows))
        word = random_word(p, element, (("key0",), ("key1",)), ("step",))
        y = add_noise(p, sampling.noise, y, block["amplitude"], word, ("enabled",))
    if sampling.rule is not None:
        y = cast_to_grid(p, y, Grid(*(block[name] for name in _GRID)))
    else:
        y = cast(p, y, block.get("inverse"), block.get("x"), sampling.fmt, sampling.scale, sampling.dtype)
    return _Elements(rows, p.statements, y)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("sample_weight.cpp.jinja")
