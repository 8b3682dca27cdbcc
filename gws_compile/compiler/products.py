"""What became of the products of a graph: noted when AOTAutograd's graph comes by, or found out by tracing it."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import fx

from ..config import Config
from ..passes import Rewrite
from ..passes.bodies import copy_with_bodies
from ..passes.products import NO_NUMBERS, Product, identity, round_operands
from ..report.records import ProductRecord
from ..torch_internals.compilers import GraphPass, traced
from ..torch_internals.fake_tensors import in_one_mode
from ..torch_internals.graphs import example_value
from ..warning import GwsWarning

log = logging.getLogger("gws_compile")


class GraphProducts:
    """The products of one rewritten graph.

    Args:
        number: of the graph among the backend's.
        rewritten: the graph.
        config: what it was rewritten with.
    """

    def __init__(self, number: int, rewritten: Rewrite, config: Config) -> None:
        self._number = number
        self._module = rewritten.module
        self._gradients = rewritten.gradients
        self._decomposed = config.inner == "inductor"
        self._names = [sample.weight.name for sample in rewritten.samples]
        self._attention = tuple(
            ProductRecord(number, "", "attention", use.op, use.location, {"attention": use.rounded}, use.reason)
            for use in rewritten.attention
        )
        self._found: tuple[ProductRecord, ...] | None = None if config.products.change_something else ()

    @property
    def graph_pass(self) -> GraphPass | None:
        """The pass over AOTAutograd's graph; None where nothing is rounded in it."""
        return None if self._found == () else GraphPass(self._run, identity())

    def records(self) -> tuple[ProductRecord, ...]:
        """What became of each product.

        Where compile caches had the compiled graph, nothing came by: then it is traced once more, for the record.
        """
        if self._found is None:
            try:
                self._trace()
            except Exception as error:  # a report is to come out whatever the graph
                log.debug("graph %d was not traced for the report of its products", self._number, exc_info=True)
                reason = f"the products of this graph could not be traced for the report: {error}"
                return (*self._attention, ProductRecord(self._number, "", "", "", "", {}, reason.partition("\n")[0]))
        return (*self._attention, *(self._found or ()))

    def _run(self, graph: fx.Graph) -> None:
        products = round_operands(graph, self._names)
        if any(product.reason == NO_NUMBERS for product in products):
            warnings.warn(
                f"activations and gradients of wgrad are not rounded on torch {torch.__version__}: {NO_NUMBERS}; see "
                "products in report()",
                GwsWarning,
                stacklevel=2,
            )
        self._found = tuple(map(self._record, products))

    def _trace(self) -> None:
        placeholders = self._module.graph.find_nodes(op="placeholder")
        added = [node for node in placeholders if node.name.startswith("gws_")]
        own = [example_value(node) for node in placeholders if node not in added]
        inputs = in_one_mode(own, [example_value(node) for node in added])
        with torch.set_grad_enabled(self._gradients):
            traced(copy_with_bodies(self._module), inputs, GraphPass(self._run, b""), decomposed=self._decomposed)
        if self._found is None:
            raise RuntimeError("AOTAutograd did not come by the pass")

    def _record(self, product: Product) -> ProductRecord:
        name = ""
        if product.sample is not None and product.settings.change_something:
            name = self._names[product.settings.number]
        operands: dict[str, str] = {factor.role: factor.rounded for factor in product.factors}
        return ProductRecord(self._number, name, product.kind, product.op, product.location, operands, product.reason)
