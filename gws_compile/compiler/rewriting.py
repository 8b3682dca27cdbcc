"""Rewriting the graphs of one backend, and the record that is kept of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from ..config import Config
from ..passes import Rewrite, Weight, rewrite, treatment_of
from ..report.collect import graph_record, weight_record
from ..report.records import GraphRecord, WeightRecord
from ..runtime.trace_names import TracedWeight, called_weights, traced_weights
from ..torch_internals.dynamo import timed, trace_artifact
from ..torch_internals.graphs import placeholder_source
from .diagnostics import Diagnostics
from .products import GraphProducts

log = logging.getLogger("gws_compile")


class Rewriting:
    """Rewrites each graph that comes, has it looked at, and keeps what reports are made of.

    Args:
        config: the settings.
        diagnostics: looks at each rewritten graph's weights.

    Attributes:
        graphs: the rewritten graphs, in the order in which they came.
        graph_records: a record of each.
        records: their weights, each with its record, graph by graph.
        products: of each rewritten graph, other forms included, what becomes of its products.
    """

    def __init__(self, config: Config, diagnostics: Diagnostics) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.graph_records: list[GraphRecord] = []
        self.records: list[tuple[Weight, WeightRecord]] = []
        self.products: dict[fx.GraphModule, GraphProducts] = {}
        self._config = config
        self._diagnostics = diagnostics
        self._tables = _Tables()

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[Rewrite, list[WeightRecord]]:
        """Rewrite a graph.

        Args:
            gm: Dynamo's graph; it stays as it is.
            example_inputs: its inputs, real or fake.

        Returns:
            What the passes made of it, and the records of its weights, in the same order.

        Raises:
            ValueError: under ``strict``, when no weight is rewritten or an included one is left alone.
        """
        number = len(self.graphs)
        with timed("gws_compile.rewrite"):
            traced = traced_weights(_inputs(gm, example_inputs))
            # Where a graph break, or DDP's graph splitting, lies between embedding and head, the head's graph cannot
            # tell that its weight is tied.
            rewritten = rewrite(
                gm,
                self._config,
                number=number,
                names={source: weight.names for source, weight in traced.items()},
                is_table=lambda weight: self._tables.has(weight, traced.get(weight.source)),
            )
        weights = rewritten.weights
        for weight in weights:
            if weight.embedded:
                self._tables.add(weight, traced.get(weight.source))
        records = [weight_record(weight, self._config) for weight in weights]
        self._diagnostics.look_at(weights, has_parameters=_has_parameters(gm))
        self._keep(number, gm, rewritten, records)
        return rewritten, records

    def again(
        self, gm: fx.GraphModule, known: Sequence[Weight], names: Mapping[str, tuple[str, ...]], *, gradients: bool
    ) -> Rewrite:
        """Rewrite a graph that came before, in another form.

        Args:
            gm: the graph, as Dynamo gave it.
            known: its weights, as they were found then.
            names: those of the weights, by their sources.
            gradients: as if it was traced with gradients enabled, or disabled.
        """
        tables = {weight.source for weight in known if weight.embedded}
        with torch.set_grad_enabled(gradients):
            rewritten = rewrite(
                gm, self._config, number=len(self.graphs), names=names, is_table=lambda weight: weight.source in tables
            )
        self._keep_products(len(self.graphs), rewritten)
        self.graphs.append(rewritten.module)
        self.records += [(weight, weight_record(weight, self._config)) for weight in rewritten.weights]
        return rewritten

    def form_of(self, weights: Sequence[Weight], tensors: Sequence[torch.Tensor]) -> dict[str, tuple[str, ...]] | None:
        """Whether a graph that several layers share serves these weights, from inside its call.

        Args:
            weights: those of the graph.
            tensors: what it is called with for them.

        Returns:
            None where it does; else, by source, the names by which it would have been rewritten another way, since
            ``include``, ``exclude`` and ``rules`` choose by name.
        """
        called = called_weights(tensors)
        names = {w.source: w.names if one is None else one.names for w, one in zip(weights, called, strict=True)}
        read = [weight for weight in weights if weight.reads]
        before = [treatment_of(weight.names, self._config) for weight in read]
        return None if before == [treatment_of(names[weight.source], self._config) for weight in read] else names

    def _keep(self, number: int, gm: fx.GraphModule, rewritten: Rewrite, records: list[WeightRecord]) -> None:
        before = gm.print_readable(print_output=False)  # the graph itself goes when it is compiled
        self._keep_products(number, rewritten)
        self.graphs.append(rewritten.module)
        self.graph_records.append(graph_record(number, gm, before, rewritten))
        self.records += zip(rewritten.weights, records, strict=True)
        log.info(
            "graph %d: %d weights found, %d rewritten; %d nodes before, %d after",
            number,
            len(records),
            sum(record.rewritten for record in records),
            len(gm.graph.nodes),
            len(rewritten.module.graph.nodes),
        )
        for run in rewritten.runs:
            log.debug("graph %d: %s", number, run)
        for record in records:
            log.debug("graph %d: %s: %s", number, record.name, record.reason or "rewritten")
        trace_artifact(f"gws_compile_before_{number}", lambda: before)
        trace_artifact(f"gws_compile_after_{number}", partial(rewritten.module.print_readable, print_output=False))

    def _keep_products(self, number: int, rewritten: Rewrite) -> None:
        self.products[rewritten.module] = GraphProducts(number, rewritten, self._config)


class _Tables:
    """Weights in which graphs look rows up, by their places; those that no known module holds by name and shape."""

    def __init__(self) -> None:
        self._places: WeakIdKeyDictionary = WeakIdKeyDictionary()  # module -> attributes
        self._names: set[tuple[str, tuple[int, ...]]] = set()

    def add(self, weight: Weight, traced: TracedWeight | None) -> None:
        """Keep a weight."""
        if traced is None:
            self._names.add((weight.name, weight.shape))
            return
        for held in traced.places:
            known = self._places.get(held.owner, frozenset())  # type: ignore[no-untyped-call]
            self._places[held.owner] = known | {held.attribute}

    def has(self, weight: Weight, traced: TracedWeight | None) -> bool:
        """Whether a weight is kept."""
        if traced is None:
            return (weight.name, weight.shape) in self._names
        return any(
            held.attribute in self._places.get(held.owner, ())  # type: ignore[no-untyped-call]
            for held in traced.places
        )


def _inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[str, Any]:
    """The inputs of a graph by source."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    sources = map(placeholder_source, placeholders)
    return {source: value for source, value in zip(sources, example_inputs, strict=False) if source is not None}


def _has_parameters(gm: fx.GraphModule) -> bool:
    sources = (placeholder_source(node) or "" for node in gm.graph.find_nodes(op="placeholder"))
    return any("_parameters[" in source for source in sources)
