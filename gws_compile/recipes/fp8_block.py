"""FP8 with float32 scales: weights in squares of 128, the other operands in groups of 128 along what is summed over."""

from __future__ import annotations

from ..settings.operands import Operand
from ..settings.recipe import Recipe


def fp8_block() -> Recipe:
    """e4m3 for all three operands.

    Source: "DeepSeek-V3 Technical Report" (arXiv 2412.19437), section 3.3.
    """
    operand = Operand("fp8_block")
    return Recipe({"fmt": "fp8_block", "noise": "none"}, operand, operand)
