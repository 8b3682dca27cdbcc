"""What was rewritten and what was not: `Report`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..learned_bits.summary import BitsSummary
from .collect import all_breaks, merged
from .histograms import Histogram
from .records import GraphBreak, GraphRecord, ProductRecord, WeightRecord

_LINE = "\n"


class Report:
    """The weights that a backend has seen, over all graphs compiled so far, and those of their models in no graph.

    ``print(report)`` shows a table. A weight that several graphs treat alike stands there once; one that is sampled in
    training and cast in evaluation stands there as sampled.

    Attributes:
        records: the weights.
        bits: what learned bit widths stand for now; None while widths are fixed, or before any is known.
        graphs: the traced graphs; a pickled report has none.
        products: where activations, gradients or attention are rounded, each product of the graphs, forward and
            backward, with what becomes of its operands; else none.
        breaks: the graph breaks, each once.
        settings: those of the backend, as text by name.
    """

    def __init__(
        self,
        records: Iterable[WeightRecord],
        bits: BitsSummary | None = None,
        *,
        graphs: Sequence[GraphRecord] = (),
        products: Iterable[ProductRecord] = (),
        breaks: Iterable[GraphBreak] = (),
        settings: Mapping[str, str] | None = None,
        histograms: Callable[[int], Sequence[Histogram]] | None = None,
    ) -> None:
        self.records = merged(records)
        self.bits = bits
        self.graphs = tuple(graphs)
        self.products = tuple(products)
        self.breaks = all_breaks(self.graphs, breaks)
        self.settings = dict(settings or {})
        self._histograms = histograms

    def __reduce__(self) -> tuple[Callable[..., Report], tuple[Any, ...]]:
        return _without_graphs, (self.records, self.bits, self.breaks, self.settings, self.products)

    @property
    def rewritten(self) -> tuple[WeightRecord, ...]:
        """The weights whose reads see the cast weight."""
        return tuple(r for r in self.records if r.rewritten)

    @property
    def skipped(self) -> tuple[WeightRecord, ...]:
        """The weights left alone; ``reason`` says why."""
        return tuple(r for r in self.records if not r.rewritten)

    @property
    def unrounded(self) -> tuple[ProductRecord, ...]:
        """The products of which something is not rounded that could be; ``reason`` says why."""
        return tuple(product for product in self.products if product.reason)

    @property
    def has_rules(self) -> bool:
        """Whether a rule holds of one of the weights."""
        return any(record.rule for record in self.records)

    @property
    def recompilations(self) -> tuple[GraphRecord, ...]:
        """The graphs of frames that were compiled before; ``recompiled`` says which guard failed."""
        return tuple(graph for graph in self.graphs if graph.recompiled)

    def __iter__(self) -> Iterator[WeightRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def to_json(self) -> str:
        """The records as a JSON array of objects, keyed as `WeightRecord`; learned bit widths are in `bits`."""
        return json.dumps([asdict(r) for r in self.records], indent=2)

    def to_dict(self) -> dict[str, Any]:
        """The whole report, the graphs' code left out, in what JSON knows.

        Keys: ``settings``; ``weights``, keyed as `WeightRecord`; ``bits``, as `BitsSummary` or null; ``products``, as
        `ProductRecord`; ``graphs``, with ``number``, ``compile_id``, ``location``, ``gradients`` and ``recompiled``;
        ``graph_breaks``, as `GraphBreak`.
        """
        keys = ("number", "compile_id", "location", "gradients", "recompiled")
        return {
            "settings": self.settings,
            "weights": [asdict(record) for record in self.records],
            "bits": None if self.bits is None else asdict(self.bits),
            "products": [asdict(product) for product in self.products],
            "graphs": [{key: getattr(graph, key) for key in keys} for graph in self.graphs],
            "graph_breaks": [asdict(one) for one in self.breaks],
        }

    def to_html(self, path: str | Path, *, weights: int = 6) -> None:
        """Write the report as one HTML page that needs nothing else: no network, no further file.

        It has the weights and their reads, graph breaks and recompilations with their causes, each graph before and
        after, and of some rewritten weights, while their model is alive, histograms of values, sample and noise.

        Args:
            path: of the page.
            weights: for how many weights, evenly spread over the model, histograms are shown.
        """
        from .html_page import render  # brings jinja2, which nothing else needs

        histograms = self._histograms(weights) if self._histograms is not None and weights > 0 else ()
        Path(path).write_text(render(self, histograms), encoding="utf-8")

    def __str__(self) -> str:
        if not self.records:
            return "gws_compile: no weights seen yet (nothing has been compiled)"
        columns = {
            "weight": [r.name for r in self.records],
            "shape": [" x ".join(map(str, r.shape)) for r in self.records],
            "read by": [r.op for r in self.records],
            "format": [r.fmt for r in self.records],
            "bits": ["" if r.bits is None else f"{r.bits:g}" for r in self.records],
            "block": [r.block for r in self.records],
            "scale": [r.scale for r in self.records],
            "noise": [r.noise if r.rewritten else f"left alone: {r.reason}" for r in self.records],
            "rule": [r.rule for r in self.records],
            "sparsity": [f"dense: {r.dense_because}" if r.dense_because else r.sparsity for r in self.records],
        }
        if not any(columns["sparsity"]):
            del columns["sparsity"]
        if not self.has_rules:  # the settings are the same for all
            for name in ("block", "scale", "rule"):
                del columns[name]
        table = tabulate(
            columns,
            headers="keys",
            colalign=["right" if name in ("shape", "bits") else "left" for name in columns],
            maxcolwidths=[60 if name in ("noise", "sparsity") else None for name in columns],
            disable_numparse=True,
        )
        parameters = sum(prod(r.shape) for r in self.rewritten)
        total = sum(prod(r.shape) for r in self.records)
        text = f"{table}\n{len(self.rewritten)} of {len(self)} weights rewritten, {parameters:,} of {total:,} elements"
        if self.settings.get("schedule", "none") != "none":
            text += f"\nschedule: {self.settings['schedule']}"
        if self.bits is not None:
            text += f"\n\n{self._bits_table(self.bits)}"
        if self.products:
            text += f"\n\n{self._products_text()}"
        for what, lines in (
            ("graph break", [f"{b.location or 'a whole frame is left'}: {b.cause}" for b in self.breaks]),
            ("recompilation", [f"{g.location}: {g.recompiled.partition(_LINE)[0]}" for g in self.recompilations]),
        ):
            if lines:
                text += f"\n\n{len(lines)} {what}{'s' if len(lines) > 1 else ''}:\n" + "\n".join(
                    f"  {x}" for x in lines
                )
        return text

    def _products_text(self) -> str:
        """How many products are rounded, and how; and those of which something is not."""
        counted = Counter(
            (product.kind, product.text) for product in self.products if product.kind and not product.reason
        )
        table = tabulate(
            [(kind, count, text) for (kind, text), count in counted.items()],
            headers=("product", "count", "operands"),
            colalign=("left", "right", "left"),
            disable_numparse=True,
        )
        left = Counter(
            (f"{one.kind} of {one.weight}" if one.weight else one.op, one.location, one.reason)
            for one in self.unrounded
        )
        lines = [
            f"  {what}{f' at {location}' if location else ''}{f', {count} times' if count > 1 else ''}: {reason}"
            for (what, location, reason), count in left.items()
        ]
        return "\n".join(
            [table, *([f"{len(self.unrounded)} products with operands left alone:"] if left else []), *lines]
        )

    def _bits_table(self, bits: BitsSummary) -> str:
        formats = list(bits.share)
        rows = [
            (name, f"{s.average:.2f}", *(f"{100 * s.share[f]:.1f} %" for f in formats), f"{s.stored_bytes / 1024:,.1f}")
            for name, s in [*bits.by_weight.items(), ("all", bits)]
        ]
        return tabulate(
            rows,
            headers=("learned bit widths", "average", *formats, "KiB"),
            colalign=("left", *["right"] * (len(formats) + 2)),
            disable_numparse=True,
        )

    __repr__ = __str__


def _without_graphs(
    records: Iterable[WeightRecord],
    bits: BitsSummary | None,
    breaks: Iterable[GraphBreak],
    settings: Mapping[str, str],
    products: Iterable[ProductRecord],
) -> Report:
    return Report(records, bits, breaks=breaks, settings=settings, products=products)
