"""A rewritten graph, compiled, with what each call of it needs beside the model's own inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..config import Config, Inner
from ..passes import InputLayout, Rewrite
from ..runtime.binding import Bindings
from ..runtime.clock import Clock
from ..torch_internals import compilers
from ..torch_internals.autograd import inside_backward
from ..torch_internals.fake_tensors import any_fake
from ..torch_internals.graphs import example_value
from .diagnostics import MANY_FORWARDS, Diagnostics

Compiled = Callable[..., Any]


def compile_rewritten(
    rewritten: Rewrite,
    example_inputs: Sequence[Any],
    bindings_of: Callable[[Rewrite], Bindings],
    clock: Clock,
    diagnostics: Diagnostics,
    config: Config,
    *,
    mode: str | None,
    options: dict[str, Any] | None,
) -> Compiled:
    """Compile a rewritten graph.

    Args:
        rewritten: what the passes made of Dynamo's graph.
        example_inputs: the inputs of Dynamo's graph.
        bindings_of: makes what looks up a call's further inputs.
        clock: numbers the draws.
        diagnostics: is told of many forwards on one draw.
        config: the inner compiler and ``resample``.
        mode, options: for Inductor.

    Returns:
        A function of the inputs of Dynamo's graph.
    """
    # Fake tensors of fixed shape: AOTAutograd gives real inputs without a source symbolic sizes.
    added = rewritten.module.graph.find_nodes(op="placeholder")[len(example_inputs) :]
    examples = [example_value(node) for node in added]
    compiled = _compile(rewritten.module, [*example_inputs, *examples], config.inner, mode, options)
    positions = [weight.position for weight in rewritten.weights if weight.reason is None]
    if not positions:
        return compiled  # nothing depends on the call
    bindings = bindings_of(rewritten)
    anew = config.resample == "forward"
    return CompiledGraph(compiled, examples, positions, rewritten.layout, bindings, clock, diagnostics, anew=anew)


def _compile(
    gm: fx.GraphModule, inputs: Sequence[Any], inner: Inner, mode: str | None, options: dict[str, Any] | None
) -> Compiled:
    if inner != "eager":
        from ..codegen import lowering  # noqa: F401  (registers the operator's lowering; imports Inductor)
    if callable(inner):
        compiled: Compiled = inner(gm, list(inputs))
        return compiled
    if inner == "inductor":
        return compilers.inductor_compile(gm, inputs, mode=mode, options=options)
    return compilers.named_compile(inner, gm, inputs)


class CompiledGraph:
    """The compiled graph with its keys, clock and widths: looked up by the Parameters that come in, at each call.

    Args:
        compiled: takes the graph's inputs and those that `gws_compile.passes.InputLayout` adds.
        examples: fake values of the added inputs.
        positions: of the sampled weights among the inputs.
        layout: the added inputs.
        bindings: looks up their values.
        clock: numbers the draws.
        diagnostics: is told of many forwards on one draw.
        anew: draw in every forward, instead of once for each optimizer step.
    """

    def __init__(
        self,
        compiled: Compiled,
        examples: Sequence[Any],
        positions: Sequence[int],
        layout: InputLayout,
        bindings: Bindings,
        clock: Clock,
        diagnostics: Diagnostics,
        *,
        anew: bool,
    ) -> None:
        self._compiled = compiled
        self._examples = examples
        self._positions = positions
        self._trainable = layout.trainable
        self._bindings = bindings
        self._clock = clock
        self._diagnostics = diagnostics
        self._anew = anew

    def __call__(self, *args: Any) -> Any:
        """Call the compiled graph."""
        weights = [args[i] for i in self._positions]
        if any_fake(weights):
            # DDP's graph splitting runs the graph once on fake tensors, which are nobody's weights; and a clock made
            # now would be a fake tensor too.
            return self._compiled(*args, *self._examples)
        repeated = inside_backward()
        if self._trainable:
            self._check_trainable(args)
            self._begin_forward(repeated)
        binding = self._bindings(weights)
        if self._trainable and not repeated and binding.count(self._clock.step) == MANY_FORWARDS:
            self._diagnostics.forwards_without_step()
        return self._compiled(*args, *binding.inputs(self._clock))

    def _check_trainable(self, args: Sequence[torch.Tensor]) -> None:
        for position, name, trainable in self._trainable:
            if args[position].requires_grad != trainable:
                # torch 2.11 does not guard on it; 2.13 does, and traces a new graph before it gets here.
                before, now = ("trainable", "frozen") if trainable else ("frozen", "trainable")
                raise RuntimeError(
                    f"{name} was {before} when its graph was compiled and is {now} now; torch {torch.__version__} does "
                    "not compile again by itself: call torch._dynamo.reset() after changing requires_grad"
                )

    def _begin_forward(self, repeated: bool) -> None:
        """Begin a training forward; one that is ``repeated`` inside backward has to see the draw of its first run."""
        if not repeated:
            if self._anew:
                self._clock.tick()
            self._clock.begin_forward()
        elif self._anew:
            raise RuntimeError(
                'resample="forward" draws new noise in every forward, but this one runs inside backward: activation '
                "checkpointing around the compiled region would see other noise than the first run. Put the "
                'checkpoint inside the compiled region, or use resample="step"'
            )
