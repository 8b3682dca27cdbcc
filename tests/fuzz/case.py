"""What the fuzzer runs: a model of a few parts, the backend's settings, and what a training script does.

A case is a value: its ``repr`` is the Python code that makes it, and equal cases run alike.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

AROUND = ("plain", "no_grad", "enable_grad", "checkpoint", "reentrant", "rerun")
"""What a part is called in: nothing; ``torch.no_grad()``; ``enable_grad`` inside of ``no_grad``; an activation
checkpoint of either kind; an ``autograd.Function`` that calls the part in forward and again in backward."""

RECOMPUTED = ("checkpoint", "reentrant", "rerun")
"""Those that call the part again in backward."""

ODDITIES = ("plain", "getattr", "sets")
"""Module classes: as usual; with a ``__getattr__`` of their own; that set an attribute on themselves in forward."""

COMPILED = ("whole", "in place", "blocks", "wrapped blocks")
"""What is compiled: ``torch.compile(model)``, ``model.compile()``, every part by ``part.compile()``, or every part by
``torch.compile(part)``, which takes its place in the model."""


@dataclass(frozen=True)
class Part:
    """One block of the model.

    Attributes:
        kind: which, a key of `fuzz.parts.KINDS`.
        form: which of the kind's forms.
        around: see `AROUND`.
        broken: whether its forward begins with a graph break, inside of what is around it.
        oddity: see `ODDITIES`.
        frozen: none of its parameters requires gradients.
        again: index of an earlier part, which is called once more instead; kind and form are that one's.
        tied: index of an earlier part of the same kind, whose main weight is its own too.
    """

    kind: str
    form: str
    around: str = "plain"
    broken: bool = False
    oddity: str = "plain"
    frozen: bool = False
    again: int | None = None
    tied: int | None = None


@dataclass(frozen=True)
class Learned:
    """Arguments of `gws_compile.LearnedBits`."""

    granularity: str = "block"
    init: float = 6.0
    target: float = 4.0
    formats: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Settings:
    """Arguments of `gws_compile.backend`; ``exclude`` None stands for the default patterns."""

    fmt: str | None = "fp8_e4m3"
    bits: float | None = None
    learned: Learned | None = None
    noise: str = "rounded_normal"
    block: tuple[int | None, int | None] = (32, 32)
    scale: str | None = "floor"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    seed: int = 0
    resample: str = "step"
    backward: str = "save"
    inner: str = "eager"


@dataclass(frozen=True)
class Train:
    """Forwards and backwards, then optimizer steps.

    Attributes:
        micro_batches: how many are accumulated.
        together: all forwards come before all backwards.
        noise: False: inside ``with backend.noise(False)``.
        steps: how often the optimizers step behind them.
        functional: through ``torch.func.functional_call`` with tensors of each call's own.
    """

    micro_batches: int = 1
    together: bool = False
    noise: bool = True
    steps: int = 1
    functional: bool = False


@dataclass(frozen=True)
class Evaluate:
    """A forward without gradients.

    Attributes:
        mode: ``"no_grad"`` or ``"inference_mode"``.
        training: the model stays in training mode.
        copy: a deep copy of the model is called.
    """

    mode: str = "no_grad"
    training: bool = False
    copy: bool = False


@dataclass(frozen=True)
class Assign:
    """``load_state_dict(..., assign=True)`` with slightly other values."""


@dataclass(frozen=True)
class Replace:
    """A new Parameter in the place of every one, tied ones tied."""


@dataclass(frozen=True)
class SetData:
    """``param.data = ...`` for every parameter."""


@dataclass(frozen=True)
class Resume:
    """Save model and backend; go on with new ones that are loaded with the two states."""


Action = Train | Evaluate | Assign | Replace | SetData | Resume


@dataclass(frozen=True)
class Case:
    """A model, settings and a script.

    Attributes:
        seed: of the numbers: weights, inputs.
        parts: the model, from its input on.
        actions: the script.
        settings: of the backend.
        compiled: see `COMPILED`.
        container: name of the child that holds the parts.
        oddity: of the outermost module, see `ODDITIES`.
        loop: the model calls its parts in a loop, or else each from within a method of its own call.
        dtype: of parameters and inputs.
        autocast: the script calls the model under bfloat16 autocast.
        input_grad: the input requires gradients.
        prepare: `Backend.prepare` is called first.
    """

    seed: int = 0
    parts: tuple[Part, ...] = ()
    actions: tuple[Action, ...] = (Train(),)
    settings: Settings = field(default_factory=Settings)
    compiled: str = "whole"
    container: str = "parts"
    oddity: str = "plain"
    loop: bool = True
    dtype: str = "float32"
    autocast: bool = False
    input_grad: bool = True
    prepare: bool = False

    def size(self) -> int:
        """How much there is that could be simpler: parts, actions, and values that are not the defaults."""
        values = (self, self.settings, *self.parts, *self.actions)
        return 4 * (len(self.parts) + len(self.actions)) + sum(len(changed(value)) for value in values)


def changed(value: object) -> list[str]:
    """The names of a dataclass's fields that differ from their defaults."""
    names = []
    for one in dataclasses.fields(value):  # type: ignore[arg-type]
        default = one.default
        if default is dataclasses.MISSING:
            default = None if one.default_factory is dataclasses.MISSING else one.default_factory()
        if getattr(value, one.name) != default:
            names.append(one.name)
    return names


def source(value: object) -> str:
    """Python code of a case, without the fields that have their defaults, on as few lines as it takes."""
    if isinstance(value, tuple):
        inner = ", ".join(map(source, value))
        return f"({inner}{',' if len(value) == 1 else ''})"
    if not dataclasses.is_dataclass(value):
        return repr(value)
    arguments = [f"{name}={source(getattr(value, name))}" for name in changed(value)]
    if isinstance(value, Case):
        return "Case(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"
    return f"{type(value).__name__}({', '.join(arguments)})"
