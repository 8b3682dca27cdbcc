"""An einsum of two operands, read from a node of Dynamo's graph."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx


class Einsum(NamedTuple):
    """An einsum.

    Attributes:
        letters: those of each operand.
        values: the operands, as they are given.
        output: the letters of the result; empty where they are not written.
        summed: the letters that it sums over, in the order of the first operand's.
    """

    letters: tuple[str, str]
    values: tuple[object, object]
    output: str
    summed: str


def einsum_of_two(node: fx.Node) -> Einsum | None:
    """What an einsum of two operands says; None for one of others, or with an ellipsis."""
    flat = [one for arg in node.args for one in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    if len(flat) != 3 or not isinstance(flat[0], str) or "..." in flat[0]:
        return None
    inputs, _, output = flat[0].replace(" ", "").partition("->")
    first, second = inputs.split(",")
    summed = "".join(one for one in first if one in second and one not in output)
    return Einsum((first, second), (flat[1], flat[2]), output, summed)
