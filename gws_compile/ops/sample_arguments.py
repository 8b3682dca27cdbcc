"""The operators' arguments by name: one table for each, in the order of its schema.

Whoever makes, reads or changes a call of an operator does so by these names; nothing else knows a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import fx

from ..numerics.elements import parse_element
from ..numerics.spec import Rounding, SampleSpec, WidthGradientSpec
from ..numerics.widths import WidthRule

OPERATOR_VERSION = 9
"""Part of every call's arguments. Compile caches see a graph's arguments, not the lowering's source: raise it whenever
noise, cast or lowering change what they compute."""

T = TypeVar("T", bound="_Arguments")


@dataclass(frozen=True)
class _Arguments:
    def call(self) -> tuple[Any, ...]:
        """The arguments by position."""
        return tuple(getattr(self, one.name) for one in fields(self))

    @classmethod
    def of(cls: type[T], node: fx.Node) -> T:
        """Those of a graph's node."""
        return cls(*node.args, **node.kwargs)

    def write(self, node: fx.Node, **changes: Any) -> None:
        """Give a graph's node these arguments, with changes."""
        node.args, node.kwargs = replace(self, **changes).call(), {}

    @classmethod
    def gradients(cls, **of_arguments: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """What a backward returns: the given gradients at their arguments' places, None at the others."""
        unknown = of_arguments.keys() - {one.name for one in fields(cls)}
        assert not unknown, f"no arguments of the operator: {unknown}"
        return tuple(of_arguments.get(one.name) for one in fields(cls))

    @classmethod
    def needs_gradient(cls, ctx: Any, name: str) -> bool:
        """Whether autograd asks for the gradient of an argument."""
        needs: bool = ctx.needs_input_grad[[one.name for one in fields(cls)].index(name)]
        return needs

    def check_version(self) -> None:
        """Hold a call to the arithmetic that is here.

        Raises:
            RuntimeError: the graph was made for another version.
        """
        version = self.call()[-1]
        if version != OPERATOR_VERSION:
            raise RuntimeError(
                f"gws_compile's arithmetic is at version {OPERATOR_VERSION}, the graph was made for {version}"
            )


@dataclass(frozen=True)
class SampleArguments(_Arguments):
    """Those of ``gws::sample_weight``, see `gws_compile.ops.sample_weight.sample_weight`.

    Tensors are tensors, nodes of a graph or Inductor's, by where the call is.
    """

    w: Any
    key: Any
    clock: Any
    batch_dims: int
    fmt: str
    bits: float | None
    noise: str
    block: Sequence[int]
    scale: str
    learned: Any
    rule: str
    whole: Sequence[int]
    offset: Sequence[int]
    maxima: Any
    out_dtype: torch.dtype | None
    keep: bool
    switch: int = 0
    products: str = ""
    version: int = field(default_factory=lambda: OPERATOR_VERSION)

    def spec(self, dtype: torch.dtype) -> SampleSpec:
        """What they say of the sample of a weight of this dtype."""
        rule = WidthRule.parse(self.rule) if self.learned is not None else None
        return SampleSpec(
            parse_element(self.fmt), self.noise, self.bits, self.scale or None, rule, dtype, switch=self.switch
        )

    @property
    def block_maxima(self) -> Any:
        """``maxima``, where they are those of the blocks."""
        return None if self.scale == "nvfp4" else self.maxima

    @property
    def matrix_maxima(self) -> Any:
        """``maxima``, where they are those of the matrices."""
        return self.maxima if self.scale == "nvfp4" else None

    @property
    def part(self) -> tuple[Sequence[int], Sequence[int]]:
        """``whole`` and ``offset``."""
        return self.whole, self.offset


@dataclass(frozen=True)
class RoundArguments(_Arguments):
    """Those of ``gws::round_operand``, see `gws_compile.ops.round_operand.round_operand`."""

    x: Any
    key: Any
    clock: Any
    batch_dims: int
    fmt: str
    block: Sequence[int]
    scale: str
    rounding: Rounding
    place: int
    switch: int
    version: int = field(default_factory=lambda: OPERATOR_VERSION)

    def spec(self, dtype: torch.dtype) -> SampleSpec:
        """What they say of the cast of an operand of this dtype."""
        return SampleSpec(
            parse_element(self.fmt),
            "none",
            None,
            self.scale or None,
            None,
            dtype,
            rounding=self.rounding,
            place=self.place,
            switch=self.switch,
        )

    @property
    def as_sample(self) -> SampleArguments:
        """Where its tensors are, and its blocks, as a sample's arguments say it."""
        return SampleArguments(
            w=self.x,
            key=self.key,
            clock=self.clock,
            batch_dims=self.batch_dims,
            fmt=self.fmt,
            bits=None,
            noise="none",
            block=self.block,
            scale=self.scale,
            learned=None,
            rule="",
            whole=[],
            offset=[],
            maxima=None,
            out_dtype=None,
            keep=True,
            switch=self.switch,
        )


@dataclass(frozen=True)
class HadamardArguments(_Arguments):
    """Those of ``gws::hadamard``, see `gws_compile.ops.hadamard.hadamard`."""

    x: Any
    size: int
    batch_dims: int
    rows: bool
    version: int = field(default_factory=lambda: OPERATOR_VERSION)


@dataclass(frozen=True)
class MaximumArguments(_Arguments):
    """Those of ``gws::weight_maximum``, see `gws_compile.ops.sample_weight.weight_maximum`."""

    w: Any
    batch_dims: int
    block: Sequence[int]
    finite: bool
    version: int = field(default_factory=lambda: OPERATOR_VERSION)


@dataclass(frozen=True)
class BitsGradientArguments(_Arguments):
    """Those of ``gws::bits_gradient``, see `gws_compile.ops.sample_weight.bits_gradient`."""

    grad: Any
    w: Any
    key: Any
    clock: Any
    learned: Any
    batch_dims: int
    noise: str
    block: Sequence[int]
    rule: str
    whole: Sequence[int]
    offset: Sequence[int]
    maxima: Any
    version: int = field(default_factory=lambda: OPERATOR_VERSION)

    @staticmethod
    def behind(sampled: SampleArguments, grad: Any) -> BitsGradientArguments:
        """Those of the gradient of a sample."""
        common = {one.name for one in fields(BitsGradientArguments)} & {one.name for one in fields(sampled)}
        return BitsGradientArguments(grad, **{name: getattr(sampled, name) for name in common})

    @property
    def spec(self) -> WidthGradientSpec:
        """What they say of the gradient."""
        return WidthGradientSpec(self.noise, WidthRule.parse(self.rule))
