"""Attention that a model writes out: a product of queries and keys, a softmax, a product with the values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gws_compile.passes import operations
from gws_compile.passes.einsum import einsum_of_two
from gws_compile.passes.operands import operands
from gws_compile.passes.sample_nodes import is_sample
from torch import fx

from gws_compile.torch_internals.graphs import example_value

_SOFTMAX = frozenset(("softmax", "_softmax", "_safe_softmax"))

# What lies between the scores and the softmax, and between that and the second product: element by element.
_BETWEEN = frozenset(
    "mul multiply div divide truediv true_divide add sub subtract masked_fill where to type_as float half bfloat16 "
    "type view reshape contiguous clamp clamp_min clamp_max tanh dropout getitem expand expand_as flatten unflatten "
    "squeeze unsqueeze nan_to_num cat slice narrow iadd isub imul itruediv masked_fill_ add_ mul_ div_ sub_".split()
)

_PRODUCTS = frozenset("matmul bmm baddbmm einsum".split())


class Multiplied(NamedTuple):
    """An operand of a product of attention.

    Attributes:
        node: the product.
        value: the operand.
        batch_dims: leading dims of it that count matrices.
        over_rows: the rows of these are summed over, not the columns.
        flattened: their columns, or rows, are more than one dim.
    """

    node: fx.Node
    value: fx.Node
    batch_dims: int
    over_rows: bool
    flattened: bool = False


class Attention(NamedTuple):
    """Attention, by what it multiplies.

    Attributes:
        softmax: the node between the two products.
        queries, keys, probabilities, values: the operands.
    """

    softmax: fx.Node
    queries: Multiplied
    keys: Multiplied
    probabilities: Multiplied
    values: Multiplied


def written_out(graph: fx.Graph, constants: set[fx.Node]) -> Iterator[Attention | fx.Node]:
    """Attention in a graph, in order; the softmax alone where its products are found, and are of a form not known.

    Args:
        graph: of Dynamo, with the weights' samples.
        constants: the nodes that are made of parameters alone: what is multiplied with such is no attention.
    """
    for node in graph.nodes:
        if operations.name_of(node) not in _SOFTMAX or not node.args:
            continue
        scores = _behind(node)
        context = _before(node)
        if scores is None or context is None:
            continue
        made_by, probabilities = context
        first, second = _two_operands(scores), _two_operands(made_by)
        values = [*(first or ()), *(second or ())]
        if any(one.value in constants or _is_sample(one.value) for one in values):
            continue
        if first is None or second is None:
            yield node
            continue
        q, k = first
        p, v = second if second[0].value is probabilities else reversed(second)
        yield Attention(node, q, k, p, v)


def _is_sample(node: fx.Node) -> bool:
    while operations.name_of(node) in operations.TRANSPARENT and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return is_sample(node)


def _behind(softmax: fx.Node) -> fx.Node | None:
    """The product that the scores come from."""
    pending, seen = list(softmax.all_input_nodes[:1]), set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        name = operations.name_of(node)
        if name in _PRODUCTS:
            return node
        if name in _BETWEEN:
            pending += node.all_input_nodes
    return None


def _before(softmax: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The product that the probabilities go to, and what it takes of them."""
    pending, seen = [softmax], set()
    while pending:
        node = pending.pop()
        seen.add(node)
        for user in node.users:
            name = operations.name_of(user)
            if name in _PRODUCTS:
                return user, node
            if name in _BETWEEN and user not in seen:
                pending.append(user)
    return None


def _two_operands(node: fx.Node) -> tuple[Multiplied, Multiplied] | None:
    """The operands of a product, each with the side that is summed over; None where that is not known."""
    name = operations.name_of(node)
    if name == "einsum":
        return _of_einsum(node)
    given = [one.value for one in operands(node) if isinstance(one.value, fx.Node)]
    first, second = given[1:3] if name == "baddbmm" else given[:2]
    dims = [getattr(example_value(one), "ndim", 0) for one in (first, second)]
    if min(dims) < 2:
        return None
    return Multiplied(node, first, dims[0] - 2, False), Multiplied(node, second, dims[1] - 2, True)


def _of_einsum(node: fx.Node) -> tuple[Multiplied, Multiplied] | None:
    einsum = einsum_of_two(node)
    if einsum is None or not einsum.output or len(einsum.summed) != 1:
        return None
    found = []
    for text, value in zip(einsum.letters, einsum.values, strict=True):
        if not isinstance(value, fx.Node):
            return None
        at = text.index(einsum.summed)
        last = at == len(text) - 1
        others_between = not last and at != len(text) - 2
        found.append(Multiplied(node, value, len(text) - 2 if last else at, not last, others_between))
    return found[0], found[1]
