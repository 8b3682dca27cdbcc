"""The backend: what `torch.compile` calls with each traced graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from . import torch_internals
from .bit_plot import plot_bits
from .bit_widths import BitWidths
from .checks import MANY_FORWARDS, Checks
from .clock import Clock
from .config import Config
from .histograms import Histogram, histogram
from .keys import KeyRegistry, KeyTable
from .metrics import Draw, Metrics, measure
from .names import ends_in
from .optimizers import after_each_step
from .passes import InputLayout, Read, Weight, input_layout, is_noisy, rewrite, weights_of
from .report import GraphBreak, GraphRecord, ReadRecord, Report, WeightRecord
from .sampled import Found, SampledWeights
from .source_lines import location_of, source_of, without_wrappers
from .unseen import unseen_weights
from .width_table import WidthTable

log = logging.getLogger("gws_compile")


class Backend:
    """A ``torch.compile`` backend that samples the weights of every graph it compiles.

    Made by `gws_compile.backend`; pass it as ``torch.compile(model, backend=...)`` or
    ``model.compile(backend=...)``. One backend may serve several models, and several graphs of each.

    Attributes:
        config: the settings, validated and frozen.
        graphs: the rewritten FX graphs, in the order in which they were compiled.
    """

    @property
    def __name__(self) -> str:
        """What torch.compile calls the backend in its messages; it asks when it is given one."""
        self._checks.expect_graphs()
        return "gws"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.graphs: list[fx.GraphModule] = []
        self._records: list[WeightRecord] = []
        self._traced: list[GraphRecord] = []
        self._tables = _Remembered()
        self._met = _Remembered()
        self._registry = KeyRegistry(config.seed)
        self._sampled = SampledWeights(self._registry)
        self._clock = Clock()
        self._checks = Checks(config, self._registry)
        if config.resample == "step":
            after_each_step(self._clock, Clock.optimizer_stepped)
        after_each_step(self._checks, Checks.optimizer_stepped)
        self._bits = None if config.learned is None else BitWidths(config.learned, config.block)
        if self._bits is not None:
            after_each_step(self._bits, BitWidths.after_step)

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Rewrite one traced graph and compile it; the protocol of torch.compile's backends.

        Args:
            gm: Dynamo's graph; it stays as it is.
            example_inputs: its inputs, real or fake.
            mode: a mode of ``torch.compile``, for Inductor.
            options: Inductor's options.

        Returns:
            The compiled function, called with the graph's inputs.

        Raises:
            ValueError: under ``strict``, when no weight is rewritten or an included one is skipped; or when ``mode`` or
                ``options`` are given and the inner compiler is not Inductor.
        """
        config = self.config
        if (mode or options) and config.inner != "inductor":
            raise ValueError(f"mode={mode!r} and options={options!r} are Inductor's, but inner is {config.inner!r}")
        before = sum(1 for _ in gm.graph.nodes)
        with torch_internals.timed("gws_compile.rewrite"):
            rewritten = rewrite(
                gm, example_inputs, config=config, is_table=lambda weight: self._tables.has(weight, example_inputs)
            )
        self._tables.add([w for w in weights_of(rewritten) if w.embedded], example_inputs)
        self._met.add(weights_of(rewritten), example_inputs)
        records = [_record(w, config) for w in weights_of(rewritten)]
        self._checks.look_at(weights_of(rewritten), has_parameters=_has_parameters(gm))
        self._records += records
        number = len(self.graphs)
        self.graphs.append(rewritten)
        text = gm.print_readable(print_output=False)  # the graph itself goes when it is compiled
        self._traced.append(_graph_record(number, gm, text, rewritten))
        count = sum(r.rewritten for r in records)
        log.info(
            "graph %d: %d weights found, %d rewritten; %d nodes before, %d after",
            number,
            len(records),
            count,
            before,
            sum(1 for _ in rewritten.graph.nodes),
        )
        for record in records:
            log.debug("graph %d: %s: %s", number, record.name, record.reason or "rewritten")
        torch_internals.trace_artifact(f"gws_compile_before_{number}", lambda: text)
        torch_internals.trace_artifact(
            f"gws_compile_after_{number}", partial(rewritten.print_readable, print_output=False)
        )

        layout = input_layout(rewritten)
        # Fake tensors of fixed shape: AOTAutograd gives real inputs without a source symbolic sizes.
        added = rewritten.graph.find_nodes(op="placeholder")[len(example_inputs) :]
        extra = [torch_internals.example_value(node) for node in added]
        compiled = self._compile(rewritten, [*example_inputs, *extra], mode, options)
        chosen = [w for w in weights_of(rewritten) if w.reason is None]
        if not chosen:
            return compiled  # nothing depends on the call
        widths = None if self._bits is None else WidthTable(self._bits, self._registry, layout.learned)
        positions = [w.position for w in chosen]
        noisy = [is_noisy(w, config) for w in chosen]
        keys = KeyTable(
            self._registry,
            layout.names,
            {device: [positions.index(i) for i in keyed] for device, keyed in layout.positions.items()},
            partial(self._sampled.note, weights=chosen, draws=noisy),
        )
        return _Runtime(compiled, layout, extra, positions, keys, self._clock, self._checks, widths, config)

    def _compile(
        self, gm: fx.GraphModule, inputs: Sequence[Any], mode: str | None, options: dict[str, Any] | None
    ) -> Callable[..., Any]:
        inner = self.config.inner
        if inner != "eager":
            from . import lowering  # noqa: F401  (registers the operator's lowering; imports Inductor)
        if callable(inner):
            compiled: Callable[..., Any] = inner(gm, list(inputs))
            return compiled
        if inner == "inductor":
            return torch_internals.inductor_compile(gm, inputs, mode=mode, options=options)
        return torch_internals.named_compile(inner, gm, inputs)

    def report(self) -> Report:
        """Every weight seen so far, rewritten or why not, and the graphs; `Report.to_html` makes a page of it.

        Behind the weights of the graphs come those of the models in training that no graph has.
        """
        return Report(
            [*self._records, *self._unseen()],
            None if self._bits is None else self._bits.summary(),
            graphs=self._traced,
            settings=self.config.texts(),
            histograms=self._histograms,
        )

    def _unseen(self) -> Iterator[WeightRecord]:
        named = {name.partition("#")[0] for name, _ in self._registry.items()}
        # Of graphs that several blocks share, weights without noise are known by their names in the block alone.
        quiet = {record.name for record in self._records if record.noise in ("", "none")}

        def is_seen(name: str, weight: torch.Tensor) -> bool:
            return name in named or self._met.holds(weight) or ends_in(name, quiet)

        for root in list(self._registry.roots):
            yield from unseen_weights(root, self.config, is_seen)

    def _histograms(self, count: int) -> list[Histogram]:
        """Of some of the sampled weights that are alive, evenly spread."""
        found = list(self._sampled)
        draw = Draw(self.config, self._clock.step, self._clock.frozen)
        chosen = found if len(found) <= count else [found[i * len(found) // count] for i in range(count)]
        with torch.no_grad():
            return [histogram(one, self._widths_of(one)[0], draw) for one in chosen]

    def metrics(self) -> Metrics:
        """What the cast and the noise do to each sampled weight as it is now; see `gws_compile.WeightMetrics`.

        Computed in eager torch, outside every graph: nothing is compiled again, no random number is drawn, nothing is
        kept for autograd. The weights are those that compiled graphs have been called with: tied ones stand there once,
        frozen ones without noise. The noise is that of the last forward's draw. On a GPU it synchronizes.

        Sharded weights (DTensor: FSDP2, tensor parallelism) are gathered one by one: all ranks have to call it, and get
        the metrics of the whole weights.
        """
        draw = Draw(self.config, self._clock.step, self._clock.frozen)
        with torch.no_grad():
            return Metrics([measure(found, *self._widths_of(found), draw) for found in self._sampled], draw.step)

    def _widths_of(self, found: Found) -> tuple[torch.Tensor | None, float]:
        """The parameter of a weight's learned widths, None while there is none, and its average bit width."""
        if self._bits is None:
            return None, self.config.bits
        entry = self._bits.entry(found.tensor, found.name)
        if entry is None:  # none yet: b_i starts at 1, where the width is `LearnedBits.init`
            return torch.ones((), device=found.value.device), self._bits.rule.init
        return entry.parameter, self._bits.average_of(entry)

    def step(self) -> None:
        """Draw new noise from the next training forward on.

        Not needed with ``torch.optim`` optimizers, which are followed; for update loops of your own. Calling it beside
        an optimizer makes no second draw.
        """
        self._clock.tick()

    @contextmanager
    def noise(self, enabled: bool) -> Iterator[None]:
        """Switch the noise off (or on) inside a ``with`` block; nothing is compiled again.

        With the noise off, training graphs cast the weights as evaluation does, bit for bit.
        """
        before, self._clock.enabled = self._clock.enabled, bool(enabled)
        try:
            yield
        finally:
            self._clock.enabled = before

    def prepare(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """Find a model's weights and make the parameters of their bit widths, before anything runs.

        An optimizer can then be built with `parameters`, and a checkpoint loaded. The model is traced on fake tensors:
        nothing is computed. Without learned widths there is nothing to do. Call it before ``fully_shard``.

        Args:
            model: the module that will be called in training; a wrapped or compiled one is looked into.
            *args: an example of the call's positional arguments; their values do not matter.
            **kwargs: of its keyword arguments.
        """
        from .tracing import trainable_weights

        if self._bits is not None:
            for name, weight, batch_dims in trainable_weights(model, args, kwargs, self.config):
                self._bits.prepare(weight, name, batch_dims, used=self._registry.name(weight))

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The backend's own trainable parameters, those of learned bit widths: a weight's name and ``.bits``.

        float32: (block rows, block columns), with the matrices of an expert weight in front, or () for a width per
        weight. They exist for the weights that `prepare` or a forward has seen; there are none while widths are fixed.
        """
        return iter(()) if self._bits is None else self._bits.named_parameters()

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The parameters of `named_parameters`, for an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def bits(self) -> dict[str, torch.Tensor]:
        """The current bit widths by the weights' names, float32, shaped like the parameters; empty while fixed."""
        return {} if self._bits is None else self._bits.widths()

    def average_bits(self) -> float:
        """The average bit width over all elements of the sampled weights; the fixed width where it is fixed."""
        return self.config.bits if self._bits is None else self._bits.average()

    def plot_bits(self, path: str | Path) -> None:
        """Draw the learned bit widths: a heat map of each weight's blocks, and their histogram over training steps.

        Args:
            path: of the picture; its ending says the format (``.png``, ``.pdf``, ``.svg``).

        Raises:
            ImportError: matplotlib is missing. ValueError: no weight is known yet. RuntimeError: widths are fixed.
        """
        if self._bits is None:
            raise RuntimeError("plot_bits() needs bits=LearnedBits(...); the bit widths of this backend are fixed")
        rule = self._bits.rule
        plot_bits(path, self._bits.widths(), self._bits.history, (rule.min, rule.max))

    def bit_loss(self, *, weighting: Literal["weight", "size"] = "weight") -> torch.Tensor:
        """The loss term of learned bit widths, a float32 scalar; zero while widths are fixed.

        With `LearnedBits.average`, the augmented Lagrangian of that wish: add it to the loss as it is. Otherwise the
        mean of ``|b - target|`` over each weight's blocks, averaged over the weights: add it with a coefficient.

        Args:
            weighting: how weights are averaged: alike, or by their number of elements.

        Raises:
            RuntimeError: no weight is known yet.
        """
        return torch.zeros(()) if self._bits is None else self._bits.loss(weighting)

    def freeze_bits(self, *, per_weight: bool = False) -> None:
        """Round the learned widths up to what their formats stand for, and train on at these widths.

        From here on training too casts each block to its width's format. Nothing is compiled again; the bit widths'
        parameters no longer require gradients. Frozen widths stay so.

        Args:
            per_weight: one format for each weight, that of its average width, for hardware that cannot mix formats
                inside a weight.
        """
        if self._bits is None:
            raise RuntimeError("freeze_bits() needs bits=LearnedBits(...); the bit widths of this backend are fixed")
        self._bits.freeze(per_weight=per_weight)
        self._clock.frozen = True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draw the same noise.

        Plain numbers, strings and lists, for ``torch.save``, and for ``torch.distributed.checkpoint``, which also takes
        the backend itself (``dcp.save({"model": model, "pqt": pqt})``); the same on every rank.

        Returns:
            ``"seed"`` and ``"step"`` (the number of the next forward's draw), ints; ``"fmt"``, the format's
            specification; ``"weights"``, a list of ``[name, shape]`` of the weights that were sampled, whose names,
            with the seed, are their keys. With learned bit widths also ``"bits"``, their parameters by the weights'
            names, ``"frozen"``, 0 or 1, and ``"steering"``, two scalar tensors, with `LearnedBits.average`.
        """
        state = {
            "seed": self.config.seed,
            "fmt": self.config.fmt.spec,
            "step": self._clock.step + self._clock.pending,
            "weights": [[name, list(shape)] for name, shape in self._registry.shapes().items()],
        }
        return state if self._bits is None else {**state, **self._bits.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, before the first forward or later.

        Raises:
            ValueError: the state is of another seed or format, or of a model whose weights have other shapes; where the
                weights are not known yet, the last is raised by the first forward.
        """
        expected = self.state_dict()
        if missing := expected.keys() - state.keys():
            raise ValueError(f"not a state of gws_compile: {', '.join(sorted(missing))} missing, got {sorted(state)}")
        for key in ("seed", "fmt"):
            if state[key] != expected[key]:
                raise ValueError(f"the state was saved with {key}={state[key]!r}, this backend has {expected[key]!r}")
        if self._bits is not None:
            self._bits.load_state_dict(state, [name for name, _ in state["weights"]])
            self._clock.frozen = self._bits.frozen
        self._registry.expect({name: tuple(shape) for name, shape in state["weights"]})
        self._clock.resume(int(state["step"]))

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        """The backend itself: a deep copy of a compiled model shares it, and its weights get keys of their own."""
        return self

    def __reduce__(self) -> tuple[Callable[..., Backend], tuple[Any, ...]]:
        """Pickled as its settings and its state; what is compiled is compiled again where it is loaded."""
        return _unpickle, (type(self), self.config, self.state_dict())

    def __repr__(self) -> str:
        return f"<gws_compile backend: {self.config.fmt}, {self.config.noise}, {len(self.graphs)} graphs>"


class _Remembered:
    """Weights of graphs: as Parameters, or, of fake inputs, by name and shape."""

    def __init__(self) -> None:
        self._parameters: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._names: set[tuple[str, tuple[int, ...]]] = set()

    def add(self, weights: Sequence[Weight], inputs: Sequence[Any]) -> None:
        """Remember these weights of a graph with these inputs."""
        for weight in weights:
            given = inputs[weight.position]
            if torch_internals.is_fake(given):
                self._names.add((weight.name, weight.shape))
            else:
                self._parameters[given] = True

    def has(self, weight: Weight, inputs: Sequence[Any]) -> bool:
        """Whether this weight of a graph with these inputs has been remembered."""
        given = inputs[weight.position]
        if torch_internals.is_fake(given):
            return (weight.name, weight.shape) in self._names
        return self.holds(given)

    def holds(self, given: torch.Tensor) -> bool:
        """Whether this Parameter has been remembered."""
        return bool(self._parameters.get(given, False))  # type: ignore[no-untyped-call]


def _unpickle(cls: type[Backend], config: Config, state: dict[str, Any]) -> Backend:
    backend = cls(config)
    backend.load_state_dict(state)
    return backend


class _Runtime:
    """The compiled graph with its keys, clock and widths: looked up by the Parameters that come in, at each call."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        layout: InputLayout,
        examples: Sequence[Any],
        weights: Sequence[int],
        keys: KeyTable,
        clock: Clock,
        checks: Checks,
        widths: WidthTable | None,
        config: Config,
    ) -> None:
        self._compiled = compiled
        self._widths = widths
        self._learned = [learned.position for learned in layout.learned]
        self._examples = examples
        self._trainable = layout.trainable
        self._weights = weights
        self._keys = keys
        self._clock = clock
        self._checks = checks
        self._forward = config.resample == "forward"

    def __call__(self, *args: Any) -> Any:
        weights = [args[i] for i in self._weights]
        if torch_internals.any_fake(weights):
            # DDP's graph splitting runs the graph once on fake tensors, which are nobody's weights; and a clock made
            # now would be a fake tensor too.
            return self._compiled(*args, *self._examples)
        if self._trainable:
            extra = self._draw(args, weights)
        else:
            self._keys(weights)
            extra = []
        if self._widths is not None:
            extra += self._widths([args[i] for i in self._learned])
        return self._compiled(*args, *extra)

    def _draw(self, args: Sequence[Any], weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Keys and clock of a training forward."""
        for position, name, trainable in self._trainable:
            if args[position].requires_grad != trainable:
                # torch 2.11 does not guard on it; 2.13 does, and traces a new graph before it gets here.
                before, now = ("trainable", "frozen") if trainable else ("frozen", "trainable")
                raise RuntimeError(
                    f"{name} was {before} when its graph was compiled and is {now} now; torch {torch.__version__} does "
                    "not compile again by itself: call torch._dynamo.reset() after changing requires_grad"
                )
        inside_backward = torch_internals.inside_backward()
        if not inside_backward:
            if self._forward:
                self._clock.tick()
            self._clock.begin_forward()
        elif self._forward:
            raise RuntimeError(
                'resample="forward" draws new noise in every forward, but this one runs inside backward: activation '
                "checkpointing around the compiled region would see other noise than the first run. Put the "
                'checkpoint inside the compiled region, or use resample="step"'
            )
        extra = []
        for device, rows in self._keys(weights).items():
            if not inside_backward and rows.count(self._clock.step) == MANY_FORWARDS:
                self._checks.forwards_without_step()
            extra += [*rows.tensors, self._clock.tensor(device)]
        return extra


def _has_parameters(gm: fx.GraphModule) -> bool:
    sources = (torch_internals.placeholder_source(n) or "" for n in gm.graph.find_nodes(op="placeholder"))
    return any("_parameters[" in source for source in sources)


def _graph_record(number: int, gm: fx.GraphModule, before: str, rewritten: fx.GraphModule) -> GraphRecord:
    compile_id, recompiled = torch_internals.compilation()
    ended = torch_internals.graph_break(gm)
    stacks = (source_of(node).stack for node in gm.graph.nodes)
    return GraphRecord(
        number=number,
        compile_id=compile_id,
        location=next((without_wrappers(stack)[0] for stack in stacks if stack), ""),
        gradients=torch.is_grad_enabled(),
        graph_break=None if ended is None else GraphBreak(ended[0], location_of(ended[1])),
        recompiled=recompiled,
        before=before,
        graph=rewritten,
    )


def _read_record(read: Read) -> ReadRecord:
    source = source_of(read.node)
    return ReadRecord(read.op, source.location, source.code, source.stack)


def _record(weight: Weight, config: Config) -> WeightRecord:
    rewritten = weight.reason is None
    noisy = rewritten and is_noisy(weight, config)
    return WeightRecord(
        name=weight.name,
        shape=weight.shape,
        dtype=str(weight.dtype).removeprefix("torch."),
        op=", ".join(dict.fromkeys(read.op for read in weight.reads)),
        rewritten=rewritten,
        reason=weight.reason or "",
        fmt=config.fmt.name if rewritten else "",
        bits=config.bits if noisy and config.learned is None else None,
        noise=(config.noise if noisy else "none") if rewritten else "",
        location=weight.reads[0].location if weight.reads else "",
        reads=tuple(map(_read_record, weight.reads)),
    )
