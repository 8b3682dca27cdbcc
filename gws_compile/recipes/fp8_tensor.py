"""FP8 with one float32 scale for each operand."""

from __future__ import annotations

from ..settings.operands import Operand
from ..settings.recipe import Recipe


def fp8_tensor() -> Recipe:
    """e4m3 for weights and activations, e5m2, of a wider range, for gradients; the scale that of the values at hand.

    Sources: "FP8 Formats for Deep Learning" (arXiv 2209.05433); TransformerEngine's ``Float8CurrentScaling``, torchao's
    tensorwise float8 training with ``e5m2`` gradients.
    """
    return Recipe(
        {"fmt": "fp8_tensor", "noise": "none"},
        Operand("fp8_tensor"),
        Operand("fp8_e5m2", block=(None, None), scale="amax"),
    )
