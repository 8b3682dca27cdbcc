"""Compiled functions over parameters, such as an optimizer's: what a report of ``gws run`` does not list of them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..report.records import WeightRecord
from ..report.report import Report
from ..source_names import is_parameter
from ..torch_internals.graphs import example_value, placeholder_source
from ..weight_names import qualified_name, without_number

_NOT_MULTIPLIED = (
    "written in place inside the graph",
    "no matrix product or convolution reads it",
    "not used in the graph",
)


def without_updates(report: Report) -> Iterator[WeightRecord]:
    """The records of a report without those of weights that a function only updates, or computes a norm of.

    These come into the function as its arguments, from no module, and are multiplied with nothing: a function that
    calls a model with weights of its own (``functional_call``) keeps its records.
    """
    loose = set(_loose_weights(report))
    for record in report:
        if not (record.reason.startswith(_NOT_MULTIPLIED) and (without_number(record.name), record.shape) in loose):
            yield record


def _loose_weights(report: Report) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of the weights of graphs that come from no module."""
    for graph in report.graphs:
        for node in graph.graph.graph.find_nodes(op="placeholder"):
            source, value = placeholder_source(node), example_value(node)
            # A weight's shape is of numbers; that of other inputs may have symbols in it.
            if source is not None and not is_parameter(source) and isinstance(value, nn.Parameter):
                yield qualified_name(source), tuple(value.shape)
