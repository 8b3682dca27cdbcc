"""What a backend tells of its weights: the report, with histograms, and the metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..config import Config
from ..learned_bits.learned_widths import LearnedWidths
from ..learned_bits.summary import average_width
from ..learned_levels.learned_levels import LearnedLevels
from ..passes import Weight
from ..report.histograms import Histogram, histogram
from ..report.measure import measure
from ..report.metrics import Metrics
from ..report.records import WeightRecord
from ..report.report import Report
from ..report.sampled_parts import SamplingState
from ..report.untraced import is_untraced, untraced_record
from ..runtime.clock import Clock
from ..runtime.sampled_weights import SampledWeight, sampled_weights, unique_names
from ..runtime.weight_slots import WeightSlots
from .rewriting import Rewriting


class Reporting:
    """Makes reports and metrics of what has been rewritten and called so far.

    Args:
        config: the settings.
        rewriting: has the records.
        slots: the weights that graphs were called with, and those of their models.
        clock: numbers the draws.
        learned: the learned widths; None where widths are fixed.
        levels: the trained levels; None where no weight is cast to some.
    """

    def __init__(
        self,
        config: Config,
        rewriting: Rewriting,
        slots: WeightSlots,
        clock: Clock,
        learned: LearnedWidths | None,
        levels: LearnedLevels | None,
    ) -> None:
        self._config = config
        self._rewriting = rewriting
        self._slots = slots
        self._clock = clock
        self._learned = learned
        self._levels = levels

    def report(self) -> Report:
        """See `gws_compile.Backend.report`."""
        return Report(
            self._records(),
            None if self._learned is None else self._learned.summary(),
            graphs=self._rewriting.graph_records,
            products=[record for graph in self._rewriting.products.values() for record in graph.records()],
            settings=self._config.texts(),
            histograms=self.histograms,
        )

    def _records(self) -> Iterator[WeightRecord]:
        """The records of every weight, each under its own name: what graphs say of it, or that none has it.

        One graph may serve many layers, or several models, each with weights of their own.
        """
        records = {id(weight): record for weight, record in self._rewriting.records}
        listed = [slot for slot in self._slots if slot.graphs or is_untraced(slot)]
        names = unique_names(listed)
        met: set[int] = set()
        for slot in listed:
            known = [weight for weight in slot.graphs if id(weight) in records]
            met.update(map(id, known))
            yield from (self._as_now(weight, records[id(weight)], names[slot]) for weight in known)
            if not slot.graphs and (slot.dtype.is_floating_point or slot.dtype.is_complex):
                yield untraced_record(slot, names[slot], self._config)
        # Of graphs that have not been called.
        yield from (record for weight, record in self._rewriting.records if id(weight) not in met)

    def _as_now(self, weight: Weight, record: WeightRecord, name: str) -> WeightRecord:
        """A record under the weight's own name, with its bit width at this draw."""
        bits = None if record.bits is None else self._config.bits_at(self._clock.step, weight.settings)
        return replace(record, name=name, bits=bits)

    def histograms(self, count: int) -> list[Histogram]:
        """Of so many of the sampled weights that are alive, evenly spread."""
        found = list(sampled_weights(self._slots))
        chosen = found if len(found) <= count else [found[i * len(found) // count] for i in range(count)]
        with torch.no_grad():
            return [histogram(weight, self._width_of(weight)[0], self._state()) for weight in chosen]

    def metrics(self) -> Metrics:
        """See `gws_compile.Backend.metrics`."""
        state = self._state()
        with torch.no_grad():
            measured = [measure(weight, *self._width_of(weight), state) for weight in sampled_weights(self._slots)]
        return Metrics(measured, state.draw.step)

    def average_bits(self) -> float:
        """The average bit width over all elements of the sampled weights, where none is learned."""
        widths = [(self._fixed_width(w), w.value.numel()) for w in sampled_weights(self._slots) if w.noisy]
        if not widths:
            return self._config.bits_at(self._clock.step)
        return sum(width * n for width, n in widths) / sum(n for _, n in widths)

    def _fixed_width(self, weight: SampledWeight) -> float:
        return self._config.bits_at(self._clock.step, weight.settings)

    def _state(self) -> SamplingState:
        return SamplingState(self._config, self._clock.state)

    def _width_of(self, weight: SampledWeight) -> tuple[torch.Tensor | None, float]:
        """The width parameter of a weight, or its levels, None where it has neither, and its average bit width."""
        table = weight.settings.levels
        if table is not None and self._levels is not None:
            levels = self._levels.parameters.current(weight.slot, table, weight.value.device)
            return levels, self._fixed_width(weight)
        if self._learned is None or weight.settings.learned is None:
            return None, self._fixed_width(weight)
        rule = self._learned.parameters.rule
        found = self._learned.parameters.find(weight.slot)
        if found is None:  # none yet: b_i starts at 1, where the width is `LearnedBits.init`
            return torch.ones((), dtype=torch.float32, device=weight.value.device), rule.init
        return found.parameter, average_width(found, rule)
