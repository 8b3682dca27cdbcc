"""Find the products in AOTAutograd's graph, and say of each which weight's it is, and of which kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx

from gws_compile.ops import round_operand  # noqa: F401  (registers the operator)
from gws_compile.ops.sample_arguments import SampleArguments
from gws_compile.settings.operands import ProductSettings
from gws_compile.torch_internals.graphs import is_tangent, sequence_number
from gws_compile.torch_internals.stack_trace import source_of

from . import convolutions, grouped_fallback
from .matrix_products import ATTENTION, LEFT_ALONE, Operand, name_of, operands_of
from .values import JOINS, handed_on

Role = Literal["weight", "activation", "gradient"]

Kind = Literal["forward", "dgrad", "wgrad", ""]

NO_NUMBERS = "autograd's numbers of operations are missing, by which it would be told whose gradient it is"
"""Why the products of the backward are not told apart on a torch that writes their numbers otherwise."""

_NOBODYS = "no operand is a sampled weight"

_SAMPLE = torch.ops.gws.sample_weight.default

_ROUNDED = torch.ops.gws.round_operand.default


@dataclass(frozen=True)
class Factor:
    """An operand of a product.

    Attributes:
        operand: where it stands, and what is summed over.
        role: what it is.
        node: what stands there.
        rounded: how it is rounded, in words; empty where it stays as it is.
    """

    operand: Operand
    role: Role
    node: fx.Node
    rounded: str = ""


@dataclass(frozen=True)
class Product:
    """A product.

    Attributes:
        node: the operation.
        op: its name.
        location: ``file:line`` of the user's code; empty where unknown.
        kind: ``x w``, ``dy w``, ``dy x`` of a sampled weight; empty for another product.
        factors: its operands.
        sample: the sample of the weight whose product it is.
        reason: why operands of it are not rounded that would be otherwise; empty where there is none.
    """

    node: fx.Node
    op: str
    location: str
    kind: Kind
    factors: tuple[Factor, ...]
    sample: fx.Node | None = None
    reason: str = ""

    @property
    def settings(self) -> ProductSettings:
        """Those of the weight."""
        return ProductSettings() if self.sample is None else ProductSettings.parse(arguments_of(self.sample).products)

    def factor(self, role: Role) -> Factor:
        """The operand of a role."""
        return next(factor for factor in self.factors if factor.role == role)


def arguments_of(sample: fx.Node) -> SampleArguments:
    """The arguments of a sample."""
    return SampleArguments.of(sample)


def find_products(graph: fx.Graph) -> list[Product]:
    """The products of a graph in their order; the backward of a convolution is taken apart, where it is a weight's.

    A product of a gradient and an activation is that of the weight which the activation is multiplied with in forward,
    by the product that has the same number in autograd's sequence: an activation may be multiplied with several
    weights, some of which are left alone.

    Args:
        graph: see `gws_compile.passes.products.round_operands`.
    """
    found = _Finder(graph)
    products = [product for node in list(graph.nodes) for product in found.products_at(node)]
    return [found.with_weight(product, products) for product in products]


class _Finder:
    def __init__(self, graph: fx.Graph) -> None:
        self._gradients = _depending(graph)
        self._origins: dict[fx.Node, fx.Node] = {}

    def products_at(self, node: fx.Node) -> Iterator[Product]:
        """The products that an operation is."""
        name = name_of(node)
        operands = operands_of(node)
        if operands is not None:
            product = self._classified(node, operands)
            if product.kind in ("forward", "dgrad") or not self._multiplies_rounded(product):
                yield product
        elif name == convolutions.FORWARD:
            yield self._convolution(node)
        elif name == convolutions.BACKWARD:
            yield from self._convolution_backward(node)
        elif name == grouped_fallback.BACKWARD:
            yield from self._experts_backward(node)
        elif name in ATTENTION:
            yield _left(node, "attention as one operation: attention= takes it apart")
        elif name in LEFT_ALONE or (name and node.target is not _SAMPLE and self._reads_weight(node)):
            yield _left(node, f"{name} is not rounded")

    def origin(self, node: fx.Node) -> fx.Node:
        """What a value is before it was rearranged, converted, or scaled by a number."""
        if node not in self._origins:
            before = handed_on(node)
            joined = self._joined(node)
            if joined is not None:
                self._origins[node] = joined
            else:
                self._origins[node] = node if before is None else self.origin(before)
        return self._origins[node]

    def _joined(self, node: fx.Node) -> fx.Node | None:
        """The first of the samples that a node joins, where it joins samples alone, with the same settings."""
        if name_of(node) not in JOINS or not isinstance(node.args[0], (list, tuple)):
            return None
        parts = [self.origin(part) for part in node.args[0] if isinstance(part, fx.Node)]
        if not all(part.target is _SAMPLE for part in parts):
            return None
        same = {ProductSettings.parse(arguments_of(part).products) for part in parts}
        return parts[0] if len(same) == 1 else None

    def role(self, node: fx.Node) -> Role:
        """What an operand is."""
        if node in self._gradients:
            return "gradient"
        return "weight" if self.origin(node).target is _SAMPLE else "activation"

    def _reads_weight(self, node: fx.Node) -> bool:
        """Whether something else than a view takes a sample."""
        if name_of(node) in JOINS or node in self._gradients or handed_on(node) is not None:
            return False
        return any(self.origin(given).target is _SAMPLE for given in node.all_input_nodes)

    def _multiplies_rounded(self, product: Product) -> bool:
        """Whether it is one of attention's, whose operands another pass has rounded, and listed, before."""
        activations = (factor.node for factor in product.factors if factor.role == "activation")
        return any(self.origin(node).target is _ROUNDED for node in activations)

    def _classified(self, node: fx.Node, operands: Iterable[Operand]) -> Product:
        factors = []
        for operand in operands:
            given = node.args[operand.position]
            assert isinstance(given, fx.Node)
            factors.append(Factor(operand, self.role(given), given))
        return self._of_kind(node, tuple(factors))

    def _of_kind(self, node: fx.Node, factors: tuple[Factor, ...]) -> Product:
        roles = {factor.role for factor in factors}
        weights = [self.origin(factor.node) for factor in factors if factor.role == "weight"]
        kind: Kind = ""
        reason = ""
        if roles == {"activation", "weight"}:
            kind = "forward"
        elif roles == {"gradient", "weight"}:
            kind = "dgrad"
        elif roles == {"gradient", "activation"}:
            kind = "wgrad"
        elif roles == {"weight"}:
            reason = "a product of two weights"
        elif roles == {"activation"}:
            reason = _NOBODYS
        else:
            reason = "a product of two gradients"
        sample = weights[0] if kind in ("forward", "dgrad") else None
        return Product(node, name_of(node), source_of(node).place, kind, factors, sample, reason)

    def _convolution(self, node: fx.Node) -> Product:
        about = convolutions.convolution_of(node, backward=False)
        # (batch, channels, places): the channels are rows.
        product = self._classified(node, (Operand(0, 1, True), Operand(1, 0, about.transposed)))
        return _refused(product, about)

    def _convolution_backward(self, node: fx.Node) -> Iterator[Product]:
        about = convolutions.convolution_of(node, backward=True)
        given = node.args[convolutions.WEIGHT]
        if not isinstance(given, fx.Node) or self.role(given) != "weight":
            yield _left(node, _NOBODYS)
            return
        gradient, x = node.args[convolutions.GRADIENT], node.args[convolutions.INPUT]
        assert isinstance(gradient, fx.Node)
        assert isinstance(x, fx.Node)
        factors = {
            "dgrad": (
                Factor(Operand(convolutions.GRADIENT, 1, True), "gradient", gradient),
                Factor(Operand(convolutions.WEIGHT, 0, not about.transposed), "weight", given),
            ),
            # Over batch and places, the columns of what has the channels in front.
            "wgrad": (
                Factor(Operand(convolutions.GRADIENT, 0, False), "gradient", gradient),
                Factor(Operand(convolutions.INPUT, 0, False), "activation", x),
            ),
        }
        for product in self._of_parts(convolutions.split_backward(node), factors, self.origin(given)):
            yield _refused(product, about)

    def _experts_backward(self, node: fx.Node) -> Iterator[Product]:
        given = [node.args[i] for i in (grouped_fallback.INPUT, grouped_fallback.WEIGHT, grouped_fallback.GRADIENT)]
        x, weight, gradient = (one for one in given if isinstance(one, fx.Node))
        if self.role(weight) != "weight":
            yield _left(node, _NOBODYS)
            return
        at_gradient, at_input = grouped_fallback.GRADIENT, grouped_fallback.INPUT
        factors = {
            "dgrad": (
                Factor(Operand(at_gradient, 0, False), "gradient", gradient),
                Factor(Operand(grouped_fallback.WEIGHT, 1, False), "weight", weight),
            ),
            "wgrad": (
                Factor(Operand(at_gradient, 0, True, ragged=True), "gradient", gradient),
                Factor(Operand(at_input, 0, True, ragged=True), "activation", x),
            ),
        }
        yield from self._of_parts(grouped_fallback.split_backward(node), factors, self.origin(weight))

    def _of_parts(
        self, parts: Mapping[str, fx.Node], factors: Mapping[str, tuple[Factor, ...]], sample: fx.Node
    ) -> Iterator[Product]:
        """The products of a backward that is taken apart, by their kinds."""
        self._gradients.update(parts.values())
        kinds: tuple[Kind, ...] = ("dgrad", "wgrad")
        for kind in kinds:
            if kind in parts:
                part = parts[kind]
                yield Product(part, name_of(part), source_of(part).place, kind, factors[kind], sample)

    def with_weight(self, product: Product, products: list[Product]) -> Product:
        """The product with its weight, where it is one of gradient and activation of which that is to be found out."""
        if product.kind != "wgrad" or product.sample is not None:
            return product
        number = sequence_number(product.node)
        forward = [one for one in products if one.kind == "forward"]
        if number is None or any(sequence_number(one.node) is None for one in forward):
            return replace(product, kind="", reason=NO_NUMBERS)
        x = self.origin(product.factor("activation").node)
        same = [one for one in forward if sequence_number(one.node) == number]
        known = [one for one in same if self.origin(one.factor("activation").node) is x]
        if len({one.sample for one in known}) != 1:
            return replace(product, kind="", reason=_NOBODYS)
        return replace(product, sample=known[0].sample)


def _depending(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on a gradient that comes in."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if is_tangent(node) or any(given in found for given in node.all_input_nodes):
            found.add(node)
    return found


def _left(node: fx.Node, reason: str) -> Product:
    return Product(node, name_of(node), source_of(node).place, "", (), None, reason)


def _refused(product: Product, about: convolutions.Convolution) -> Product:
    if about.of_window_alone and product.kind:
        return replace(product, reason="a depthwise convolution sums over its window alone")
    return product
