"""MXFP4: every operand in e2m1, in blocks of 32 along what is summed over, gradients rounded stochastically."""

from __future__ import annotations

from ..settings.operands import Operand
from ..settings.recipe import Recipe


def mxfp4() -> Recipe:
    """Weights and activations to nearest; gradients stochastically, and transformed, with the activations, in wgrad.

    Sources: OCP Microscaling Formats (MX) v1.0; "Training LLMs with MXFP4" (arXiv 2502.20586), which shows that
    gradients need stochastic rounding, without saturation, and the random Hadamard transform. It keeps the forward in
    higher precision, and scales gradients by 3/4 for nothing to saturate; here their scale is rounded up instead.
    """
    return Recipe(
        {"fmt": "mxfp4", "block": (1, 32), "noise": "none"},
        Operand("mxfp4"),
        Operand("mxfp4", scale="ceil", rounding="stochastic", hadamard=32),
    )
