"""Running passes: each with its settings bound, timed, logged, traced, and left out by name where that is asked for."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx

from gws_compile.torch_internals.dynamo import trace_artifact
from gws_compile.warning import GwsWarning

from .bodies import graphs
from .rewrite_context import PassRun, Rewrite

SKIP_VARIABLE = "GWS_SKIP_PASSES"
"""Environment variable with names of passes, parted by commas, that are left out; for debugging."""


@dataclass(frozen=True)
class Pass:
    """A pass with its settings bound.

    Attributes:
        function: called with a `Rewrite` and the settings; what it is called is the pass's name.
        settings: keyword arguments.
        without: called in its place where it is left out; None for a pass that the others need.
    """

    function: Callable[..., None]
    settings: Mapping[str, Any]
    without: Callable[[Rewrite], None] | None = None

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    def __call__(self, rewrite: Rewrite) -> None:
        """Run it."""
        self.function(rewrite, **self.settings)


def run(passes: Sequence[Pass], rewrite: Rewrite, number: int) -> None:
    """Run the passes in their order on one graph, each noted in `Rewrite.runs`.

    With ``TORCH_TRACE`` the graph before and after each is in the trace.

    Args:
        passes: the passes.
        rewrite: the graph.
        number: of the graph, for the trace.

    Raises:
        ValueError: ``GWS_SKIP_PASSES`` names a pass that there is not, or that cannot be left out.
    """
    left_out = _left_out(passes)
    for one in passes:
        trace_artifact(f"gws_compile_{number}_{one.name}_before", partial(_readable, rewrite.module))
        instead = one.without if one.name in left_out else None
        before, began = _count(rewrite), time.perf_counter()
        (instead or one)(rewrite)
        seconds = time.perf_counter() - began
        rewrite.runs.append(PassRun(one.name, seconds, _count(rewrite) - before, left_out=instead is not None))
        trace_artifact(f"gws_compile_{number}_{one.name}_after", partial(_readable, rewrite.module))
    for module in graphs(rewrite.module):
        module.graph.lint()
        module.recompile()


def _count(rewrite: Rewrite) -> int:
    return sum(len(module.graph.nodes) for module in rewrite.module.modules() if isinstance(module, fx.GraphModule))


def _readable(module: fx.GraphModule) -> str:
    return module.print_readable(print_output=False)


def _left_out(passes: Sequence[Pass]) -> set[str]:
    names = [name.strip() for name in os.environ.get(SKIP_VARIABLE, "").split(",") if name.strip()]
    optional = [one.name for one in passes if one.without is not None]
    for name in names:
        if name in optional:
            warnings.warn(
                f"{SKIP_VARIABLE}: the pass {name} is left out; this is for debugging", GwsWarning, stacklevel=2
            )
        elif name in (one.name for one in passes):
            raise ValueError(f"{SKIP_VARIABLE}: the other passes need {name}; {', '.join(optional)} can be left out")
        else:
            raise ValueError(f"{SKIP_VARIABLE}: there is no pass {name!r}; {', '.join(optional)} can be left out")
    return set(names)
