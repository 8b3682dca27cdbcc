"""A rewritten graph, compiled, with what each call of it needs beside the model's own inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..config import Config
from ..passes import Rewrite, treatment_of
from ..passes.bodies import copy_with_bodies
from ..runtime.binding import Binding, Bindings
from ..runtime.clock import Clock, DrawState
from ..runtime.recomputation import Recomputations
from ..settings.arguments import Inner
from ..torch_internals import compilers
from ..torch_internals.autograd import inside_backward
from ..torch_internals.compilers import GraphPass
from ..torch_internals.fake_tensors import any_fake
from ..torch_internals.graphs import example_value
from ..torch_internals.recomputation import inside_function_forward, regions
from .diagnostics import MANY_FORWARDS, Diagnostics
from .rewriting import Rewriting

Compiled = Callable[..., Any]


class GraphCompiler:
    """Compiles the rewritten graphs of one backend.

    Args:
        config: the inner compiler, and what draws noise.
        rewriting: rewrites a graph again, in another form.
        bindings_of: makes what looks up a call's further inputs.
        clock: numbers the draws.
        diagnostics: is told of many forwards on one draw.
    """

    def __init__(
        self,
        config: Config,
        rewriting: Rewriting,
        bindings_of: Callable[[Rewrite], Bindings],
        clock: Clock,
        diagnostics: Diagnostics,
    ) -> None:
        self.config = config
        self.rewriting = rewriting
        self.bindings_of = bindings_of
        self.clock = clock
        self.diagnostics = diagnostics
        self.recomputations = Recomputations()

    def __call__(
        self,
        gm: fx.GraphModule,
        rewritten: Rewrite,
        example_inputs: Sequence[Any],
        *,
        mode: str | None,
        options: dict[str, Any] | None,
    ) -> Compiled:
        """Compile a rewritten graph.

        Args:
            gm: Dynamo's graph.
            rewritten: what the passes made of it.
            example_inputs: its inputs.
            mode, options: for Inductor.

        Returns:
            A function of the inputs of Dynamo's graph.
        """
        graph_pass = self.rewriting.products[rewritten.module].graph_pass

        def compile(module: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
            return compile_graph(module, inputs, self.config.inner, graph_pass, mode, options)

        # Fake tensors of fixed shape: AOTAutograd gives real inputs without a source symbolic sizes.
        added = rewritten.module.graph.find_nodes(op="placeholder")[len(example_inputs) :]
        examples = [example_value(node) for node in added]
        compiled = compile(rewritten.module, [*example_inputs, *examples])
        forms = _Forms(gm, rewritten, self, compile)
        return CompiledGraph(compiled, examples, rewritten, self, forms)


def compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    inner: Inner,
    graph_pass: GraphPass | None,
    mode: str | None,
    options: dict[str, Any] | None,
) -> Compiled:
    """Compile a graph with the inner compiler.

    Args:
        gm: the graph.
        inputs: examples of its inputs.
        inner: the compiler.
        graph_pass: runs on the graph that AOTAutograd traces; None for none.
        mode, options: for Inductor.
    """
    if inner != "eager":
        from ..codegen import lowering, masks  # noqa: F401  (register the operators' lowerings; import Inductor)
    if inner == "inductor":
        from ..levels.inductor import register

        register()
        return compilers.inductor_compile(gm, inputs, mode=mode, options=options, graph_pass=graph_pass)
    if graph_pass is not None:
        compiler = inner if callable(inner) else lambda graph, _: graph.forward
        return compilers.aot_compile(gm, inputs, compiler, graph_pass)
    if callable(inner):
        compiled: Compiled = inner(gm, list(inputs))
        return compiled
    return compilers.named_compile(inner, gm, inputs)


class _Forms:
    """Other forms of a graph, rewritten another way and compiled when they are needed.

    - The noisy form of a graph that was traced with gradients disabled. The forward of a re-entrant checkpoint, or of
      any ``autograd.Function`` that calls the model again in backward, is called with gradients disabled, as evaluation
      is, and Dynamo cannot tell the two apart. But it is training: it has to see what its second run sees.
    - One for each way in which ``include``, ``exclude`` and ``rules`` treat the weights of layers that share the graph.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        rewritten: Rewrite,
        compiler: GraphCompiler,
        compile: Callable[[fx.GraphModule, Sequence[Any]], Compiled],
    ) -> None:
        self._gm = copy_with_bodies(gm)  # Dynamo's goes when it is compiled
        self._weights = rewritten.weights
        self._gradients = rewritten.gradients
        self._compiler = compiler
        self._compile = compile
        self._made: dict[tuple[bool, tuple[object, ...]], CompiledGraph] = {}
        self._lock = threading.RLock()

    def named(self, names: Mapping[str, tuple[str, ...]]) -> CompiledGraph:
        """The form for weights of these names, by source."""
        return self._form(names, gradients=self._gradients)

    def noisy(self) -> CompiledGraph:
        """The form as if the graph was traced with gradients enabled."""
        return self._form({weight.source: weight.names for weight in self._weights}, gradients=True)

    def _form(self, names: Mapping[str, tuple[str, ...]], *, gradients: bool) -> CompiledGraph:
        config = self._compiler.config
        key = gradients, tuple(treatment_of(names[weight.source], config) for weight in self._weights)
        with self._lock:
            if key not in self._made:
                rewritten = self._compiler.rewriting.again(self._gm, self._weights, names, gradients=gradients)
                # Through Dynamo again: the inputs may have other sizes than those of the first call.
                compiled: Compiled = torch.compile(rewritten.module, backend=self._compile)
                forms = _Forms(self._gm, rewritten, self._compiler, self._compile)
                self._made[key] = CompiledGraph(compiled, [], rewritten, self._compiler, forms)
            return self._made[key]


