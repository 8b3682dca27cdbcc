"""The pass over AOTAutograd's graphs: rounding what sampled weights are multiplied with, forward and backward.

Dynamo's graph has the products of the forward alone. In the graph that AOTAutograd traces of it, the joint one, those
of the backward stand too, and gradients have been derived: what is rounded there is rounded straight through.

    find_products   lists the products, and says of each which weight's it is, and of which kind      changes nothing
    round_products  rounds the operands that the weights' settings name

What is to be done is read off the graph: each ``gws::sample_weight`` has the settings of its products as an argument.
So the pass is a function of the graph alone, compile caches see everything that it depends on, and no more is needed
for their keys than `identity`, what the pass itself is.

    matrix_products  which operands an operation multiplies, and which of their sides are summed over
    convolutions     the same of convolutions, whose backward is one operation
    grouped_fallback the same of transformers' grouped product of experts
    values           what a value was before it was rearranged
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from gws_compile.passes import summed_sides
from torch import fx

from gws_compile.settings import operands

from .find_products import NO_NUMBERS, Factor, Product, find_products
from .round_products import round_products

__all__ = ["NO_NUMBERS", "Factor", "Product", "find_products", "identity", "round_operands"]


def round_operands(graph: fx.Graph, names: Sequence[str] = ()) -> list[Product]:
    """Round the operands of the products in one graph: a joint one, or one of the forward alone.

    Args:
        graph: of ATen's operations, as AOTAutograd traces them; changed in place.
        names: of the weights by the numbers of their samples, for messages.

    Returns:
        What became of each product.

    Raises:
        ValueError: an operand cannot be rounded as is asked for; the message names the product.
    """
    products = find_products(graph)
    return round_products(graph, products, names)


@cache
def identity() -> bytes:
    """What the pass is, for the keys of compile caches: a hash of its sources."""
    digest = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.glob("*.py")), Path(summed_sides.__file__), Path(operands.__file__)):
        digest.update(path.read_bytes())
    return digest.digest()
