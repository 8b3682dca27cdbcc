"""Settings without effect, and models without a weight to rewrite: warnings, or errors under ``strict``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from .cast import STORAGE
from .config import DEFAULT_EXCLUDE, Config
from .names import first_match
from .passes import Weight


class GwsWarning(UserWarning):
    """A setting of `gws_compile.backend` has no effect, or a model has nothing to rewrite."""


class Checks:
    """Looks at the weights of each graph as it comes, and says each thing once.

    Graphs come one by one (graph breaks, blocks compiled one by one), so what is said holds of the graphs seen so far.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
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
        for pattern in config.include or ():
            self._check_include(pattern, weights)
        if config.exclude != DEFAULT_EXCLUDE:
            for pattern in config.exclude:
                if weights and not self._matching("exclude", pattern, weights):
                    self._say_unmatched("exclude", pattern, weights)
        if any(w.reason is None for w in weights):
            self._any_rewritten = True
        self._check_precision([w for w in weights if w.reason is None])
        if not self._any_rewritten:
            what = _list(weights) or "it has no weight matrices"
            if config.strict:
                raise ValueError(f"strict=True, and no weight was rewritten: {what}")
            if has_parameters:
                self._say(f"no weight has been rewritten so far: {what}")

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
