"""Weights that are computed with before they are read: weight norm, spectral norm, adapters merged into their base.

The value that such a product or convolution multiplies by is made of parameters and buffers alone. Noise on the
parameters would be other noise than that of the weight that is deployed, so they are left alone, and reported so.
"""

from __future__ import annotations

from torch import fx

from gws_compile.source_names import is_buffer, is_parameter
from gws_compile.torch_internals.graphs import placeholder_source

from . import operations
from .bodies import body_of, nodes, placeholders_of


def parameters_alone(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose value depends on no input of the model but parameters and buffers, those of bodies included."""
    found: set[fx.Node] = set()
    for node in gm.graph.find_nodes(op="placeholder"):
        source = placeholder_source(node) or ""
        if is_parameter(source) or is_buffer(source):
            found.add(node)
    for module, node in nodes(gm):
        body = body_of(module, node)
        if body is not None:
            for operand in node.all_input_nodes:
                if operand in found:
                    found.update(placeholders_of(body, node, operand))
        elif node.op not in ("placeholder", "output") and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def reader_of(gm: fx.GraphModule, start: fx.Node, constants: set[fx.Node], *, anywhere: bool) -> str:
    """The operation that reads, as its weight, what ``start`` computes, and multiplies an activation by it.

    What is computed of parameters alone is followed through everything, what is computed with activations only from
    element to element, and to operations in which the weight has a place of its own: a layer's activations are made of
    parameters too.

    Args:
        gm: the graph, or checkpoint body, in which ``start`` stands.
        start: the computing node.
        constants: `parameters_alone` of the whole graph.
        anywhere: whether a matrix product reads either operand; otherwise the second only, since the first may be an
            activation made of parameters, such as learned queries.

    Returns:
        Its name; empty if there is none.
    """
    seen: set[fx.Node] = set()
    pending = [(gm, start)]
    while pending:
        module, value = pending.pop()
        alone = value in constants
        if value in seen or not (alone or value.op == "placeholder" or operations.is_computing(value)):
            continue
        seen.add(value)
        for user in value.users:
            body = body_of(module, user)
            name = operations.name_of(user)
            if body is not None:
                pending += [(body, placeholder) for placeholder in placeholders_of(body, user, value)]
            elif name in operations.PRODUCTS and not alone:
                continue
            elif operations.is_read(user, value) and (name not in operations.PRODUCTS or user not in constants):
                if anywhere or operations.is_weight_of(user, value):
                    return name
            elif name not in operations.READS or name in operations.PRODUCTS:
                pending.append((module, user))
    return ""
