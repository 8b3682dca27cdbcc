"""Settings without effect, and weights without noise: warnings, or errors under ``strict``."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ..config import Config
from ..numerics.scales import STORAGE
from ..passes import Weight, treatment_of
from ..report.untraced import is_table, is_untraced
from ..runtime.sampled_weights import unique_names
from ..runtime.step_rounds import StepRounds
from ..runtime.weight_slots import Slot, WeightSlots
from ..settings.arguments import DEFAULT_EXCLUDE
from ..settings.rules import Rule
from ..source_names import parameter_path
from ..torch_internals.autograd import at_end_of_backward, inside_backward
from ..warning import GwsWarning
from ..weight_names import first_match

MANY_FORWARDS = 128
"""Training forwards on one sample that are more than an accumulation of gradients."""

MANY_STEPS = 50
"""Optimizer steps after which a backend that has compiled nothing is worth a word."""


@dataclass(frozen=True)
class GivenModules:
    """The modules that a backend was given to.

    Attributes:
        compiled: all of them.
        untraced: those of which torch traces nothing, whatever the backend.
    """

    compiled: Sequence[nn.Module] = ()
    untraced: Sequence[nn.Module] = ()


class Diagnostics:
    """Looks at the weights of each graph as it comes, and says each thing once.

    Graphs come one by one (graph breaks, blocks compiled one by one), so what is said holds of the graphs seen so far.

    Args:
        config: the settings.
        slots: the weights that graphs were called with, and those of their models.
        find_given: finds the modules that the backend was given to, so that graphs are to be expected of them.

    Attributes:
        training_is_plain: training is not to go through rewritten graphs, so there is nothing to say if it does not.
    """

    training_is_plain = False

    def __init__(
        self, config: Config, slots: WeightSlots, find_given: Callable[[], GivenModules] = GivenModules
    ) -> None:
        self._config = config
        self._slots = slots
        self._graphs = 0
        self._any_parameters = False
        self._find_given = find_given
        self._any_given = False
        self._untraced: list[weakref.ref[nn.Module]] = []
        self._rounds = StepRounds()
        self._steps = 0
        self._next_look = 0
        self._steps_since_given = 0
        self._any_named = False
        self._covered: weakref.WeakSet[object] = weakref.WeakSet()
        self._trained_plain: set[Slot] = set()
        self._effective: set[str] = set()
        self._deciding: set[Rule] = set()
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
        self._check_names(weights)
        self._graphs += 1
        self._any_parameters |= has_parameters
        self._covered.clear()
        for pattern in config.include or ():
            self._check_include(pattern, weights)
        for pattern in config.exclude:
            # The default patterns are for all models, also where a user adds own ones to them.
            own = pattern not in DEFAULT_EXCLUDE
            if own and weights and not self._matching("exclude", pattern, weights):
                self._say_unmatched("exclude", pattern, weights)
        self._check_rules(weights)
        if any(w.reason is None for w in weights):
            self._any_rewritten = True
        self._check_precision([w for w in weights if w.reason is None])
        self._check_other_uses([w for w in weights if w.reason is None])
        self._check_sparsity([w for w in weights if w.reason is None])
        if not self._any_rewritten:
            what = _list(weights) or "it has no weight matrices"
            left_by_rules = self._left_by_rules(weights)
            if config.strict and not left_by_rules:
                raise ValueError(f"strict=True, and no weight was rewritten: {what}")
            # A graph break often parts an embedding from the rest of the model, whose graph is still to come.
            quiet = weights and (all(w.embedded and not w.reads for w in weights) or left_by_rules)
            if has_parameters and not quiet:
                self._say(f"no weight has been rewritten so far: {what}")

    def optimizer_stepped(self, optimizer: object) -> None:
        """Check, behind an optimizer step, that training goes through the compiled graphs at all.

        Of several optimizers each is looked at: one that steps inside backward may have taken the gradients of its
        parameters away when the next one steps.
        """
        if self.training_is_plain:
            return
        if self._rounds.begins_with(optimizer):
            if self._steps == self._next_look:
                self._next_look = max(MANY_STEPS, 2 * self._steps)  # among all objects, 0.1 s and more: ever less often
                if not self._steps or not self._any_parameters:
                    self._look_for_given_modules()
            self._steps += 1
            if not self._any_parameters:
                self._count_step_without_parameters()
        if optimizer not in self._covered:
            if self._any_parameters:
                self._covered.add(optimizer)
            self._check_trained()

    def _look_for_given_modules(self) -> None:
        """Take in the models that the backend was given to, of which no graph need have come."""
        given = self._find_given()
        for module in given.compiled:
            self._any_given = True
            self._slots.add_root(module)
        own = [module for module in given.untraced if any(True for _ in module.parameters())]
        self._untraced = [weakref.ref(module) for module in own]
        untraced = [type(module).__name__ for module in own]
        if untraced:
            self._say(
                f"torch traces no frame of its own modules, and {_listed(list(dict.fromkeys(untraced)))} had "
                "module.compile(backend=...) called on them: nothing of them is compiled, with any backend. Use "
                "torch.compile(module, backend=...) in their place, or compile a module of your own around them"
            )

    def _check_trained(self) -> None:
        """Say which weights have got a gradient without being sampled, where noise is what the user asked for."""
        trained = [slot for slot in self._slots if self._is_trained_plain(slot)]
        if not inside_backward():
            self._tell_of(trained)
        elif trained:
            self._trained_plain.update(trained)
            at_end_of_backward(self._tell_of_backward)  # of all weights at once

    def _tell_of_backward(self) -> None:
        found, self._trained_plain = self._trained_plain, set()
        self._tell_of([slot for slot in self._slots if slot in found])

    def _tell_of(self, trained: Sequence[Slot]) -> None:
        names = unique_names(trained)
        said = [module() for module in self._untraced]
        roots = {slot: None if slot.root is None else slot.root() for slot in trained}
        unseen = [names[slot] for slot in trained if is_untraced(slot) and roots[slot] not in said]
        if unseen:
            self._refuse_or_say(
                f"weights that are trained without noise, since no compiled graph has them: {_listed(unseen)}. Part of "
                "the model runs eagerly: it is not compiled, or a graph break inside a loop makes torch leave the "
                "whole frame (TORCH_LOGS=graph_breaks shows it); compile that module by itself, or exclude them"
            )
        left = [f"{names[slot]}: {reason}" for slot in trained if (reason := _why_left_alone(slot))]
        self._any_named |= bool(unseen or left)
        if left:
            self._refuse_or_say(
                "weights that are trained without noise, though a compiled graph may multiply by them: "
                f"{_listed(left, '; ')}"
            )

    def _refuse_or_say(self, message: str) -> None:
        if self._config.strict and self._config.include is not None:
            raise ValueError(f"strict=True: {message}")
        self._say(message)

    def _is_trained_plain(self, slot: Slot) -> bool:
        config = self._config
        tensor = slot.tensor() if is_untraced(slot) or _why_left_alone(slot) else None
        if tensor is None or tensor.grad is None or is_table(slot) or first_match(slot.path, config.exclude):
            return False
        return config.include is None or first_match(slot.path, config.include) is not None

    def _count_step_without_parameters(self) -> None:
        if self._graphs or self._any_given:
            self._steps_since_given += 1
        if self._steps_since_given == MANY_STEPS:
            self._say_nothing_trained()

    def _say_nothing_trained(self) -> None:
        backend = f"{MANY_STEPS} optimizer steps, and this backend ({self._config.weights.name}) has compiled"
        if self._graphs:
            self._say(
                f"{backend} {self._graphs} graphs, none of which reads a parameter: no weight is trained with noise. "
                "FullyShardedDataParallel (FSDP1) hands views of its own to the modules: use fully_shard (FSDP2)"
            )
        elif not self._any_named:  # of a model whose weights have been named, more is known
            self._say(
                f"{backend} nothing: the model in training does not go through it. torch compiles no frame of its own "
                "files: for an nn.Sequential use torch.compile(model, backend=...), not model.compile(backend=...)"
            )

    def forwards_without_step(self) -> None:
        """Say that the same sample has served more forwards than an accumulation of gradients would."""
        self._say(
            f"{MANY_FORWARDS} training forwards have used the same noise, with no optimizer step in between. "
            "torch.optim optimizers are followed; after an update of your own call Backend.step(); for evaluation use "
            "torch.no_grad() or Backend.noise(False)"
        )

    def _matching(self, setting: str, pattern: str, weights: Sequence[Weight]) -> list[Weight]:
        matching = [w for w in weights if first_match(w.names, (pattern,))]
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
            skipped = [w for w in skipped if w.reads or w.may_be_read]
        if own_exclude:
            skipped = [w for w in skipped if not first_match(w.names, self._config.exclude)]
        if skipped:
            message = f"include={pattern!r} matches weights that are left alone: {_list(skipped)}"
            if self._config.strict:
                raise ValueError(message)
            self._say(message)

    def _check_rules(self, weights: Sequence[Weight]) -> None:
        """Say of rules that decide nothing what is in their way, as far as the names of weights are known."""
        undecided = [rule for rule in self._config.rules if rule not in self._deciding]
        if not weights or not undecided:
            return
        self._slots.see_caller()
        seen = {name for weight in weights for name in weight.names}
        paths = ((slot.path,) for slot in self._slots if slot.path not in seen)
        known = [*(weight.names for weight in weights), *paths]
        for rule in undecided:
            self._check_rule(rule, known)

    def _check_rule(self, rule: Rule, known: Sequence[tuple[str, ...]]) -> None:
        others = []
        for names in filter(rule.matches, known):
            name, (reason, _) = names[-1], treatment_of(names, self._config)
            first = self._config.rule_of(names)
            if first is not None and first is not rule:
                others.append(f"{name}: the rule {first.text!r} comes first")
            elif reason is not None and rule.settings is not None:
                others.append(f"{name}: {reason}")
            else:
                self._deciding.add(rule)
                return
        listed = f"the weights that are known are: {_listed([names[-1] for names in known])}"
        self._say_once(
            f"rule {rule.text}", f"the rule {rule.text!r} decides nothing: {_listed(others, '; ') or listed}"
        )

    def _left_by_rules(self, weights: Sequence[Weight]) -> bool:
        """Whether rules leave the weights of a graph alone, and others are to come: of blocks compiled one by one."""
        ruled = [self._config.rule_of(weight.names) for weight in weights]
        if not ruled or any(rule is None or rule.settings is not None for rule in ruled):
            return False
        self._slots.see_caller()
        return any(treatment_of((slot.path,), self._config)[0] is None for slot in self._slots)

    def _say_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._say(message)

    def _check_names(self, weights: Sequence[Weight]) -> None:
        for weight in weights:
            if weight.name == weight.source and parameter_path(weight.source) is None:
                self._say(
                    f"a weight of {' x '.join(map(str, weight.shape))} has no name: no module that is known holds it, "
                    f"and torch's source for it is not understood. {weight.source} stands for its name, in include and "
                    "exclude too; please report it"
                )

    def _check_precision(self, weights: Sequence[Weight]) -> None:
        for fmt, noise, dtype in dict.fromkeys((w.sampled_as.fmt, w.sampled_as.noise, w.dtype) for w in weights):
            if noise != "none" and fmt.mantissa_bits > STORAGE[dtype][1]:
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

    def _check_sparsity(self, weights: Sequence[Weight]) -> None:
        dense = [f"{w.names[-1]}: {w.dense_because}" for w in weights if w.dense_because]
        if dense:
            self._say(
                f"weights that are not sparse, although sparsity says so: {_listed(dense, '; ')}. Give them a rule "
                "with sparsity=None, or another sparsity"
            )

    def _say_unmatched(self, setting: str, pattern: str, weights: Sequence[Weight]) -> None:
        if f"{setting}={pattern}" in self._effective:
            return
        names = ", ".join(w.names[-1] for w in weights[:8]) + (", ..." if len(weights) > 8 else "")
        message = f"{setting}={pattern!r} has matched no weight so far; the weights of this graph are: {names}"
        self._say_once(f"{setting}={pattern}", message)

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, GwsWarning, stacklevel=2)


def _why_left_alone(slot: Slot) -> str:
    """Why a weight that graphs may multiply by is sampled in none of them; empty where that is not so."""
    if not slot.graphs or any(weight.reason is None for weight in slot.graphs):
        return ""
    return next((weight.reason or "" for weight in slot.graphs if weight.may_be_read), "")


def _listed(texts: Sequence[str], separator: str = ", ") -> str:
    return separator.join(texts[:8]) + (f"{separator}..." if len(texts) > 8 else "")


def _list(weights: Sequence[Weight]) -> str:
    return "; ".join(f"{w.name}: {w.reason}" for w in weights[:8]) + ("; ..." if len(weights) > 8 else "")
