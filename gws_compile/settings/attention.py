"""How what attention multiplies is rounded: `AttentionOperands`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .operands import Operand, as_operand


@dataclass(frozen=True)
class AttentionOperands:
    """How queries, keys, values and probabilities of attention are rounded, each a matrix of its own product.

    ``q k`` sums over a head's features: of queries and keys a row is a token, a column a feature. ``p v`` sums over the
    keys' tokens: of the probabilities a row is a query, and of the values a row is a feature, each with the tokens as
    columns. The probabilities are what is multiplied with the values: ``exp(s - max)``, from 0 to 1, of which the sum
    is divided by behind the product, as the kernels of this kind do it. Backward takes the rounded operands; its own
    products are in high precision.

    Attributes:
        queries, keys, values, probabilities: None for those that stay as they are.

    Raises:
        ValueError: an operand is rounded stochastically, or transformed.
    """

    queries: Operand | None = None
    keys: Operand | None = None
    values: Operand | None = None
    probabilities: Operand | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            operand = as_operand(f"AttentionOperands.{one.name}", getattr(self, one.name))
            object.__setattr__(self, one.name, operand)
            if operand is None:
                continue
            if operand.rounding != "nearest":
                raise ValueError(
                    f"attention: {one.name} must have rounding='nearest', got {operand.rounding!r}: the other is for "
                    "gradients"
                )
            if operand.hadamard is not None:
                raise ValueError(f"attention: {one.name} must have hadamard=None, got {operand.hadamard}")
            if operand.products is not None:
                raise ValueError(f"attention: {one.name} must have products=None, got {operand.products}")

    @property
    def text(self) -> str:
        """What it says, in words."""
        operands = {one.name: getattr(self, one.name) for one in fields(self)}
        if len(set(operands.values())) == 1:
            return str(next(iter(operands.values())).text)
        return "; ".join(f"{name} {one.text}" for name, one in operands.items() if one is not None)


def _fp8_tiles() -> AttentionOperands:
    """FPSAttention's (arXiv 2506.04648): a scale for each tile of queries and keys, for each channel of the values, and
    a fixed one for the probabilities.
    """
    tile = Operand("fp8_e4m3", block=(64, None), scale="amax")
    return AttentionOperands(tile, tile, Operand("fp8_channel"), Operand("fp8_e4m3", scale="unit"))


NAMED = {"fp8_tiles": _fp8_tiles}
"""The settings with a name."""

AttentionLike = AttentionOperands | Operand | str | None
"""`AttentionOperands`, one `Operand` for all four, a format, or a name in `NAMED`."""


def as_attention(value: AttentionLike) -> AttentionOperands | None:
    """What a user has given as ``attention``.

    Raises:
        ValueError: it is none; the message says what is accepted.
    """
    if value is None or isinstance(value, AttentionOperands):
        return value
    if isinstance(value, str) and value in NAMED:
        return NAMED[value]()
    try:
        operand = as_operand("attention", value)
    except ValueError as error:
        raise ValueError(f"{error}; or AttentionOperands, or one of {', '.join(map(repr, NAMED))}") from None
    return AttentionOperands(operand, operand, operand, operand)
