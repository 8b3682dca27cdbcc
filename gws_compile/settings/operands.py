"""How the operands of products are rounded that are no weights: `Operand`, and `ProductSettings` of one weight's."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from ..numerics.blocks import Block, check_block
from ..numerics.elements import ElementFormat, parse_element
from ..numerics.hadamard import SIZES
from ..numerics.integers import IntFormat
from ..numerics.nvfp4 import ELEMENT as NVFP4_ELEMENT
from ..numerics.presets import Preset, read_format
from ..numerics.scales import OPERAND_SCALES
from ..numerics.spec import Rounding
from .weight_settings import check_choice

Product = Literal["forward", "dgrad", "wgrad", "attention"]
"""A kind of product: ``x w``; ``dy w``, the gradient of x; ``dy x``, that of w; and those of attention's forward."""

PRODUCTS: tuple[Product, ...] = get_args(Product)

SWITCHES = {product: 1 << bit for bit, product in enumerate(PRODUCTS)}
"""Kind of product -> its bit in the clock's fifth word."""

_ALONG = {"fp8_block": (1, 128)}
"""Presets whose blocks are others where they run along one dim; that of the others is `Preset.group`."""

_DEFAULT_BLOCK = (1, 32)


@dataclass(frozen=True)
class Operand:
    """How an operand of matrix products is rounded: an activation, a gradient, or what attention multiplies.

    An operand is a matrix of rows, and of columns over which the product sums; a block has some of each. The same
    operand is another matrix in another product, and is rounded anew for it: an activation along its features in
    forward, and along the tokens in wgrad; a gradient along the outputs in dgrad, and along the tokens in wgrad.

    Args:
        fmt: a format or preset, as in `gws_compile.backend`: ``"mxfp8"``, ``"nvfp4"``, ``"fp8_e5m2"``, ``"int8"``, ...
        block: rows, and elements along what is summed over, that share a scale; None for a whole side. The preset's, in
            a row, when None, or (1, 32).
        scale: ``"floor"``, ``"ceil"``, ``"amax"`` or ``"nvfp4"``, see `gws_compile.quantize`; ``"unit"``, ``1 / max``
            whatever the values, for those from -1 to 1; ``"none"``, X = 1. When None the preset's, ``"amax"`` for
            integers, else ``"floor"``.
        rounding: ``"nearest"``, ties to even; or ``"stochastic"``, up or down by chance, with the value as the mean.
        hadamard: 16, 32 or 128: both operands are transformed before, in groups of so many (arXiv 2509.25149). Said of
            activations that is in forward, said of gradients in wgrad. None for no transform.
        products: in which products the operand is rounded: of ``"forward"`` and ``"wgrad"`` for activations, of
            ``"dgrad"`` and ``"wgrad"`` for gradients; in both when None.

    Raises:
        ValueError: a bad value; the message names it and what is accepted.
    """

    fmt: str | ElementFormat
    _: KW_ONLY
    block: Block | None = None
    scale: str | None = None
    rounding: Rounding = "nearest"
    hadamard: int | None = None
    products: tuple[Product, ...] | None = None

    def __post_init__(self) -> None:
        try:
            _, preset = read_format(self.fmt)
        except ValueError as error:
            raise ValueError(f"Operand.fmt: {error}") from None
        if self.scale is not None:
            check_choice("Operand.scale", self.scale, OPERAND_SCALES)
        check_choice("Operand.rounding", self.rounding, get_args(Rounding))
        check_choice("Operand.hadamard", self.hadamard, (None, *SIZES))
        if self.block is not None:
            object.__setattr__(self, "block", _check_block(self.block))
        if self.products is not None:
            given = (self.products,) if isinstance(self.products, str) else tuple(self.products)
            if not given or not set(given) <= set(PRODUCTS[:3]):
                raise ValueError(f"Operand.products must be some of 'forward', 'dgrad', 'wgrad', got {self.products!r}")
            object.__setattr__(self, "products", given)
        if preset is not None:
            self._check_preset(preset)
        if self.rule == "nvfp4" and self.element != NVFP4_ELEMENT:
            raise ValueError(f"Operand.scale='nvfp4' is that of {NVFP4_ELEMENT.name} elements, got fmt={self.fmt!r}")
        if self.rule == "" and isinstance(self.element, IntFormat):
            raise ValueError(f"Operand.scale must not be 'none' with {self.element.name}, which needs a scale")

    def _check_preset(self, preset: Preset) -> None:
        usual = _block_of(preset)
        rows, length = self.sides
        fits = rows in (usual[0], usual[1]) and (length == usual[1] or (preset.name == "int4_group" and bool(length)))
        if not fits or self.rule not in preset.scales:
            raise ValueError(
                f"Operand.block={self.block!r}, scale={self.scale!r} contradict fmt={preset.name!r}, whose blocks are "
                f"{usual} with the scale {' or '.join(map(repr, preset.scales))}: write fmt={preset.element.name!r}"
            )

    @cached_property
    def element(self) -> ElementFormat:
        """The element format."""
        return read_format(self.fmt)[0]

    @cached_property
    def sides(self) -> Block:
        """The block that is meant."""
        preset = read_format(self.fmt)[1]
        return self.block or (_DEFAULT_BLOCK if preset is None else _block_of(preset))

    @cached_property
    def rule(self) -> str:
        """The rule of the scale that is meant; empty for no scale."""
        if self.scale is not None:
            return "" if self.scale == "none" else self.scale
        preset = read_format(self.fmt)[1]
        if preset is not None:
            return preset.scale or ""
        return "amax" if isinstance(self.element, IntFormat) else "floor"

    @property
    def name(self) -> str:
        """The preset, or the element format, as reports call it."""
        preset = read_format(self.fmt)[1]
        return self.element.name if preset is None else preset.name

    def rounds_in(self, product: Product) -> bool:
        """Whether it is rounded in a kind of product."""
        return self.products is None or product in self.products

    def side_block(self, *, rows: bool) -> list[int]:
        """The block as the operators take it, 0 for a whole side, of a matrix of which this side is summed over."""
        across, along = (side or 0 for side in self.sides)
        return [along, across] if rows else [across, along]

    @property
    def text(self) -> str:
        """What it says, in words: ``"mxfp8, 1 x 32, stochastic"``."""
        rows, length = self.sides
        named: dict[Block, str] = {(1, None): "channel", (None, None): "tensor"}
        block = named.get((rows, length), f"{rows or 'all'} x {length or 'all'}")
        parts = [self.name, *([block] if self.rule not in ("", "unit") else []), self.rule or "no scale"]
        parts += ["stochastic"] if self.rounding == "stochastic" else []
        parts += [f"hadamard {self.hadamard}"] if self.hadamard else []
        parts += [f"in {' and '.join(self.products)}"] if self.products else []
        return ", ".join(parts)

    @property
    def spec(self) -> str:
        """All of it as text that `parse` reads."""
        rows, length = self.sides
        products = "+".join(self.products or ())
        return (
            f"{self.element.spec} {rows or 0}x{length or 0} {self.rule or 'none'} {self.rounding} {self.hadamard or 0} "
            f"{products or 'all'}"
        )

    @staticmethod
    def parse(spec: str) -> Operand:
        """Read `spec`."""
        fmt, block, scale, rounding, hadamard, products = spec.split(" ")
        rows, length = (int(side) or None for side in block.split("x"))
        return Operand(
            parse_element(fmt),
            block=(rows, length),
            scale=scale,
            rounding=rounding,  # type: ignore[arg-type]
            hadamard=int(hadamard) or None,
            products=None if products == "all" else tuple(products.split("+")),  # type: ignore[arg-type]
        )


