"""Runs a case: the compiled model beside the oracle, compared at every forward and backward."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.func import functional_call

import gws_compile

from .case import Assign, Case, Evaluate, Replace, Resume, SetData, Settings, Train
from .compare import Mismatch, compare, compare_samples
from .model import Model, OracleCall, compile_as, make
from .naming import Draws, UniqueNames, names_of
from .parts import VOCABULARY
from .products import BATCH, FEATURES, TOKENS
from .reads import Reads
from .widths import learned_of


def run(case: Case) -> None:
    """Run a case.

    Raises:
        Mismatch: compiled model and oracle differ. Others: the program crashed.
    """
    # Blocks of one class share their code objects, and each case calls them in several modes.
    limits = torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024)
    with limits, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            _Run(case).run()
        finally:
            # Backends follow the optimizers of the process until they are gone.
            torch._dynamo.reset()
            gc.collect()


class _Refused(Exception):
    """The backend has refused, as it promises to, and the case ends here."""


_REFUSAL = "its first run, the whole of which had gradients disabled"
"""Of the error where a function hides a region without gradients: see `fuzz.reads.Reads.hidden`."""


@contextlib.contextmanager
def _samples_into(samples: list[torch.Tensor]) -> Iterator[None]:
    """Collect what the operator gives when it runs eagerly, in compiled graphs."""
    operator = importlib.import_module("gws_compile.ops.sample_weight")
    kernel = operator.sample_eager

    def keeping(*args: Any, **kwargs: Any) -> torch.Tensor:
        samples.append(kernel(*args, **kwargs))
        return samples[-1].clone()

    with mock.patch.object(operator, "sample_eager", keeping):
        yield


def backend_of(settings: Settings) -> gws_compile.Backend:
    """The backend of these settings."""
    return gws_compile.backend(
        settings.fmt,
        noise=settings.noise,  # type: ignore[arg-type]
        bits=settings.bits if settings.learned is None else learned_of(settings),
        block=settings.block,
        scale=settings.scale,  # type: ignore[arg-type]
        include=settings.include,
        exclude=gws_compile.DEFAULT_EXCLUDE if settings.exclude is None else settings.exclude,
        seed=settings.seed,
        resample=settings.resample,  # type: ignore[arg-type]
        backward=settings.backward,  # type: ignore[arg-type]
        inner=settings.inner,
    )


@dataclass
class _Expected:
    """What the oracle says of one forward."""

    output: torch.Tensor
    reads: Reads
    loss: torch.Tensor | None = None
    gradients: tuple[torch.Tensor | None, ...] = ()
    widths: dict[str, tuple[torch.Tensor, float]] = field(default_factory=dict)


@dataclass
class _Micro:
    """One forward of the compiled model, to be followed by its backward."""

    x: torch.Tensor
    leaves: dict[str, torch.Tensor]
    loss: torch.Tensor
    expected: _Expected


class _Run:
    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(case.seed)
        self.generator = torch.Generator().manual_seed(case.seed)
        self.draws = Draws(anew=case.settings.resample == "forward")
        self.names, self.copies = UniqueNames(), 0
        self.samples: list[torch.Tensor] = []
        self.widths: dict[str, torch.Tensor] = {}  # the trained parameters; the others are at their start
        self.model = make(case)
        self.start()
        self.prepare()

    def prepare(self) -> None:
        """Have the learned widths made before the first call, if the case says so."""
        self.prepared: set[str] | None = None
        if self.case.prepare:
            self.backend.prepare(self.called, *self.inputs())
            self.prepared = set(self.width_parameters())

    def start(self) -> None:
        """Compile the model for a backend of its own."""
        self.backend = backend_of(self.case.settings)
        self.called = compile_as(self.case, self.model, self.backend)
        if self.case.seed % 2:
            self.backend.report()  # looking changes nothing
        self.make_optimizers()

    def make_optimizers(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(trained, lr=0.02)] if trained else []
        self.width_optimizer: torch.optim.Optimizer | None = None

    def run(self) -> None:
        with _samples_into(self.samples):
            for number, action in enumerate(self.case.actions):
                try:
                    self.do(action)
                except _Refused:
                    return
                except Mismatch as error:
                    text = error.args[0].partition(": ")[2]
                    raise Mismatch(error.what, f"{text}\n    in action {number}, {action}") from None

    def do(self, action: object) -> None:
        if isinstance(action, Train):
            self.train(action)
        elif isinstance(action, Evaluate):
            self.evaluate(action)
        elif isinstance(action, Assign):
            self.model.load_state_dict(_assigned(self.model), assign=True)
            self.make_optimizers()
        elif isinstance(action, Replace):
            for place, value in _assigned(self.model).items():
                path, _, name = place.rpartition(".")
                if isinstance(value, nn.Parameter):
                    setattr(self.model.get_submodule(path), name, value)
            self.make_optimizers()
        elif isinstance(action, SetData):
            for parameter in self.model.parameters():
                parameter.data = _moved(parameter.data)
        elif isinstance(action, Resume):
            self.resume()

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(BATCH, TOKENS, FEATURES, generator=self.generator).to(getattr(torch, self.case.dtype))
        return x, torch.randint(VOCABULARY, (BATCH, TOKENS), generator=self.generator)

    @contextlib.contextmanager
    def mode(self, noise: bool = True) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.case.autocast:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            if not noise:
                stack.enter_context(self.backend.noise(False))
            yield

    # Training

    def train(self, action: Train) -> None:
        self.model.train()
        waiting = []
        for _ in range(action.micro_batches):
            waiting.append(self.forward(action))
            if not action.together:
                self.backward(waiting.pop(), action)
        for micro in waiting:
            self.backward(micro, action)
        self.check_names()
        self.step_widths()
        for optimizer in self.optimizers:
            for _ in range(action.steps):
                optimizer.step()
                self.draws.optimizer_stepped()
        for parameter in (*self.model.parameters(), *self.backend.parameters()):
            parameter.grad = None

    def step_widths(self) -> None:
        widths = list(self.backend.parameters())
        if self.width_optimizer is None and widths:
            self.width_optimizer = torch.optim.Adam(widths, lr=0.15)
        if self.width_optimizer is not None:
            self.width_optimizer.step()
            self.draws.optimizer_stepped()
        if self.prepared is not None and (late := self.width_parameters().keys() - self.prepared):
            raise Mismatch("widths", f"{sorted(late)} were not there behind prepare, but {sorted(self.prepared)}")
        self.widths |= {name: p.detach().clone() for name, p in self.width_parameters().items()}

    def width_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The learned widths of the model that is trained, by its weights' qualified names."""
        names = {unique: key for key, unique in self.names.given.items()}
        found = {}
        for unique, parameter in self.backend.named_parameters():
            owner, name = names.get(unique.removesuffix(".bits"), (0, unique.removesuffix(".bits")))
            if owner == 0:
                found[name] = parameter
        return found

    def forward(self, action: Train) -> _Micro:
        x, ids = self.inputs()
        x.requires_grad_(self.case.input_grad)
        leaves: dict[str, torch.Tensor] = dict(self.called.named_parameters())
        if action.functional:
            leaves = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in leaves.items()}
        probe = torch.randn(x.shape, generator=self.generator)
        expected = self.expected(x, ids, probe, leaves if action.functional else None, noise=action.noise)
        with self.mode(action.noise):
            output = functional_call(self.called, leaves, (x, ids)) if action.functional else self.called(x, ids)
            loss = (output.float() * probe).sum()
        micro = _Micro(x, leaves, loss, expected)
        if self.refuses(micro, action):
            return micro
        self.compare_samples(expected.reads, all_of_them=self.case.settings.inner != "inductor")
        compare(self.case, "output", "", output, expected.output)
        compare(self.case, "loss", "", loss, expected.loss, scale=(expected.output.float() * probe).abs().sum().item())
        for name, buffer in self.model.named_buffers():
            if id(buffer) in expected.reads.buffers:
                compare(self.case, "buffer", name, buffer, expected.reads.buffers[id(buffer)])
        return micro

    def refuses(self, micro: _Micro, action: Train) -> bool:
        """Whether backward has to raise an error."""
        return bool(micro.expected.reads.hidden) and action.noise and self.case.settings.noise != "none"

    def backward(self, micro: _Micro, action: Train) -> None:
        if not micro.loss.requires_grad:
            return
        gradients = {"input": micro.x, **{n: p for n, p in micro.leaves.items() if p.requires_grad}}
        widths = self.width_parameters()
        before = {id(p): None if p.grad is None else p.grad.clone() for p in (*gradients.values(), *widths.values())}
        with self.mode(action.noise) if not action.noise else contextlib.nullcontext():
            try:
                micro.loss.backward()
            except RuntimeError as error:
                if self.refuses(micro, action) and _REFUSAL in str(error):
                    raise _Refused from None
                raise
        if self.refuses(micro, action):
            raise Mismatch(
                "refusal", f"no error, though backward reads {sorted(micro.expected.reads.hidden)} otherwise"
            )
        self.compare_samples(micro.expected.reads)
        for (name, leaf), gradient in zip(gradients.items(), micro.expected.gradients, strict=True):
            compare(self.case, "gradient", name, *_sums(leaf, before[id(leaf)], gradient))
        of_widths = micro.expected.widths
        if missing := of_widths.keys() - widths.keys():
            raise Mismatch("names", f"no width parameters for {sorted(missing)}, there are {sorted(widths)}")
        for name, parameter in widths.items():
            if not torch.equal(parameter, self.widths.get(name, torch.ones_like(parameter))):
                raise Mismatch("widths", f"{name}: another value than the optimizer left")
            gradient, size = of_widths.get(name, (None, 0.0))
            actual, expected = _sums(parameter, before[id(parameter)], gradient)
            if expected is not None:
                size += expected.abs().max().item()
            compare(self.case, "width gradient", name, actual, expected, scale=max(size, 1e-6))

    def expected(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        probe: torch.Tensor | None = None,
        leaves: dict[str, torch.Tensor] | None = None,
        *,
        noise: bool = True,
        copied: Model | None = None,
    ) -> _Expected:
        """The oracle of one forward, and with a probe of its backward."""
        case, call = self.case, OracleCall(copied or self.model)
        # What functional_call puts in is found by the name of its place.
        stands_in = {} if leaves is None else {f"model.{_without_wrappers(n)}": p for n, p in leaves.items()}
        places = {f"model.{_without_wrappers(n)}": f"model.{n}" for n, _ in call.model.named_parameters()}

        def reads_of(root: nn.Module) -> Reads:
            names = names_of(root, "model.")
            return Reads(case.settings, names, self.draws, self.widths, functools.partial(self.names.of, owner), noise)

        owner = 0 if copied is None else self.copies

        with self.mode(), torch.random.fork_rng(devices=[]):
            output, reads = functional_call(call, {places[n]: p for n, p in stands_in.items()}, (x, ids, reads_of))
        found = _Expected(output.detach(), reads)
        if probe is None:
            return found
        loss = (output.float() * probe).sum()
        found.loss = loss.detach()
        if not loss.requires_grad:
            return found
        trained = leaves if leaves is not None else dict(self.called.named_parameters())
        by = [x, *(p for p in trained.values() if p.requires_grad)]
        hats = list(reads.hats.values())
        wanted = [t for t in by if t.requires_grad]
        results = torch.autograd.grad(loss, [*wanted, *(hat.value for hat in hats)], allow_unused=True)
        of_leaf = {id(t): g for t, g in zip(wanted, results, strict=False)}
        found.gradients = tuple(of_leaf.get(id(t)) for t in by)
        if case.settings.learned is not None:
            found.widths = {
                hat.name: reads.width_gradient(hat, gradient)
                for hat, gradient in zip(hats, results[len(wanted) :], strict=True)
                if gradient is not None
            }
        return found

    # Between the steps

    def evaluate(self, action: Evaluate) -> None:
        called, copied = self.called, None
        if action.copy:
            called = copy.deepcopy(called)
            copied = getattr(called, "_orig_mod", called)
            self.copies += 1
        called.train(action.training)
        x, ids = self.inputs()
        with torch.no_grad():
            expected = self.expected(x, ids, copied=copied)
        with torch.inference_mode() if action.mode == "inference_mode" else torch.no_grad(), self.mode():
            output = called(x, ids)
        self.compare_samples(expected.reads)
        compare(self.case, "output", "", output, expected.output)

    def resume(self) -> None:
        weights, state = copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.backend.state_dict())
        step = self.draws.step + self.draws.pending
        if self.drawn() and state["step"] != step:
            raise Mismatch("names", f"the state's step is {state['step']}, expected {step}")
        torch._dynamo.reset()
        self.model = make(self.case)
        self.start()
        self.called.load_state_dict(weights) if self.called is self.model else self.model.load_state_dict(weights)
        self.backend.load_state_dict(state)
        self.draws.resume()
        self.names.resume()
        self.prepare()

    def drawn(self) -> set[str]:
        """The names by which the model that is trained has drawn, of its life before a `Resume` too."""
        before = {name: unique for name, (unique,) in self.names.saved.items()}
        return {*(before | {name: unique for (owner, name), unique in self.names.given.items() if owner == 0}).values()}

    def check_names(self) -> None:
        if self.case.settings.learned is None:
            names = {name for name, _ in self.backend.state_dict()["weights"]}
            if names != self.drawn():
                raise Mismatch("names", f"the state knows {sorted(names)}, expected {sorted(self.drawn())}")

    def compare_samples(self, reads: Reads, *, all_of_them: bool = False) -> None:
        """Of what went through the kernel since the last time; Inductor's code leaves nothing to look at."""
        compare_samples(self.samples, reads, all_of_them=all_of_them)
        self.samples.clear()


def _moved(value: torch.Tensor) -> torch.Tensor:
    """Other values, in other memory; masks and counters as they are."""
    floats = value.is_floating_point() and not torch.equal(value, value.round())
    return value.detach() * 0.9 if floats else value.detach().clone()


def _assigned(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state of other values; tied Parameters stay tied, which torch does only for one Parameter under two names."""
    made: dict[int, torch.Tensor] = {}
    for value in model.state_dict(keep_vars=True).values():
        if id(value) not in made:
            moved = _moved(value)
            made[id(value)] = nn.Parameter(moved, value.requires_grad) if isinstance(value, nn.Parameter) else moved
    return {name: made[id(value)] for name, value in model.state_dict(keep_vars=True).items()}


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _sums(
    leaf: torch.Tensor, before: torch.Tensor | None, gradient: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradient of a leaf, and what it is to be: what was there, with this one added."""
    if before is None or gradient is None:
        return leaf.grad, before if gradient is None else gradient
    return leaf.grad, before + gradient
