"""NVFP4: e2m1 with scales in two levels, weights in squares, gradients rounded stochastically."""

from __future__ import annotations

from ..settings.operands import Operand
from ..settings.recipe import Recipe


def nvfp4() -> Recipe:
    """Weights 16 x 16 to nearest, the same values in forward and dgrad; activations 1 x 16 to nearest; gradients 1 x 16
    stochastically. In wgrad activations and gradients are transformed before.

    Source: "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149), and TransformerEngine's recipe of this
    name. They keep the first and the last blocks of a deep model, about 15 % of its layers, in bfloat16: that is a
    rule, ``(edge_blocks(model, first=2, last=8), None)``.
    """
    return Recipe(
        {"fmt": "nvfp4", "noise": "none"},
        Operand("nvfp4"),
        Operand("nvfp4", rounding="stochastic", hadamard=16),
    )
