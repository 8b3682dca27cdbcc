"""What a backend tells of its weights: the report, with histograms, and the metrics."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..config import Config
from ..learned_bits.learned_widths import LearnedWidths
from ..learned_bits.summary import average_width
from ..report.histograms import Histogram, histogram
from ..report.measure import measure
from ..report.metrics import Metrics
from ..report.records import WeightRecord
from ..report.report import Report
from ..report.sampled_parts import SamplingState
from ..report.untraced import untraced_records
from ..runtime.clock import Clock
from ..runtime.sampled_weights import SampledWeight, SampledWeights
from ..runtime.weight_registry import WeightRegistry
from ..weight_names import ends_in, without_number
from .rewriting import Rewriting


class Reporting:
    """Makes reports and metrics of what has been rewritten and called so far.

    Args:
        config: the settings.
        rewriting: has the records.
        registry: names the weights, and knows the models.
        sampled: the weights that graphs were called with.
        clock: numbers the draws.
        learned: the learned widths; None where widths are fixed.
    """

    def __init__(
        self,
        config: Config,
        rewriting: Rewriting,
        registry: WeightRegistry,
        sampled: SampledWeights,
        clock: Clock,
        learned: LearnedWidths | None,
    ) -> None:
        self._config = config
        self._rewriting = rewriting
        self._registry = registry
        self._sampled = sampled
        self._clock = clock
        self._learned = learned

    def report(self) -> Report:
        """See `gws_compile.Backend.report`."""
        return Report(
            [*self._rewriting.weight_records, *self._untraced()],
            None if self._learned is None else self._learned.summary(),
            graphs=self._rewriting.graph_records,
            settings=self._config.texts(),
            histograms=self.histograms,
        )

    def _untraced(self) -> Iterator[WeightRecord]:
        named = {without_number(name) for name, _ in self._registry.items()}
        # Of graphs that several blocks share, weights without noise are known by their names in the block alone.
        quiet = {record.name for record in self._rewriting.weight_records if record.noise in ("", "none")}

        def is_traced(name: str, weight: torch.Tensor) -> bool:
            return name in named or self._rewriting.has_met(weight) or ends_in(name, quiet)

        for root in list(self._registry.roots):
            yield from untraced_records(root, self._config, is_traced)

    def histograms(self, count: int) -> list[Histogram]:
        """Of so many of the sampled weights that are alive, evenly spread."""
        found = list(self._sampled)
        chosen = found if len(found) <= count else [found[i * len(found) // count] for i in range(count)]
        with torch.no_grad():
            return [histogram(weight, self._width_of(weight)[0], self._state()) for weight in chosen]

    def metrics(self) -> Metrics:
        """See `gws_compile.Backend.metrics`."""
        state = self._state()
        with torch.no_grad():
            measured = [measure(weight, *self._width_of(weight), state) for weight in self._sampled]
        return Metrics(measured, state.step)

    def _state(self) -> SamplingState:
        return SamplingState(self._config, self._clock.step, self._clock.frozen)

    def _width_of(self, weight: SampledWeight) -> tuple[torch.Tensor | None, float]:
        """The width parameter of a weight, None where widths are fixed, and its average bit width."""
        if self._learned is None:
            return None, self._config.bits
        rule = self._learned.parameters.rule
        found = self._learned.parameters.find(weight.tensor, weight.name)
        if found is None:  # none yet: b_i starts at 1, where the width is `LearnedBits.init`
            return torch.ones((), device=weight.value.device), rule.init
        return found.parameter, average_width(found, rule)
