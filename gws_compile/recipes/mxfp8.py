"""MXFP8: every operand in e4m3, in blocks of 32 along what is summed over, with power-of-two scales."""

from __future__ import annotations

from ..settings.operands import Operand
from ..settings.recipe import Recipe


def mxfp8() -> Recipe:
    """All three operands alike, each rounded anew for the product that it is in.

    Sources: OCP Microscaling Formats (MX) v1.0; "Recipes for Pre-training LLMs with MXFP8" (arXiv 2506.08027), which
    has e4m3 for gradients too, but rounds the scale up: ``scale="ceil"``. The scale here is the standard's,
    ``"floor"``, as in torchao's MX training.
    """
    operand = Operand("mxfp8")
    return Recipe({"fmt": "mxfp8", "block": (1, 32), "noise": "none"}, operand, operand)
