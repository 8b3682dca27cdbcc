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
from typing import Any

import torch

from ...numerics.blocks import clamped, matrix_shape
from ...numerics.spec import SampleSpec
from ...ops.sample_arguments import SampleArguments
from ...torch_internals import inductor
from ...torch_internals.cpp_template import cpp_kernel, cpp_vector_size
from ..element_loops import ElementLoops
from .primitives import CppPrimitives
from .templates import template

_TYPES = {torch.float32: "Floats", torch.int32: "Ints"}
"""dtype of a value -> the C++ type of a vector of such."""

_ROWS = 8
"""How many rows are taken side by side: on 32 registers, 8 measure faster than 4, and 4 than 2."""

_CHUNK_COLS = 1024
"""Columns of a part, at most, unless a block has more."""

_MAX_PART = 1 << 17
"""Elements of a part, at most: 512 KiB of float32."""

_FEW_ROWS = 2
"""The same where blocks are columns, whose rows share what they have in common."""

_COLUMNS_OF_PART = 8
"""Vectors of columns of a part, at most, where blocks are columns."""

_LARGE_BLOCK_ROWS = 32
"""Rows of a part that lies inside a block, at most."""


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


@dataclass(frozen=True)
class _Parts:
    """How a matrix is cut into parts: so many rows (a panel) of so many columns (a chunk).

    Attributes:
        rows, cols: of a part; the last ones may have fewer.
        block_rows, block_cols: sides of a block. A part has whole blocks, or lies inside one.
        given: whether the maxima of the blocks are computed before, since a block is no part of a part.
    """

    rows: int
    cols: int
    block_rows: int
    block_cols: int
    given: bool

    @property
    def blocks_down(self) -> int:
        """Blocks of a part, from above to below."""
        return max(self.rows // self.block_rows, 1)

    @property
    def blocks_across(self) -> int:
        """Blocks of a part, from left to right."""
        return max(self.cols // self.block_cols, 1)

    @staticmethod
    def cut(rows: int, cols: int, block: tuple[int, int], *, given: bool, few_rows: bool) -> _Parts | None:
        """The parts of a matrix; None where its blocks fit none.

        Args:
            rows, cols: of the matrix.
            block: sides of a block, not longer than the matrix.
            given: the maxima are.
            few_rows: whether blocks of fewer rows than are taken side by side may lie below one another in a part.
        """
        block_rows, block_cols = block
        panel = _ROWS if few_rows and _ROWS % block_rows == 0 else block_rows
        chunk = max(_CHUNK_COLS // block_cols, 1) * block_cols
        if not given and min(panel, rows) * min(chunk, cols) <= _MAX_PART:
            return _Parts(panel, chunk, block_rows, block_cols, given=False)
        if block_rows > _ROWS:
            panel = _LARGE_BLOCK_ROWS
            if block_rows < rows and block_rows % panel:
                return None
        if block_cols > _CHUNK_COLS:
            chunk = _CHUNK_COLS
            if block_cols < cols and block_cols % chunk:
                return None
        return _Parts(panel, chunk, block_rows, block_cols, given=True)


def sample(given: SampleArguments, spec: SampleSpec) -> Any:
    """The sampled weight as Inductor's tensor; None where it is not for this kernel.

    The kernel is for contiguous weights on a CPU with vectors, whose rows and blocks are whole numbers of these.
    Nothing is fused with it.

    Args:
        given: the operator's arguments; tensors are Inductor's.
        spec: what is done to an element.
    """
    w, batch_dims, whole = given.w, given.batch_dims, given.whole
    tensors = (given.key, given.clock, given.learned, given.maxima)
    size = cpp_vector_size(w.get_device())
    if size is None or (whole and batch_dims > 1):
        return None
    w.realize()  # a weight that is computed is stored first
    plain_shape = inductor.plain_shape
    shape = plain_shape(w)
    if shape is None or any(plain_shape(x) is None for x in tensors if x is not None):
        return None
    matrices, rows, cols = matrix_shape(shape, batch_dims)
    block = clamped(given.block, rows, cols)
    if block[1] == 1 and block[0] > 1 and cols % size == 0 and not whole:
        return _sample_columns(given, spec, shape, (matrices, rows, cols), block[0], size)
    if block[1] % size or cols % size:
        return None
    of_each_block = given.learned is not None and len(given.learned.get_size()) > 0
    parts = _Parts.cut(rows, cols, block, given=given.block_maxima is not None, few_rows=not of_each_block)
    if parts is None:
        return None
    maxima = given.block_maxima
    if parts.given and maxima is None and spec.block_values:
        maxima = ElementLoops(w, batch_dims, given.block).maximum_bits()
    constants: dict[str, str] = {}
    whole_rows, whole_cols, index_offset = _in_whole(shape, batch_dims, *given.part)
    return _kernel(
        given,
        spec,
        shape,
        "sample_weight.cpp.jinja",
        constants,
        maxima=maxima,
        elements=_of_part(spec, _ROWS, parts.rows, rows, constants, by_row=parts.blocks_down > 1),
        matrices=matrices,
        rows=rows,
        cols=cols,
        part=parts,
        panels=-(-rows // parts.rows),
        chunks=-(-cols // parts.cols),
        blocks_below=-(-rows // block[0]),
        block_columns=-(-cols // block[1]),
        learned_dims=len(given.learned.get_size()) if given.learned is not None else None,
        whole_rows=whole_rows,
        whole_cols=whole_cols,
        index_offset=index_offset,
    )


def _sample_columns(
    given: SampleArguments,
    spec: SampleSpec,
    shape: Sequence[int],
    matrices: tuple[int, int, int],
    block_rows: int,
    size: int,
) -> Any:
    """The same for blocks of one column, as an operand has them that is summed over its rows.

    A vector of columns is a vector of blocks: what blocks have in common is computed in place, and nothing is stored.
    Else Inductor would schedule and print the loops over the blocks and over the elements, which takes it many times
    as long as all the rest (in a backward with exact scales ten seconds and more).
    """
    if given.learned is not None or given.block_maxima is not None:
        return None
    count, rows, cols = matrices
    chunk = _COLUMNS_OF_PART * size
    constants: dict[str, str] = {}
    return _kernel(
        given,
        spec,
        shape,
        "columns.cpp.jinja",
        constants,
        maxima=None,
        elements=_of_part(spec, min(_FEW_ROWS, block_rows), block_rows, rows, constants, by_row=False),
        matrices=count,
        rows=rows,
        cols=cols,
        block_rows=block_rows,
        panels=-(-rows // block_rows),
        chunk=chunk,
        chunks=-(-cols // chunk),
    )


def _kernel(
    given: SampleArguments,
    spec: SampleSpec,
    shape: Sequence[int],
    name: str,
    constants: dict[str, str],
    *,
    maxima: Any,
    **loops: object,
) -> Any:
    """A kernel by the name of its template, which gets what every one needs, and its own loops."""
    return cpp_kernel(
        {
            "w": given.w,
            "key": given.key,
            "clock": given.clock,
            "learned_ptr": given.learned,
            "block_maxima": maxima if spec.block_values else None,
            "matrix_maxima": given.matrix_maxima if spec.block_values else None,
        },
        shape,
        given.out_dtype or spec.dtype,
        template(name).render,
        of_matrix=_of_matrix(spec, constants),
        of_block=_of_block(spec, constants),
        constants=constants,
        keyed=spec.keyed,
        clocked=spec.clocked,
        **loops,
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
_CLOCK = ("step", "enabled", "frozen", "scheduled", "unrounded")
"""The variables of the words of key and clock."""


def _of_block(spec: SampleSpec, constants: dict[str, str]) -> _OfBlock:
    p = CppPrimitives(constants)
    operands = spec.of_block(
        p, lambda: ("amax",), lambda: ("learned",), lambda word: (_CLOCK[word],), lambda name: (name,)
    )
    values = {name: operand() for name, operand in operands.items()}
    types = {name: _TYPES[spec.block_values[name]] for name in values}
    return _OfBlock(p.statements, {name: variable for name, (variable,) in values.items()}, types)


def _of_matrix(spec: SampleSpec, constants: dict[str, str]) -> _OfBlock:
    """The same of a matrix, on ``matrix_maximum``."""
    p = CppPrimitives(constants)
    values = {name: operand() for name, operand in spec.of_matrix(p, lambda: ("matrix_maximum",)).items()}
    return _OfBlock(p.statements, {name: variable for name, (variable,) in values.items()}, {})


def _of_part(
    spec: SampleSpec, together: int, part_rows: int, rows: int, constants: dict[str, str], *, by_row: bool
) -> list[_Elements]:
    """The elements of so many rows together, and of one alone, as parts of the matrix need them."""
    heights = {min(part_rows, rows), rows % part_rows or min(part_rows, rows)}
    needed = {together: any(height >= together for height in heights), 1: any(height % together for height in heights)}
    return [_of_elements(spec, count, constants, by_row=by_row) for count, wanted in needed.items() if wanted]


def _of_elements(spec: SampleSpec, rows: int, constants: dict[str, str], *, by_row: bool) -> _Elements:
    """Those of so many rows side by side, which lie in one block or, ``by_row``, each in one of its own."""
    p = CppPrimitives(constants)
    sampled = spec.of_element(
        p,
        tuple(f"w{row}" for row in range(rows)),
        lambda name: tuple(f"{name}{row}" for row in range(rows if by_row else 1)),
        lambda: tuple(f"element{row}" for row in range(rows)),
        lambda word: (_KEY[word],),
        lambda word: (_CLOCK[word],),
    )
    return _Elements(rows, p.statements, sampled)