OperandLike = Operand | str | None
"""An `Operand`, or a format alone."""


def as_operand(name: str, value: object) -> Operand | None:
    """An operand that a user has given as ``activations``, ``gradients`` or so.

    Raises:
        ValueError: it is none; the message names it.
    """
    if value is None or isinstance(value, Operand):
        return value
    if isinstance(value, str):
        try:
            return Operand(value)
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removeprefix('Operand.fmt: ')}") from None
    raise ValueError(f"{name} must be an Operand, a format such as 'mxfp8', or None, got {value!r}")


def check_role(name: str, operand: Operand | None, products: tuple[Product, ...]) -> None:
    """Hold an operand to what can be done with activations, or with gradients.

    Args:
        name: of the argument.
        operand: what was given.
        products: those that it is an operand of.

    Raises:
        ValueError: it is rounded in a product that it is not in; or an activation stochastically.
    """
    if operand is None:
        return
    for product in operand.products or ():
        if product not in products:
            raise ValueError(f"{name}: products must be some of {', '.join(map(repr, products))}, got {product!r}")
    if name == "activations" and operand.rounding == "stochastic":
        raise ValueError(
            "activations: rounding='stochastic' is for gradients; of weights or activations it makes training diverge "
            "(arXiv 2509.25149, appendix E)"
        )


@dataclass(frozen=True)
class ProductSettings:
    """How the other operands are rounded in the products that read a weight.

    Attributes:
        activations: in forward and wgrad; None where they stay as they are.
        gradients: in dgrad and wgrad; likewise.
        scheduled: a schedule has some products in high precision at times.
        number: of the sample among those of its graph, by which reports find the weight.
    """

    activations: Operand | None = None
    gradients: Operand | None = None
    scheduled: bool = False
    number: int = field(default=0, compare=False)

    @property
    def change_something(self) -> bool:
        """Whether a product is another than with the weight's sample alone."""
        return self.rounds or self.scheduled

    @property
    def rounds(self) -> bool:
        """Whether another operand than the weight is rounded."""
        return self.activations is not None or self.gradients is not None

    @property
    def draws(self) -> bool:
        """Whether an operand is rounded stochastically, with the weight's key."""
        return self.gradients is not None and self.gradients.rounding == "stochastic"

    def switch(self, product: Product) -> int:
        """The bit of the clock that has the product in high precision; 0 where no schedule says so."""
        return SWITCHES[product] if self.scheduled else 0

    @property
    def spec(self) -> str:
        """All of it as text that `parse` reads; empty where it changes nothing."""
        if not self.change_something:
            return ""
        operands = (one.spec if one is not None else "" for one in (self.activations, self.gradients))
        return "; ".join((*operands, "scheduled" if self.scheduled else "", str(self.number)))

    @staticmethod
    def parse(spec: str) -> ProductSettings:
        """Read `spec`."""
        if not spec:
            return ProductSettings()
        activations, gradients, scheduled, number = spec.split("; ")
        return ProductSettings(
            Operand.parse(activations) if activations else None,
            Operand.parse(gradients) if gradients else None,
            scheduled == "scheduled",
            int(number),
        )


def _block_of(preset: Preset) -> Block:
    return _ALONG.get(preset.name, preset.block if preset.name == "int4_group" else preset.group)


def _check_block(block: Any) -> Block:
    try:
        rows, length = check_block(block)
    except ValueError as error:
        raise ValueError(f"Operand.{error}") from None
    if length == 1 and rows != 1:
        raise ValueError(
            f"Operand.block: blocks run along what a product sums over, their second side, got {(rows, length)!r}; "
            f"write {(1, rows)!r}"
        )
    return rows, length
