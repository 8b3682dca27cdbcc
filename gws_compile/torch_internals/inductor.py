"""What a lowering is written with: Inductor's loop bodies, tensors and indices, as typed functions.

Importing this module does not import Inductor; the first call does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from .lookup import find

if TYPE_CHECKING:
    from torch._ops import OpOverload

TensorBox: TypeAlias = Any
"""Inductor's tensor, ``torch._inductor.ir.TensorBox``, with ``get_size``, ``get_dtype``, ``get_device``,
``make_loader`` and ``realize``."""

OpsValue: TypeAlias = Any
"""A value in a loop body, for each element that the loop runs over; what `ops` take and return."""

Expr: TypeAlias = sympy.Expr | int
"""An index, or the size of a dim."""

Index: TypeAlias = Sequence[Expr]
"""One index per dim."""


class _Ops:
    """``torch._inductor.virtualized.ops``, by its operations' names.

    Relies on ``virtualized.ops``. Checked on torch 2.11 to 2.15.
    """

    def __getattr__(self, name: str) -> Callable[..., OpsValue]:
        return cast(Callable[..., OpsValue], getattr(find("torch._inductor.virtualized", "ops"), name))


_USED = {
    "torch._inductor.virtualized": ("V", "ops"),
    "torch._inductor.ir": (
        "ComputedBuffer",
        "ExternKernel",
        "FixedLayout",
        "FlexibleLayout",
        "Pointwise",
        "Reduction",
        "ReductionHint",
        "Scatter",
        "TensorBox",
        "as_storage_and_layout",
    ),
    "torch._inductor.lowering": ("lowerings", "register_lowering", "to_dtype"),
    "torch.utils._sympy.functions": ("FloorDiv", "ModularIndexing"),
}
"""Module -> the names that this one looks up in it."""

ops = _Ops()
"""What is computed in a loop body: ``ops.add(x, y)``, ``ops.load(name, index)``, ``ops.to_dtype(x, dtype)``, ..."""


# --- Indices ---------------------------------------------------------------------------------------------------------


def product(sizes: Sequence[Expr]) -> Expr:
    """How many elements dims of these sizes have."""
    total: Expr = sympy.S.One
    for n in sizes:
        total = total * n
    return total


def floordiv(a: Expr, b: Expr) -> Expr:
    """``a // b``.

    Relies on ``torch.utils._sympy.functions.FloorDiv``. Checked on torch 2.11 to 2.15.
    """
    quotient: Expr = find("torch.utils._sympy.functions", "FloorDiv")(sympy.sympify(a), sympy.sympify(b))
    return quotient


def ceildiv(a: Expr, b: Expr) -> Expr:
    """``a / b``, rounded up.

    Relies on ``torch.utils._sympy.functions.FloorDiv``. Checked on torch 2.11 to 2.15.
    """
    return sympy.S.One if a == b else floordiv(sympy.sympify(a) + (b - 1), sympy.sympify(b))


def modular(a: Expr, divisor: Expr, modulus: Expr) -> Expr:
    """``a // divisor % modulus``.

    Relies on ``torch.utils._sympy.functions.ModularIndexing``. Checked on torch 2.11 to 2.15.
    """
    rest: Expr = find("torch.utils._sympy.functions", "ModularIndexing")(sympy.sympify(a), divisor, modulus)
    return rest


def block_index(index: Expr, size: Expr, side: Expr) -> Expr:
    """``index // side``, for an index below ``size``; a side that is not a number is the size.

    ``CppScheduling.try_loop_split`` (torch 2.13) splits a loop over n, in whose body one ``index // d`` stands,
    into n // d times d iterations: where d does not divide n the last n % d are never run. It looks for a loop
    variable as the dividend, so in that case the same number is written with another one.

    Relies on ``torch.utils._sympy.functions.FloorDiv``. Checked on torch 2.11 to 2.15.
    """
    if size == side:
        return sympy.S.Zero
    if size % side == 0:
        return floordiv(index, sympy.Integer(side))
    return floordiv(2 * sympy.sympify(index) + 1, sympy.Integer(2 * side))


def flatten(index: Index, sizes: Sequence[Expr]) -> Expr:
    """The row-major index into dims of these sizes."""
    total: Expr = 0
    for i, n in zip(index, sizes, strict=True):
        total = total * n + i
    return total


def unflatten(index: Expr, sizes: Sequence[Expr]) -> list[Expr]:
    """A row-major index into dims of these sizes -> one index per dim.

    Relies on ``FloorDiv`` and ``ModularIndexing`` of ``torch.utils._sympy.functions``. Checked on torch 2.11 to 2.15.
    """
    if len(sizes) <= 1:
        return [index] * len(sizes)
    quotient = find("torch.utils._sympy.functions", "FloorDiv")
    rest = find("torch.utils._sympy.functions", "ModularIndexing")
    result = []
    for i, n in enumerate(sizes):
        stride = product(sizes[i + 1 :])
        result.append(quotient(index, stride) if i == 0 else rest(index, stride, n))
    return result


def linear_int32(index: Index, sizes: Sequence[Expr], numel: Expr) -> OpsValue:
    """The row-major element index, mod 2**32, as an int32 value.

    Args:
        index: of the element.
        sizes: of the dims.
        numel: their product.
    """
    total = flatten(index, sizes)
    if (sympy.sympify(numel) < 2**31) == True:  # noqa: E712  (of a symbolic size it is neither true nor false)
        return ops.index_expr(total, torch.int32)
    return ops.to_dtype(ops.index_expr(total, torch.int64), torch.int32, src_dtype=torch.int64)


# --- Tensors ---------------------------------------------------------------------------------------------------------


def pointwise(
    device: torch.device, dtype: torch.dtype, value: Callable[[Index], OpsValue], ranges: Sequence[Expr]
) -> TensorBox:
    """The tensor of shape ``ranges`` whose element at an index is ``value(index)``.

    Relies on ``ir.Pointwise``. Checked on torch 2.11 to 2.15.
    """
    return find("torch._inductor.ir", "Pointwise").create(
        device=device, dtype=dtype, inner_fn=value, ranges=list(ranges)
    )


def reduction(
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
    value: Callable[[Index, Index], OpsValue],
    ranges: Sequence[Expr],
    reduced: Sequence[Expr],
) -> TensorBox:
    """The ``"max"`` or ``"sum"`` over the dims ``reduced``; a GPU keeps up to 1024 elements in registers.

    Relies on ``ir.Reduction`` and ``ir.ReductionHint``. Checked on torch 2.11 to 2.15.
    """
    return find("torch._inductor.ir", "Reduction").create(
        device=device,
        dst_dtype=dtype,
        src_dtype=dtype,
        inner_fn=value,
        ranges=list(ranges),
        reduction_ranges=list(reduced),
        reduction_type=kind,
        reduction_hint=find("torch._inductor.ir", "ReductionHint").INNER,
    )


def scatter(
    device: torch.device,
    dtype: torch.dtype,
    value: Callable[[Index], OpsValue],
    ranges: Sequence[Expr],
    to: Callable[[Index], Index],
    size: Sequence[Expr],
) -> TensorBox:
    """A row-major tensor of this size, whose element ``to(index)`` is ``value(index)``: each is written once.

    Relies on ``ir.Scatter``, ``ComputedBuffer``, ``FixedLayout``, ``FlexibleLayout.contiguous_strides`` and
    ``TensorBox``, and on ``V.graph.register_buffer`` and ``register_operation``. Checked on torch 2.11 to 2.15.
    """
    written = find("torch._inductor.ir", "Scatter")(
        device=device, dtype=dtype, inner_fn=value, ranges=list(ranges), output_indexer=to, scatter_mode=None
    )
    strides = find("torch._inductor.ir", "FlexibleLayout").contiguous_strides(list(size))
    layout = find("torch._inductor.ir", "FixedLayout")(device, dtype, list(size), strides)
    buffer = find("torch._inductor.ir", "ComputedBuffer")(name=None, layout=layout, data=written)
    graph = find("torch._inductor.virtualized", "V").graph
    buffer.name = graph.register_buffer(buffer)
    graph.register_operation(buffer)
    return find("torch._inductor.ir", "TensorBox").create(buffer)


def view(x: TensorBox, size: Sequence[Expr]) -> TensorBox:
    """The tensor in another shape.

    Relies on ``lowering.lowerings`` of ``aten.view``. Checked on torch 2.11 to 2.15.
    """
    return find("torch._inductor.lowering", "lowerings")[torch.ops.aten.view.default](x, list(size))


def amax(x: TensorBox, dims: Sequence[int]) -> TensorBox:
    """The largest value over some dims.

    Relies on ``lowering.lowerings`` of ``aten.amax``. Checked on torch 2.11 to 2.15.
    """
    return find("torch._inductor.lowering", "lowerings")[torch.ops.aten.amax.default](x, dims)


def sum(x: TensorBox, dims: Sequence[int]) -> TensorBox:
    """The sum over some dims.

    Relies on ``lowering.lowerings`` of ``aten.sum``. Checked on torch 2.11 to 2.15.
    """
    return find("torch._inductor.lowering", "lowerings")[torch.ops.aten.sum.dim_IntList](x, dims)


def to_dtype(x: TensorBox, dtype: torch.dtype) -> TensorBox:
    """The tensor in another dtype.

    Relies on ``lowering.to_dtype``. Checked on torch 2.11 to 2.15.
    """
    return find("torch._inductor.lowering", "to_dtype")(x, dtype)


def is_contiguous(x: TensorBox) -> bool:
    """Whether a stored tensor is row-major.

    Relies on ``maybe_get_stride`` and ``ir.FlexibleLayout.contiguous_strides``. Checked on torch 2.11 to 2.15.
    """
    stride = x.maybe_get_stride()
    wanted = find("torch._inductor.ir", "FlexibleLayout").contiguous_strides(x.get_size())
    return stride is not None and all(n == 1 or s == w for n, s, w in zip(x.get_size(), stride, wanted, strict=True))


def stored(x: TensorBox) -> TensorBox:
    """The tensor as a buffer, or as a view that is one by its strides; copied where it is neither.

    What is computed, and was viewed before it was stored, stays a view by a function of the index without this.

    Relies on ``ir.ExternKernel.realize_input`` and ``ir.TensorBox``. Checked on torch 2.11 to 2.15.
    """
    return find("torch._inductor.ir", "TensorBox")(find("torch._inductor.ir", "ExternKernel").realize_input(x))


def plain_shape(x: TensorBox) -> list[int] | None:
    """The shape of a stored tensor, if it is static and the buffer is the tensor in row-major order.

    Relies on ``ir.as_storage_and_layout``. Checked on torch 2.11 to 2.15.
    """
    if not is_contiguous(x) or find("torch._inductor.ir", "as_storage_and_layout")(x, freeze=True)[1].offset != 0:
        return None
    sizes = [sympy.sympify(n) for n in x.get_size()]
    return [int(n) for n in sizes] if all(n.is_Integer for n in sizes) else None


# --- Lowerings -------------------------------------------------------------------------------------------------------


def register_lowering(op: OpOverload, lower: Callable[..., TensorBox]) -> None:
    """Have Inductor call ``lower`` for the operator, unless it has a lowering.

    Relies on ``lowering.lowerings`` and ``lowering.register_lowering``. Checked on torch 2.11 to 2.15.

    Raises:
        UnsupportedTorchError: a name is missing that this module needs, here or later: before a graph is compiled.
    """
    for module, names in _USED.items():
        for name in names:
            find(module, name)
    if op not in find("torch._inductor.lowering", "lowerings"):
        find("torch._inductor.lowering", "register_lowering")(op, type_promotion_kind=None)(lower)


def has_pointwise_user() -> bool:
    """Whether an elementwise operation reads the result of the node that is being lowered, through views or not.

    Relies on ``V.graph.current_node``. Checked on torch 2.11 to 2.15.
    """
    elementwise = (torch.ops.prims.convert_element_type.default, torch.ops.aten.copy_.default)
    views = (torch.ops.aten.permute, torch.ops.aten.t, torch.ops.aten.view, torch.ops.aten.unsqueeze)

    def reads(node: fx.Node) -> bool:
        if node.target in elementwise or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return True
        return getattr(node.target, "overloadpacket", None) in views and any(map(reads, node.users))

    return any(map(reads, find("torch._inductor.virtualized", "V").graph.current_node.users))
