"""Rewriting the graphs of one backend, and the record that is kept of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from ..config import Config
from ..passes import Rewrite, Weight, rewrite
from ..report.collect import graph_record, weight_record
from ..report.records import GraphRecord, WeightRecord
from ..torch_internals.dynamo import timed, trace_artifact
from ..torch_internals.fake_tensors import is_fake
from ..torch_internals.graphs import placeholder_source
from .diagnostics import Diagnostics

log = logging.getLogger("gws_compile")


class Rewriting:
    """Rewrites each graph that comes, has it looked at, and keeps what reports are made of.

    Args:
        config: the settings.
        diagnostics: looks at each rewritten graph's weights.

    Attributes:
        graphs: the rewritten graphs, in the order in which they came.
        graph_records: a record of each.
        weight_records: the records of their weights, graph by graph.
    """

    def __init__(self, config: Config, diagnostics: Diagnostics) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.graph_records: list[GraphRecord] = []
        self.weight_records: list[WeightRecord] = []
        self._config = config
        self._diagnostics = diagnostics
        self._tables = _MetWeights()
        self._met = _MetWeights()

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
            # Where a graph break, or DDP's graph splitting, lies between embedding and head, the head's graph cannot
            # tell that its weight is tied.
            rewritten = rewrite(
                gm, self._config, number=number, is_table=lambda weight: self._tables.has(weight, example_inputs)
            )
        weights = rewritten.weights
        self._tables.add([weight for weight in weights if weight.embedded], example_inputs)
        self._met.add(weights, example_inputs)
        records = [weight_record(weight, self._config) for weight in weights]
        self._diagnostics.look_at(weights, has_parameters=_has_parameters(gm))
        self._keep(number, gm, rewritten, records)
        return rewritten, records

    def has_met(self, weight: torch.Tensor) -> bool:
        """Whether a graph was traced with this Parameter."""
        return self._met.holds(weight)

    def _keep(self, number: int, gm: fx.GraphModule, rewritten: Rewrite, records: list[WeightRecord]) -> None:
        before = gm.print_readable(print_output=False)  # the graph itself goes when it is compiled
        self.graphs.append(rewritten.module)
        self.graph_records.append(graph_record(number, gm, before, rewritten))
        self.weight_records += records
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


class _MetWeights:
    """Weights of graphs: as Parameters, or, of fake inputs, by name and shape."""

    def __init__(self) -> None:
        self._parameters: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._names: set[tuple[str, tuple[int, ...]]] = set()

    def add(self, weights: Sequence[Weight], inputs: Sequence[Any]) -> None:
        """Keep these weights of a graph with these inputs."""
        for weight in weights:
            given = inputs[weight.position]
            if is_fake(given):
                self._names.add((weight.name, weight.shape))
            else:
                self._parameters[given] = True

    def has(self, weight: Weight, inputs: Sequence[Any]) -> bool:
        """Whether this weight of a graph with these inputs is kept."""
        given = inputs[weight.position]
        return (weight.name, weight.shape) in self._names if is_fake(given) else self.holds(given)

    def holds(self, given: torch.Tensor) -> bool:
        """Whether this Parameter is kept."""
        return bool(self._parameters.get(given, False))  # type: ignore[no-untyped-call]


def _has_parameters(gm: fx.GraphModule) -> bool:
    sources = (placeholder_source(node) or "" for node in gm.graph.find_nodes(op="placeholder"))
    return any("_parameters[" in source for source in sources)
