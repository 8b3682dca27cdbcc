"""Round the operands of the products of sampled weights, as their settings say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from gws_compile.passes.summed_sides import sums_over_rows
from torch import fx

from gws_compile.numerics.elements import parse_element
from gws_compile.ops import hadamard, round_operand  # noqa: F401  (register the operators)
from gws_compile.ops.sample_arguments import HadamardArguments, RoundArguments
from gws_compile.ops.sample_weight import DTYPES
from gws_compile.settings.operands import Operand, ProductSettings
from gws_compile.torch_internals.graphs import emit, fake_value, is_tangent

from . import convolutions
from .find_products import Factor, Product, arguments_of
from .matrix_products import name_of
from .values import handed_on


def round_products(graph: fx.Graph, products: Iterable[Product], names: Sequence[str]) -> list[Product]:
    """Round operands.

    Before::

        mm(x, permute(sample_weight))

    After::

        round_operand = gws.round_operand(x, ..., "e4m3", [1, 32], "floor", "nearest", ...)
        mm(round_operand, permute(sample_weight))

    Each operand of each product is rounded along what that product sums over, from the value as it was: the activation
    of wgrad is not the one that forward has rounded. What depends on nothing that comes in from behind is left to the
    backward all the same, so that nothing more is kept. Where a weight's blocks run along one side, its sample for a
    product that sums over the other has them turned, with the same noise.

    Args:
        graph: changed in place.
        products: of `gws_compile.passes.products.find_products.find_products`.
        names: of the weights, see `gws_compile.passes.products.round_operands`.

    Returns:
        The products, with what was done to their operands.

    Raises:
        ValueError: a transform does not fit.
    """
    rounder = _Rounder(graph, names)
    return [rounder.round(product) for product in products]


class _Rounder:
    def __init__(self, graph: fx.Graph, names: Sequence[str]) -> None:
        self._graph = graph
        self._names = names
        self._joint = any(map(is_tangent, graph.nodes))
        self._made: dict[tuple[Any, ...], fx.Node] = {}
        self._met: Counter[tuple[fx.Node | None, str]] = Counter()

    def round(self, product: Product) -> Product:
        """Round the operands of one product."""
        settings = product.settings
        if not product.kind or product.reason or not settings.change_something:
            return product
        dtypes = {fake_value(factor.node).dtype for factor in product.factors}
        if not dtypes <= set(DTYPES):
            return replace(product, reason=f"operands of {', '.join(sorted(map(str, dtypes)))} are not rounded")
        self._met[product.sample, product.kind] += 1
        transform, reason = _transform(product, settings, self._name(settings.number))
        untold = self._untold(product, settings, transform)
        if untold:
            transform, reason = 0, untold
        factors = tuple(self._factor(product, factor, settings, transform) for factor in product.factors)
        return replace(product, factors=factors, reason=reason)

    def _untold(self, product: Product, settings: ProductSettings, transform: int) -> str:
        """Why a weight is not sampled for its product as it should be; empty where it is."""
        if product.kind == "wgrad" or not settings.rounds:
            return ""
        across, along = arguments_of(product.sample).block if product.sample is not None else (0, 0)
        if self._over_rows(product, product.factor("weight")) is not None or not (transform or across != along):
            return ""
        return "it cannot be told which side of its weight it sums over: the weight's blocks are as they were"

    def _name(self, number: int) -> str:
        return self._names[number] if number < len(self._names) else "a weight"

    def _factor(self, product: Product, factor: Factor, settings: ProductSettings, transform: int) -> Factor:
        assert product.kind
        if factor.role == "weight":
            new, rounded = self._weight(product, factor, settings, transform)
        else:
            operand = settings.activations if factor.role == "activation" else settings.gradients
            if operand is not None and not operand.rounds_in(product.kind):
                operand = None
            if operand is None and not transform:
                return factor
            new = self._operand(product, factor, operand, settings, transform)
            rounded = "" if operand is None else _said(operand, transform)
        if new is not factor.node:
            args = list(product.node.args)
            args[factor.operand.position] = new
            product.node.args = tuple(args)
        return replace(factor, rounded=rounded)

    def _operand(
        self, product: Product, factor: Factor, operand: Operand | None, settings: ProductSettings, transform: int
    ) -> fx.Node:
        """An activation or a gradient, transformed and rounded."""
        assert product.kind
        assert product.sample is not None
        sample = arguments_of(product.sample)
        stochastic = operand is not None and operand.rounding == "stochastic"
        # Two products that round alike have one rounding, unless it is drawn.
        place = 2 * self._met[product.sample, product.kind] + (product.kind == "wgrad") if stochastic else 0
        switch = settings.switch(product.kind)
        one_scale = operand is None or operand.sides == (None, None)
        value, matrices, restore = self._as_matrices(product, factor, one_scale=one_scale)
        batch_dims, rows = matrices
        if transform:
            arguments = HadamardArguments(value, transform, batch_dims, rows)
            value = self._emit(product, torch.ops.gws.hadamard.default, arguments.call(), factor)
        if operand is not None:
            rounded = RoundArguments(
                x=value,
                key=sample.key if stochastic else None,
                clock=sample.clock if stochastic or switch else None,
                batch_dims=batch_dims,
                fmt=operand.element.spec,
                block=operand.side_block(rows=rows),
                scale=operand.rule,
                rounding=operand.rounding,
                place=place,
                switch=switch,
            )
            value = self._emit(product, torch.ops.gws.round_operand.default, rounded.call(), factor)
        for target, args in restore:
            value = self._emit(product, target, (value, *args), factor)
        return value

    def _as_matrices(
        self, product: Product, factor: Factor, *, one_scale: bool
    ) -> tuple[fx.Node, tuple[int, bool], list[tuple[Any, tuple[Any, ...]]]]:
        """An operand as matrices that are rounded, its batch dims and whether rows are summed over, and the way back.

        A transposed operand is rounded as it was before, so that whoever has taken the graph apart, an element has the
        same index. Of a convolution the channels are brought to the front, and what is not of one group apart, unless
        all has one scale: of (channels, batch, places) forward and dgrad sum over the rows, wgrad over the columns.
        """
        aten, node, operand = torch.ops.aten, factor.node, factor.operand
        value = fake_value(node)
        if product.op in (convolutions.FORWARD, convolutions.BACKWARD):
            about = convolutions.convolution_of(product.node, backward=product.op == convolutions.BACKWARD)
            turned = [1, 0, *range(2, value.ndim)]
            channels = self._emit(product, aten.permute.default, (node, turned), factor)
            back = [(aten.permute.default, (turned,))]
            if product.kind == "wgrad":
                return channels, (0, False), back
            if about.groups == 1 or one_scale:
                return channels, (0, True), back
            shape = [value.shape[dim] for dim in turned]
            apart = [about.groups, shape[0] // about.groups, *shape[1:]]
            grouped = self._emit(product, aten.reshape.default, (channels, apart), factor)
            return grouped, (1, True), [(aten.reshape.default, (shape,)), *back]
        base = _transposed(node, operand.batch_dims)
        if base is not None:
            return base, (operand.batch_dims, not operand.over_rows), [(node.target, node.args[1:])]
        return node, (operand.batch_dims, operand.over_rows), []

    def _weight(
        self, product: Product, factor: Factor, settings: ProductSettings, transform: int
    ) -> tuple[fx.Node, str]:
        """The weight of a product, sampled for it, and how that is said."""
        assert product.kind
        assert product.sample is not None
        given = arguments_of(product.sample)
        turned = self._turned(product, factor, settings)
        switch = settings.switch(product.kind)
        block = _block_text(given.block[::-1] if turned else given.block)
        text = f"{parse_element(given.fmt).name}, {block}, {given.scale or 'no scale'}"
        if not (turned or transform or switch != given.switch):
            return factor.node, text
        over_rows = bool(self._over_rows(product, factor))
        late = product.kind == "dgrad"

        def again(sample: fx.Node) -> fx.Node:
            of_sample = arguments_of(sample)
            w = of_sample.w
            if transform:
                arguments = HadamardArguments(w, transform, of_sample.batch_dims, over_rows)
                w = self._add(product, torch.ops.gws.hadamard.default, arguments.call(), in_backward=late)
            changed = replace(of_sample, w=w, switch=switch)
            if turned:
                # Maxima of blocks that lie on several ranks are those of the blocks as they were; a part has its own.
                maxima = of_sample.maxima if of_sample.scale == "nvfp4" else None
                changed = replace(changed, block=list(of_sample.block[::-1]), maxima=maxima)
            return self._add(product, sample.target, changed.call(), in_backward=late)

        return self._replayed(product, factor.node, again, in_backward=late), text

    def _replayed(
        self, product: Product, node: fx.Node, again: Callable[[fx.Node], fx.Node], *, in_backward: bool
    ) -> fx.Node:
        """What is made of a sample, or of several that are joined, made of others."""
        if node.target is torch.ops.gws.sample_weight.default:
            return again(node)
        before = handed_on(node)
        sources = [before] if before is not None else node.args[0]
        assert isinstance(sources, (list, tuple))
        new = {one: self._replayed(product, one, again, in_backward=in_backward) for one in sources}
        args = fx.map_arg(node.args, lambda given: new.get(given, given))
        return self._add(product, node.target, args, in_backward=in_backward)

    def _turned(self, product: Product, factor: Factor, settings: ProductSettings) -> bool:
        """Whether the blocks of the weight's sample run along another side than the product sums over."""
        assert product.sample is not None
        given = arguments_of(product.sample)
        across, along = given.block
        if across == along or given.rule or not settings.rounds:
            return False
        if product.kind == "dgrad" and (settings.gradients is None or not settings.gradients.rounds_in("dgrad")):
            return False
        over_rows = self._over_rows(product, factor)
        if over_rows is None:
            return False
        return over_rows == ((along or math.inf) > (across or math.inf))  # 0 is a whole side

    def _over_rows(self, product: Product, factor: Factor) -> bool | None:
        """Whether the product sums over the rows of the weight's matrices."""
        assert product.sample is not None
        if product.op in (convolutions.FORWARD, convolutions.BACKWARD):
            return factor.operand.over_rows
        weight, operand = fake_value(product.sample), fake_value(factor.node)
        dim = -2 if factor.operand.over_rows else -1
        return sums_over_rows(weight, arguments_of(product.sample).batch_dims, operand, dim)

    def _emit(self, product: Product, target: Any, args: tuple[Any, ...], factor: Factor) -> fx.Node:
        # What depends on a gradient is in the backward anyway.
        late = product.kind == "wgrad" and factor.role == "activation"
        return self._add(product, target, args, in_backward=late)

    def _add(self, product: Product, target: Any, args: tuple[Any, ...], *, in_backward: bool) -> fx.Node:
        """A new node in front of a product; one that is there already, where the same has been made."""
        key = (target, in_backward, _hashable(args))
        if key not in self._made:
            with self._graph.inserting_before(product.node):
                self._made[key] = emit(self._graph, product.node, target, args, in_backward=in_backward and self._joint)
        return self._made[key]