class CompiledGraph:
    """The compiled graph with its keys, clock and widths: looked up by the weights that come in, at each call.

    Args:
        compiled: takes the graph's inputs and those that `gws_compile.passes.InputLayout` adds.
        examples: fake values of the added inputs.
        rewritten: the graph.
        compiler: has what all graphs of a backend share.
        forms: its other forms.
    """

    def __init__(
        self, compiled: Compiled, examples: Sequence[Any], rewritten: Rewrite, compiler: GraphCompiler, forms: _Forms
    ) -> None:
        self._compiled = compiled
        self._examples = examples
        self._positions = [weight.position for weight in rewritten.weights]
        self._trainable = rewritten.layout.trainable
        self._bindings = compiler.bindings_of(rewritten)
        self._compiler = compiler
        self._clock = compiler.clock
        self._forms = forms
        # Without master weights what optimizers write is numbered by draws too.
        writes = not compiler.config.master and rewritten.gradients and any(w.gradients for w in rewritten.selected)
        self._training = rewritten.layout.training or writes
        may_draw = any(
            (w.sampled_as.noise != "none" and w.trainable) or w.products.draws or w.keyed for w in rewritten.selected
        )
        self._may_be_noisy = may_draw and not rewritten.gradients
        self._takes_nothing = not (rewritten.selected or rewritten.layout.positions)

    def __call__(self, *args: Any) -> Any:
        """Call the compiled graph."""
        if any_fake([args[position] for position in self._positions]):
            # DDP's graph splitting runs the graph once on fake tensors, which are nobody's weights; and a clock made
            # now would be a fake tensor too.
            return self._compiled(*args, *self._examples)
        binding = self._bindings(args)
        if binding.form is not None:
            return self._forms.named(binding.form)(*args)
        if self._may_be_noisy and (again := self._again(args)) is not None:
            return again
        if self._takes_nothing:
            return self._compiled(*args)
        if self._trainable:
            self._check_trainable(args)
        state = self._clock.state
        if (binding.noisy or binding.reads) and inside_backward():
            state = self._recall(binding)
        elif binding.noisy or self._trainable or self._training:
            state = self.begin(binding)
        return self.call(args, binding, state)

    def _again(self, args: Sequence[Any]) -> Any:
        """The noisy form's result, where this call lies in a region that backward runs again; else None."""
        found = list(regions())
        if inside_backward():
            if not found:
                return None
            noisy = self._forms.noisy()
            binding = noisy.bindings(args)
            state = self._compiler.recomputations.recall(binding)
            return None if state is None else noisy.call(args, binding, state)
        if any(region.differentiated for region in found):
            noisy = self._forms.noisy()
            binding = noisy.bindings(args)
            return noisy.call(args, binding, noisy.begin(binding))
        if inside_function_forward():
            # Evaluation, or a forward whose backward runs it again: it is told that it has to see the cast alone.
            noisy = self._forms.noisy()
            self._compiler.recomputations.remember(noisy.bindings(args), self._clock.state.without_noise())
        return None

    def bindings(self, args: Sequence[Any]) -> Binding:
        """What belongs to the weights among these inputs."""
        return self._bindings(args)

    def call(self, args: Sequence[Any], binding: Binding, state: DrawState) -> Any:
        """Call the compiled graph with what belongs to its weights, and what it is to see of the clock."""
        return self._compiled(*args, *binding.inputs(self._clock, state))

    def begin(self, binding: Binding) -> DrawState:
        """Begin a training forward.

        Returns:
            What it sees of the clock.
        """
        if self._compiler.config.resample == "forward":
            self._clock.tick()
        self._clock.begin_forward()
        state = self._clock.state
        self._compiler.recomputations.remember(binding, state)
        if binding.count(state.step) == MANY_FORWARDS:
            self._compiler.diagnostics.forwards_without_step()
        return state

    def _recall(self, binding: Binding) -> DrawState:
        """What the forward saw that is run again inside backward."""
        state = self._compiler.recomputations.recall(binding)
        if state is not None:
            return state
        if not binding.noisy:
            return self._clock.state
        states = {slot.seen for slot in binding.noisy}
        seen = states.pop() if len(states) == 1 else None
        if seen is None or self._compiler.config.resample == "forward":
            names = ", ".join(slot.known_as for slot in binding.noisy[:8])
            raise RuntimeError(
                f"a forward runs inside backward, with gradients, and it cannot be told which draw of {names} its "
                "first run saw: its gradients would be those of another forward. A checkpoint, or autograd.Function, "
                "that computes a region again has to call the compiled module in its forward too; or put it inside the "
                "compiled region"
            )
        return seen

    def _check_trainable(self, args: Sequence[torch.Tensor]) -> None:
        for position, name, trainable in self._trainable:
            if args[position].requires_grad != trainable:
                # torch 2.11 does not guard on it; 2.13 does, and traces a new graph before it gets here.
                before, now = ("trainable", "frozen") if trainable else ("frozen", "trainable")
                raise RuntimeError(
                    f"{name} was {before} when its graph was compiled and is {now} now; torch {torch.__version__} does "
                    "not compile again by itself: call torch._dynamo.reset() after changing requires_grad"
                )
