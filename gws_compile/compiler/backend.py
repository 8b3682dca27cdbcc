"""The backend: the protocol of `torch.compile`, and what a user calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx

from ..config import Config
from ..deploy.collect import deployed_tensors
from ..deploy.export import export
from ..deploy.export_report import ExportReport
from ..deploy.writing import SHARD_BYTES
from ..learned_bits.learned_widths import LearnedWidths
from ..learned_bits.plot import plot_bits
from ..learned_levels.binding_levels import LearnedFinder
from ..learned_levels.learned_levels import LearnedLevels
from ..passes import Rewrite
from ..report.metrics import Metrics
from ..report.report import Report
from ..runtime.binding import Bindings
from ..runtime.clock import Clock
from ..runtime.grid_writer import GridWriter
from ..runtime.optimizer_hooks import after_each_step, before_each_step
from ..runtime.weight_registry import WeightRegistry
from ..runtime.weight_slots import Slot, WeightSlots
from ..torch_internals.compilers import compiled_modules, untraced_of, unwrapped
from ..torch_internals.lookup import warn_of_newer_torch
from ..weight_names import stage_prefix_of
from .compiled_graph import GraphCompiler, compile_graph
from .diagnostics import Diagnostics, GivenModules
from .reporting import Reporting
from .rewriting import Rewriting
from .saved_state import DRAWS, SavedState, operand_texts, settings_texts
from .tracer import weights_to_sample
from .updates import CompiledUpdates


class Backend:
    """A ``torch.compile`` backend that samples the weights of every graph it compiles.

    Made by `gws_compile.backend`; pass it as ``torch.compile(model, backend=...)`` or
    ``model.compile(backend=...)``. One backend may serve several models, and several graphs of each.

    Attributes:
        config: the settings, validated and frozen.
    """

    __name__ = "gws"  # what torch.compile calls the backend in its messages

    def __init__(self, config: Config) -> None:
        warn_of_newer_torch()
        self.config = config
        self._slots = WeightSlots()
        self._registry = WeightRegistry()
        self._clock = Clock(config.schedule)
        self._diagnostics = Diagnostics(config, self._slots, partial(_given_to, weakref.ref(self)))
        self._rewriting = Rewriting(config, self._diagnostics)
        self._updates = CompiledUpdates(config.seed)
        after_each_step(self._updates, CompiledUpdates.after_step)
        self._learned = None if config.learned is None else LearnedWidths(config.learned, self._scheduled_width)
        self._levels = LearnedLevels() if config.tables else None
        self._reporting = Reporting(config, self._rewriting, self._slots, self._clock, self._learned, self._levels)
        self._compiler = GraphCompiler(config, self._rewriting, self._find_bindings(), self._clock, self._diagnostics)
        if config.resample == "step":
            after_each_step(self._clock, Clock.optimizer_stepped)
        after_each_step(self._diagnostics, Diagnostics.optimizer_stepped)
        self._writer = None if config.master else GridWriter(config, self._slots, self._registry, self._clock)
        if self._writer is not None:  # behind the clock, for the words of the draw that comes
            after_each_step(self._writer, GridWriter.after_step)
        if self._learned is not None:
            if self._learned.constraint is not None:
                before_each_step(self._learned, LearnedWidths.before_step)
            after_each_step(self._learned, LearnedWidths.after_step)
        if self._levels is not None:
            after_each_step(self._levels, LearnedLevels.after_step)

    @property
    def graphs(self) -> list[fx.GraphModule]:
        """The rewritten FX graphs, in the order in which they were compiled."""
        return self._rewriting.graphs

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
        if (mode or options) and self.config.inner != "inductor":
            raise ValueError(
                f"mode={mode!r} and options={options!r} are Inductor's, but inner is {self.config.inner!r}"
            )
        compiled = self._updates(
            gm,
            example_inputs,
            lambda module, inputs: compile_graph(module, inputs, self.config.inner, None, mode, options),
            alone=not self.graphs,
        )
        if compiled is not None:
            return compiled
        rewritten, _ = self._rewriting(gm, example_inputs)
        return self._compiler(gm, rewritten, example_inputs, mode=mode, options=options)

    def _scheduled_width(self) -> float | None:
        schedule = self.config.schedule
        return None if schedule is None else schedule.width(self._clock.step)

    def _find_bindings(self) -> Callable[[Rewrite], Bindings]:
        """Makes what looks up a graph's further inputs; it has no reference to the backend."""
        seed, slots, registry = self.config.seed, self._slots, self._registry
        name_trained = not self.config.master
        rewriting, widths = self._rewriting, None if self._learned is None else self._learned.parameters
        levels = None if self._levels is None else self._levels.parameters

        def bindings_of(rewritten: Rewrite) -> Bindings:
            learned = rewritten.layout.learned
            return Bindings(
                rewritten.layout,
                rewritten.weights,
                seed=seed,
                slots=slots,
                registry=registry,
                find_widths=LearnedFinder(widths, levels, registry, learned) if learned else None,
                form_of=partial(rewriting.form_of, rewritten.weights),
                name_trained=name_trained,
            )

        return bindings_of

    def report(self) -> Report:
        """Every weight seen so far, rewritten or why not, and the graphs; `Report.to_html` makes a page of it.

        Behind the weights of the graphs come those of the models in training that no graph has.
        """
        for module in compiled_modules(self):
            self._slots.add_root(module)
        return self._reporting.report()

    def metrics(self) -> Metrics:
        """What the cast and the noise do to each sampled weight as it is now; see `gws_compile.WeightMetrics`.

        Computed in eager torch, outside every graph: nothing is compiled again, no random number is drawn, nothing is
        kept for autograd. The weights are those that compiled graphs have been called with: tied ones stand there once,
        frozen ones without noise. The noise is that of the last forward's draw. On a GPU it synchronizes.

        Sharded weights (DTensor: FSDP2, tensor parallelism) are gathered one by one: all ranks have to call it, and get
        the metrics of the whole weights.
        """
        return self._reporting.metrics()

    @property
    def draw(self) -> int:
        """Number of the draw that the next training forward sees, if no optimizer steps before it."""
        return self._clock.upcoming % DRAWS

    def slots_of(self, weights: Sequence[torch.Tensor]) -> list[Slot | None]:
        """What is known of Parameters; None for one that is in no model seen so far."""
        known = {id(slot.tensor()): slot for slot in self._slots}
        return [known.get(id(weight)) for weight in weights]

    def step(self) -> None:
        """Draw new noise from the next training forward on.

        Not needed with ``torch.optim`` optimizers, which are followed; for update loops of your own. Calling it beside
        an optimizer makes no second draw. With ``master=False`` it writes the sampled weights onto their grids.
        """
        self._clock.tick()
        if self._writer is not None:
            self._writer.write()

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

    def export(
        self,
        model: torch.nn.Module,
        path: str | Path,
        format: str | None = None,
        *,
        tokenizer: Any = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> ExportReport:
        """Write the model as it is deployed: low-bit weights that engines load, bit for bit those of ``no_grad`` calls.

        Scales are those of training, never computed again. What was written is read and decoded again before the
        folder takes its place; a difference is an error. Of a Hugging Face model it becomes a folder that vLLM, SGLang
        and transformers take as it is; of any other module safetensors with a small JSON file, see
        `gws_compile.load_export`.

        With sharded weights (DTensor: FSDP2, tensor parallelism) all ranks call it; weights are gathered one by one,
        rank 0 writes, and the others return when it has. Otherwise rank 0 writes, and other ranks return at once.

        Args:
            model: what was trained; compiled or wrapped as it may be. It has been called once with this backend, or
                been given to `prepare`.
            path: a folder that does not exist yet, or is empty; of ``"gguf"`` a file.
            format: ``"mxfp8"``, ``"mxfp4"``, ``"mxfp6"``, ``"nvfp4"``, ``"fp8_channel"``, ``"fp8_block"``,
                ``"fp8_tensor"``, ``"int4"``, ``"int8"``: what all weights that are cast are stored in; ``"dense"``,
                cast and not packed; ``"mxfp8_sglang"``, ``"torchao"``, ``"gguf"``. When None each weight has the one
                that it was trained for, and stays dense where there is none.
            tokenizer: saved beside a Hugging Face model: whatever has ``save_pretrained``.
            shard_bytes: of a file, at most, where no weight has more.

        Returns:
            A table of what became of each weight, and why.

        Raises:
            ValueError: nothing was rewritten; a weight does not fit into the format, or has a NaN or an Inf; widths are
                not frozen; what engines fuse is stored in several ways. The message names weight and remedy.
            FileExistsError: ``path`` is there and is not empty.
        """
        inside = unwrapped(model)
        stage = any(slot.name is not None and stage_prefix_of(slot.name) for slot in self._slots.of_module(inside))
        return export(
            inside,
            deployed_tensors(inside, self._slots, self._learned, self._levels, self.config, draw=self._clock.step),
            path,
            format,
            tokenizer=tokenizer,
            stage=stage,
            shard_bytes=shard_bytes,
        )

    def prepare(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """Find a model's weights, and make the parameters of learned bit widths and levels, before anything runs.

        An optimizer can then be built with `parameters`, a checkpoint loaded, or a model exported that was trained
        elsewhere. The model is traced on fake tensors: nothing is computed. Call it before ``fully_shard``.

        Args:
            model: the module that will be called in training; a wrapped or compiled one is looked into.
            *args: an example of the call's positional arguments; their values do not matter.
            **kwargs: of its keyword arguments.
        """
        for weight, slot, found in weights_to_sample(model, args, kwargs, self.config, self._slots):
            slot.prepared = found
            if self._learned is not None and found.trainable and found.sampled_as.learned is not None:
                self._learned.parameters.prepare(weight, slot, found.reads[0].batch_dims, found.sampled_as.block)
            levels = found.sampled_as.levels
            if self._levels is not None and found.trainable and levels is not None:
                self._levels.parameters.prepare(weight, slot, levels)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The backend's own trainable parameters: learned bit widths, a weight's name and ``.bits``, and levels.

        float32: (block rows, block columns), with the matrices of an expert weight in front, or () for a width per
        weight; and (levels,), a weight's name and ``.levels``, for one whose format is `Levels`. They exist for the
        weights that `prepare` or a forward has seen; there are none while widths are fixed, nor of other formats.
        """
        if self._learned is not None:
            yield from self._learned.parameters.named_parameters()
        if self._levels is not None:
            yield from self._levels.parameters.named_parameters()

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The parameters of `named_parameters`, for an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def bits(self) -> dict[str, torch.Tensor]:
        """The current bit widths by the weights' names, float32, shaped like the parameters; empty while fixed."""
        return {} if self._learned is None else self._learned.parameters.widths()

    def average_bits(self) -> float:
        """The average bit width over all elements of the sampled weights, at the current draw of a schedule.

        With learned widths the average of those; before any weight is known, the backend's own width where it is fixed.
        """
        return self._reporting.average_bits() if self._learned is None else self._learned.average()

    def plot_bits(self, path: str | Path) -> None:
        """Plot the learned bit widths: a heat map of each weight's blocks, and their histogram over training steps.

        Args:
            path: of the picture; its ending says the format (``.png``, ``.pdf``, ``.svg``).

        Raises:
            ImportError: matplotlib is missing. ValueError: no weight is known yet. RuntimeError: widths are fixed.
        """
        if self._learned is None:
            raise RuntimeError("plot_bits() needs bits=LearnedBits(...); the bit widths of this backend are fixed")
        rule = self._learned.parameters.rule
        plot_bits(path, self._learned.parameters.widths(), self._learned.history, (rule.min, rule.max))

    def bit_loss(self, *, weighting: Literal["weight", "size"] = "weight") -> torch.Tensor:
        """The loss term of learned bit widths, a float32 scalar; zero while widths are fixed.

        With `LearnedBits.average`, the augmented Lagrangian of that average: add it to the loss as it is. Otherwise
        the mean of ``|b - target|`` over each weight's blocks, averaged over the weights: add it with a coefficient.

        Args:
            weighting: how weights are averaged: alike, or by their number of elements.

        Raises:
            RuntimeError: no weight is known yet.
        """
        return torch.zeros((), dtype=torch.float32) if self._learned is None else self._learned.loss(weighting)

    def freeze_bits(self, *, per_weight: bool = False) -> None:
        """Round the learned widths up to what their formats stand for, and train on at these widths.

        From here on training too casts each block to its width's format. Nothing is compiled again; the bit widths'
        parameters no longer require gradients. Frozen widths stay so.

        Args:
            per_weight: one format for each weight, that of its average width, for hardware that cannot mix formats
                inside a weight.
        """
        if self._learned is None:
            raise RuntimeError("freeze_bits() needs bits=LearnedBits(...); the bit widths of this backend are fixed")
        self._learned.parameters.freeze(per_weight=per_weight)
        self._clock.frozen = True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draw the same noise.

        Plain numbers, strings and lists, for ``torch.save``, and for ``torch.distributed.checkpoint``, which also takes
        the backend itself (``dcp.save({"model": model, "pqt": pqt})``); the same on every rank.

        Returns:
            ``"seed"`` and ``"step"`` (the number of the next forward's draw), ints; ``"fmt"``, the format's
            specification; ``"weights"``, a list of ``[name, shape]`` of the weights that were sampled, whose names,
            with the seed, are their keys; ``"settings"``, a list of ``[name, text]``, the format, block and scale of
            each; ``"rules"``, a list of the rules as text; ``"operands"``, how activations, gradients and attention are
            rounded, as text; ``"master"``, 0 or 1; ``"updates"``, the number of compiled optimizer steps. With learned
            bit widths also ``"bits"``, their parameters by the weights' names, ``"frozen"``, 0 or 1, and
            ``"steering"``, two scalar tensors, with `LearnedBits.average`. With `Levels` also ``"levels"``, those of
            each weight, by its name.
        """
        shapes = self._registry.shapes()
        state = {
            "seed": self.config.seed,
            "fmt": self.config.weights.spec,
            "step": self.draw,
            "weights": [[name, list(shape)] for name, shape in shapes.items()],
            "settings": settings_texts(self.config, shapes),
            "rules": [rule.text for rule in self.config.rules],
            "operands": operand_texts(self.config),
            "master": int(self.config.master),
            "updates": self._updates.count,
        }
        if self._levels is not None:
            state |= self._levels.state_dict()
        return state if self._learned is None else {**state, **self._learned.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, before the first forward or later.

        All or nothing: a state that is refused, or whose warning is made an error, leaves the backend as it was.

        Args:
            state: its ``"step"`` is an int in 0 .. 2**32 - 1. Keys that this backend has no use for are ignored, such
                as learned widths where its own are fixed.

        Raises:
            ValueError: the state is of another seed or format, of other rules or operands, or of a model whose weights
                have other shapes; where the weights are not known yet, the last is raised by the first forward. Or
                something in it is of the wrong kind, shape or range, or not finite.
        """
        saved = SavedState.read(state, self.config)
        if self._learned is not None and saved.widths is not None:
            self._learned.parameters.check_shapes(saved.widths.bits)
        if self._levels is not None:
            self._levels.parameters.check_shapes(saved.levels)
        self._registry.check_shapes(saved.shapes)
        # Everything has been checked: from here on nothing fails.
        if self._learned is not None and saved.widths is not None:
            self._learned.restore(saved.widths.bits, frozen=saved.widths.frozen, steering=saved.widths.steering)
            self._clock.frozen = saved.widths.frozen
        if self._levels is not None:
            self._levels.parameters.restore(saved.levels)
        self._registry.expect(saved.shapes)
        self._clock.resume(saved.step)
        self._updates.count = saved.updates

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        """The backend itself: a deep copy of a compiled model shares it, and its weights get keys of their own."""
        return self

    def __reduce__(self) -> tuple[Callable[..., Backend], tuple[Any, ...]]:
        """Pickled as its settings and its state; what is compiled is compiled again where it is loaded."""
        return _unpickle, (type(self), self.config, self.state_dict())

    def __repr__(self) -> str:
        return f"<gws_compile backend: {self.config.weights.name}, {self.config.noise}, {len(self.graphs)} graphs>"


def _given_to(this: weakref.ref[Backend]) -> GivenModules:
    """The modules that a backend was given to; it may have gone, and then there are none."""
    backend = this()
    compiled = compiled_modules(backend)
    return GivenModules(compiled, untraced_of(compiled, backend))


def _unpickle(cls: type[Backend], config: Config, state: dict[str, Any]) -> Backend:
    backend = cls(config)
    backend.load_state_dict(state)
    return backend