def _transposed(node: fx.Node, batch_dims: int) -> fx.Node | None:
    """What a node is the transpose of, matrix by matrix; None where it is none."""
    name, dims = name_of(node), batch_dims + 2
    if name == "t":
        turned = dims == 2
    elif name == "transpose":
        turned = {int(dim) % dims for dim in node.args[1:3]} == {dims - 1, dims - 2}  # type: ignore[arg-type]
    elif name == "permute":
        turned = list(node.args[1]) == [*range(batch_dims), dims - 1, dims - 2]  # type: ignore[arg-type]
    else:
        return None
    base = node.args[0]
    return base if turned and isinstance(base, fx.Node) else None


def _said(operand: Operand, transform: int) -> str:
    """How an operand is rounded in a product, whose transform is that of both operands."""
    alone = replace(operand, hadamard=None, products=None).text
    return f"{alone}, hadamard {transform}" if transform else alone


def _transform(product: Product, settings: ProductSettings, name: str) -> tuple[int, str]:
    """The size of the transform of a product's operands, 0 for none; and why one that is asked for is left out."""
    asking = {"forward": settings.activations, "wgrad": settings.gradients, "dgrad": None}[product.kind or "dgrad"]
    if asking is None or asking.hadamard is None or not asking.rounds_in(product.kind):  # type: ignore[arg-type]
        return 0, ""
    size = asking.hadamard
    if product.op in (convolutions.FORWARD, convolutions.BACKWARD):
        return 0, "not transformed: a convolution does not sum over groups that lie side by side"
    if any(factor.operand.ragged for factor in product.factors):
        return 0, "not transformed: it sums over the tokens of each expert apart"
    for factor in product.factors:
        summed = _summed_size(product, factor)
        if summed % size:
            what = {"forward": "features", "wgrad": "tokens"}[product.kind or ""]
            raise ValueError(
                f"hadamard={size} does not divide the {summed} {what} that {product.kind} of {name} ({product.op}"
                f"{f' at {product.location}' if product.location else ''}) sums over: use another size, pad the "
                f"{what}, or exclude the weight"
            )
    return size, ""


def _summed_size(product: Product, factor: Factor) -> Any:
    value = fake_value(factor.node)
    return value.shape[-2 if factor.operand.over_rows else -1]


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return value


def _block_text(block: Iterable[int]) -> str:
    return " x ".join(str(side or "all") for side in block)
