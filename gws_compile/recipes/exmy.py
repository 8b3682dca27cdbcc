"""Any ExMy for all three operands, with a high-precision scale for each channel."""

from __future__ import annotations

from ..numerics.elements import ElementFormat, parse_element
from ..settings.operands import Operand
from ..settings.recipe import Recipe


def exmy(fmt: str | ElementFormat | None) -> Recipe:
    """Weights, activations and gradients in one element format, to nearest, with a float32 scale for each row of an
    operand, along what is summed over.

    Source: "Scaling Laws for Floating Point Quantization Training" (arXiv 2501.02423). Its law was fitted with less
    than this: with the weights, and the activations in wgrad alone: ``activations=Operand(fmt, block=(1, None),
    scale="amax", products=("wgrad",)), gradients=None``.

    Args:
        fmt: the element format.

    Raises:
        ValueError: there is none, or it is no element format.
    """
    if fmt is None:
        raise ValueError("recipe='exmy' needs the format of its operands: fmt='e3m2', or another one")
    try:
        element = parse_element(fmt)
    except ValueError as error:
        raise ValueError(f"recipe='exmy': {error}") from None
    operand = Operand(element, block=(1, None), scale="amax")
    return Recipe({"fmt": element, "block": (1, None), "scale": "amax", "noise": "none"}, operand, operand)
