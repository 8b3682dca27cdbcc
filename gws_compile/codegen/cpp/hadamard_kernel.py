"""The Hadamard transform on a CPU as one C++ kernel of our own: a group is transformed in registers.

Groups that lie below one another are taken a vector of columns at a time. Those that lie side by side are turned first,
a vector of rows at a time, through a small buffer. The arithmetic is that of `gws_compile.numerics.hadamard`.
"""

from __future__ import annotations

from typing import Any

from ...numerics.blocks import matrix_shape
from ...numerics.hadamard import transform_group
from ...ops.sample_arguments import HadamardArguments
from ...torch_internals import inductor
from ...torch_internals.cpp_template import cpp_kernel, cpp_vector_size
from .primitives import CppPrimitives
from .templates import template


def transform(given: HadamardArguments) -> Any:
    """The transformed operand as Inductor's tensor; None where it is not for this kernel, which wants a stored one."""
    x = given.x
    shape = inductor.plain_shape(x)
    if shape is None or cpp_vector_size(x.get_device()) is None:
        return None
    matrices, rows, cols = matrix_shape(shape, given.batch_dims)
    constants: dict[str, str] = {}
    p = CppPrimitives(constants)
    results = transform_group(p, [(f"x{i}",) for i in range(given.size)], x.get_dtype())
    return cpp_kernel(
        {"x": x},
        shape,
        x.get_dtype(),
        template("hadamard.cpp.jinja").render,
        statements=p.statements,
        results=[variable for (variable,) in results],
        constants=constants,
        size=given.size,
        over_rows=given.rows,
        matrices=matrices,
        rows=rows,
        cols=cols,
    )
