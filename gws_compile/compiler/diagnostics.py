"""Settings without effect, and weights without noise: warnings, or errors under ``strict``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from ..config import DEFAULT_EXCLUDE, Config
from ..numerics.scales import STORAGE
from ..passes import Weight
from ..report.untraced import untraced_parameters
from ..runtime.weight_registry import WeightRegistry
from ..warning import GwsWarning
from ..weight_names import ends_in, first_match, without_number, without_stage

MANY_FORWARDS = 128
"""Training forwards on one sample that are more than an accumulation of gradients."""

MANY_STEPS = 50
"""Optimizer steps after which a backend that has compiled nothing is worth a word."""


class Diagnostics:
    """Looks at the weights of each graph as it comes, and says each thing once.

    Graphs come one by one (graph breaks, blocks compiled one by one), so what is said holds of the graphs seen so far.

    Args:
        config: the settings.
        registry: names the weights that draw noise.
        is_given: whether the backend has been given to torch.compile, so that graphs are to be expected.
    """

    def __init__(self, config: Config, registry: WeightRegistry, is_given: Callable[[], bool] = lambda: False) -> None:
        self._config = config
        self._registry = registry
        # Weights of graphs that get no noise. Those that get some are in the registry once they were used.
        self._seen: set[str] = set()
        self._graphs = 0
        self._any_parameters = False
        self._is_given = is_given
        self._steps = 0
        self._steps_since_given = 0
        self._covered = False
        self._effective: set[str] = set()
        self._any_rewritten = False
        self._said: set[str] = set()

    def look_at(self, weights: Sequence[Weight], *, has_parameters: bool) -> None:
        """Check one graph.

        Args:
            weights: its weights, with the reason set on those left alone.
            has_parameters: whether it reads any parameter at all, of whatever shape.

        Raises:
            ValueError: under ``strict``, when no weight is rewritten or an included one is left alone.
        """
        config = self._config
        self._graphs += 1
        self._any_parameters |= has_parameters
        self._seen.update(w.name for w in weights if not w.noisy)
        self._covered = False
        for pattern in config.include or ():
            self._check_include(pattern, weights)
        for pattern in config.exclude:
            # The default patterns are for all models, also where a user adds own ones to them.
            own = pattern not in DEFAULT_EXCLUDE
            if own and weights and not self._matching("exclude", pattern, weights):
                self._say_unmatched("exclude", pattern, weights)
        if any(w.reason is None for w in weights):
            self._any_rewritten = True
        self._check_precision([w for w in weights if w.reason is None])
        self._check_other_uses([w for w in weights if w.reason is None])
        if not self._any_rewritten:
            what = _list(weights) or "it has no weight matrices"
            if config.strict:
                raise ValueError(f"strict=True, and no weight was rewritten: {what}")
            # A graph break often parts an embedding from the rest of the model, whose graph is still to come.
            if has_parameters and not (weights and all(w.embedded and not w.reads for w in weights)):
                self._say(f"no weight has been rewritten so far: {what}")

    def optimizer_stepped(self, optimizer: object) -> None:
        """Check, behind an optimizer step, that training goes through the compiled graphs at all."""
        if not self._any_parameters:
            self._count_step_without_parameters()
        elif not self._covered:
            self._covered = True
            missing = list(dict.fromkeys(name for root in list(self._registry.roots) for name in self._missing(root)))
            if missing:
                names = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
                message = (
                    f"weights that are trained without noise, since no compiled graph has them: {names}. Part of the "
                    "model runs eagerly: it is not compiled, or a graph break inside a loop makes torch leave the "
                    "whole frame (TORCH_LOGS=graph_breaks shows it); compile that module by itself, or exclude them"
                )
                if self._config.strict and self._config.include is not None:
                    raise ValueError(f"strict=True: {message}")
                self._say(message)

    def _count_step_without_parameters(self) -> None:
        if self._steps_since_given:
            self._steps_since_given += 1
        elif self._graphs or (
            self._steps % MANY_STEPS == 0 and self._is_given()
        ):  # a look at every object: now and then
            self._steps_since_given = 1
        self._steps += 1
        if self._steps_since_given == MANY_STEPS:
            self._say_nothing_trained()

    def _say_nothing_trained(self) -> None:
        backend = f"{MANY_STEPS} optimizer steps, and this backend ({self._config.fmt}) has compiled"
        if self._graphs:
            self._say(
                f"{backend} {self._graphs} graphs, none of which reads a parameter: no weight is trained with noise. "
                "FullyShardedDataParallel (FSDP1) hands views of its own to the modules: use fully_shard (FSDP2)"
            )
        else:
            self._say(
                f"{backend} nothing: the model in training does not go through it. torch compiles no frame of its own "
                "files: for an nn.Sequential use torch.compile(model, backend=...), not model.compile(backend=...)"
            )

    def _missing(self, root: nn.Module) -> Iterator[str]:
        """Weights of a model that got a gradient without being in any graph, where noise is what the user asked for."""
        config = self._config
        tables = {id(m.weight) for m in root.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
        # Stages of a pipeline have a prefix that their modules do not know.
        named = {without_stage(without_number(name)) for name, _ in self._registry.items()}

        def is_seen(name: str, weight: nn.Parameter) -> bool:
            return name in named or ends_in(name, self._seen)

        for name, parameter in untraced_parameters(root, is_seen):
            if parameter.grad is None or id(parameter) in tables or first_match(name, config.exclude):
                continue
            if not config.include or first_match(name, config.include):
                yield name

    def forwards_without_step(self) -> None:
        """Say that the same sample has served more forwards than an accumulation of gradients would."""
        self._say(
            f"{MANY_FORWARDS} training forwards have used the same noise, with no optimizer step in between. "
            "torch.optim optimizers are followed; after an update of your own call Backend.step(); for evaluation use "
            "torch.no_grad() or Backend.noise(False)"
        )

    def _matching(self, setting: str, pattern: str, weights: Sequence[Weight]) -> list[Weight]:
        matching = [w for w in weights if first_match(w.name, (pattern,))]
        if matching:
            self._effective.add(f"{setting}={pattern}")
        return matching

    def _check_include(self, pattern: str, weights: Sequence[Weight]) -> None:
        known = f"include={pattern}" in self._effective
        matching = self._matching("include", pattern, weights)
        if not matching:
            if weights and not known:
                self._say_unmatched("include", pattern, weights)
            return
        # No surprise: a weight that nothing reads beside others that are rewritten, and one that the user excludes.
        own_exclude = self._config.exclude != DEFAULT_EXCLUDE
        skipped = [w for w in matching if w.reason is not None]
        if any(w.reason is None for w in matching):
            skipped = [w for w in skipped if w.reads]
        if own_exclude:
            skipped = [w for w in skipped if not first_match(w.name, self._config.exclude)]
        if skipped:
            message = f"include={pattern!r} matches weights that are left alone: {_list(skipped)}"
            if self._config.strict:
                raise ValueError(message)
            self._say(message)

    def _check_precision(self, weights: Sequence[Weight]) -> None:
        fmt = self._config.fmt
        for dtype in dict.fromkeys(w.dtype for w in weights):
            if self._config.noise != "none" and fmt.mantissa_bits > STORAGE[dtype][1]:
                name = str(dtype).removeprefix("torch.")
                self._say(
                    f"fmt={fmt.name!r} has {fmt.mantissa_bits} mantissa bits, but the weights are {name}, which holds "
                    f"{STORAGE[dtype][1]}: the sampled weights are rounded to {name}"
                )

    def _check_other_uses(self, weights: Sequence[Weight]) -> None:
        for weight in weights:
            for use in weight.other_uses:
                if use.kind != "plain":
                    at = f" at {use.location}" if use.location else ""
                    self._say(
                        f"{weight.name} is sampled for {weight.reads[0].op}, but {use.op}{at} uses the weight itself: "
                        "gws_compile does not know this operation, or does not look into it"
                    )

    def _say_unmatched(self, setting: str, pattern: str, weights: Sequence[Weight]) -> None:
        if f"{setting}={pattern}" in self._effective:
            return
        names = ", ".join(w.name for w in weights[:8]) + (", ..." if len(weights) > 8 else "")
        message = f"{setting}={pattern!r} has matched no weight so far; the weights of this graph are: {names}"
        if f"{setting}={pattern}" not in self._said:
            self._said.add(f"{setting}={pattern}")
            self._say(message)

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, GwsWarning, stacklevel=2)


def _list(weights: Sequence[Weight]) -> str:
    return "; ".join(f"{w.name}: {w.reason}" for w in weights[:8]) + ("; ..." if len(weights) > 8 else "")
