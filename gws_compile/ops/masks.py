"""The operators of sparse weights: ``gws::element_mask`` and ``gws::group_mask``, which say what of a weight is kept,
and ``gws::apply_mask``, which keeps it.

The masks are computed from the weight as it is, in every forward; there is no state. Their arithmetic is
`gws_compile.numerics.sparsity`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..numerics import sparsity
from ..settings.sparsity import KeptElements, PrunedGroups, Sparsity

VERSION = 1
"""Part of every call's arguments, as `gws_compile.ops.sample_arguments.OPERATOR_VERSION` is: raise it whenever what a
mask is, or a lowering, changes."""


def mask_dtype(device: torch.device) -> torch.dtype:
    """What a mask is made of in a graph: 0 or 1.

    Inductor's C++ takes ten nanoseconds to store a byte, or to load one, beside vectors of float32 (torch 2.13).
    """
    return torch.int32 if device.type == "cpu" else torch.bool


@torch.library.custom_op("gws::element_mask", mutates_args=())
def element_mask(w: torch.Tensor, batch_dims: int, over_rows: bool, kept: int, of: int, version: int) -> torch.Tensor:
    """The mask of N of M.

    Args:
        w: the weight, float32, bfloat16 or float16, two or more dims.
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        over_rows: groups run over the rows of its matrices, not over the columns.
        kept, of: N and M; M divides the side that groups run over.
        version: `VERSION`.

    Returns:
        of `mask_dtype`, shape and strides of ``w``; see `gws_compile.numerics.sparsity.element_mask`.
    """
    return sparsity.element_mask(w, batch_dims, kept, of, over_rows=over_rows).to(mask_dtype(w.device))


@element_mask.register_fake
def _(w: torch.Tensor, batch_dims: int, over_rows: bool, kept: int, of: int, version: int) -> torch.Tensor:
    _check_version(version)
    return torch.empty_like(w, dtype=mask_dtype(w.device))


@torch.library.custom_op("gws::group_mask", mutates_args=())
def group_mask(
    w: torch.Tensor,
    clock: torch.Tensor | None,
    batch_dims: int,
    rows: bool,
    size: int,
    share: float,
    start: int,
    stop: int,
    version: int,
) -> torch.Tensor:
    """The mask of pruned rows or columns.

    Args:
        w, batch_dims, version: of `element_mask`.
        clock: see `gws_compile.ops.sample_weight.sample_weight`: the number of the draw says what of the share is
            pruned. None where that does not change.
        rows: groups are rows, else columns.
        size, share, start, stop: of `gws_compile.PrunedGroups`.

    Returns:
        of `mask_dtype`, and of the shape `gws_compile.numerics.sparsity.group_shape`; see
        `gws_compile.numerics.sparsity.group_mask`.
    """
    groups = PrunedGroups(share, size=size, start=start, stop=stop)
    count = w.shape[batch_dims if rows else batch_dims + 1] // size
    step = 0 if clock is None else clock[0].to(torch.int64) & 0xFFFFFFFF
    mask = sparsity.group_mask(w, batch_dims, groups.count(count, step), rows=rows, size=size)
    return mask.to(mask_dtype(w.device))


@group_mask.register_fake
def _(
    w: torch.Tensor,
    clock: torch.Tensor | None,
    batch_dims: int,
    rows: bool,
    size: int,
    share: float,
    start: int,
    stop: int,
    version: int,
) -> torch.Tensor:
    _check_version(version)
    return w.new_empty(sparsity.group_shape(w.shape, batch_dims, rows=rows), dtype=mask_dtype(w.device))


@torch.library.custom_op("gws::apply_mask", mutates_args=(), tags=(torch.Tag.pointwise,))
def apply_mask(x: torch.Tensor, mask: torch.Tensor, through: torch.Tensor | None, version: int) -> torch.Tensor:
    """``x`` where the mask is set, else 0.

    Args:
        x: the weight, or its sample.
        mask: of `mask_dtype`, of its shape, or of one that goes with it.
        through: the weight, which gets all of the gradient, that of what is not kept too (straight through, as SR-STE
            has it without its decay, arXiv 2102.04010), so that it can come back. ``x`` then gets that of what is kept,
            for learned widths. None where the gradient is that of what is kept, to ``x``.
        version: `VERSION`.

    Returns:
        Shape, strides and dtype of ``x``.
    """
    return sparsity.keep(x, mask)


@apply_mask.register_fake
def _(x: torch.Tensor, mask: torch.Tensor, through: torch.Tensor | None, version: int) -> torch.Tensor:
    _check_version(version)
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, mask, through, _ = inputs
    ctx.through = None if through is None else through.dtype
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(mask)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    kept = None
    if ctx.needs_input_grad[0]:
        (mask,) = ctx.saved_tensors
        kept = apply_mask(grad, mask, None, VERSION)
    return kept, None, None if ctx.through is None else grad.to(ctx.through), None


apply_mask.register_autograd(_backward, setup_context=_setup_context)


@dataclass(frozen=True)
class WeightMask:
    """How the mask of one weight is computed.

    Attributes:
        sparsity: what is kept.
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        over_rows: its products sum over the rows of its matrices, not over the columns.
    """

    sparsity: Sparsity
    batch_dims: int
    over_rows: bool

    @property
    def gradual(self) -> bool:
        """Whether it depends on the draw."""
        return isinstance(self.sparsity, PrunedGroups) and self.sparsity.gradual

    @property
    def prunes_rows(self) -> bool:
        """Whether the groups that are pruned are rows of what is stored."""
        assert isinstance(self.sparsity, PrunedGroups)
        return (self.sparsity.groups == "rows") != self.over_rows

    def call(self, w: Any, clock: Any) -> tuple[Any, tuple[Any, ...]]:
        """The operator and its arguments, for a graph.

        Args:
            w: the weight's node.
            clock: the clock's; not needed where it is not `gradual`.
        """
        groups = self.sparsity
        if isinstance(groups, KeptElements):
            how = (w, self.batch_dims, self.over_rows, groups.kept, groups.of)
            return torch.ops.gws.element_mask.default, (*how, VERSION)
        of_groups = (groups.size, float(groups.share), groups.start, groups.stop)
        clock = clock if groups.gradual else None
        return torch.ops.gws.group_mask.default, (w, clock, self.batch_dims, self.prunes_rows, *of_groups, VERSION)

    def example(self, w: torch.Tensor) -> torch.Tensor:
        """A tensor like the mask of a weight, with no values in it."""
        if isinstance(self.sparsity, KeptElements):
            return torch.empty_like(w, dtype=mask_dtype(w.device))
        shape = sparsity.group_shape(w.shape, self.batch_dims, rows=self.prunes_rows)
        return w.new_empty(shape, dtype=mask_dtype(w.device))

    def of(self, w: torch.Tensor, step: int) -> torch.Tensor:
        """The mask of a whole weight at a draw: bool, of a shape that goes with it."""
        if isinstance(self.sparsity, KeptElements):
            kept, of = self.sparsity.kept, self.sparsity.of
            return sparsity.element_mask(w, self.batch_dims, kept, of, over_rows=self.over_rows)
        rows, size = self.prunes_rows, self.sparsity.size
        pruned = self.sparsity.count(w.shape[self.batch_dims if rows else self.batch_dims + 1] // size, step)
        return sparsity.group_mask(w, self.batch_dims, pruned, rows=rows, size=size)


def _check_version(version: int) -> None:
    if version != VERSION:
        raise RuntimeError(f"gws_compile's masks are at version {VERSION}, the graph was made for {version}")
