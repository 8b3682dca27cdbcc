"""Giving this backend to a script's ``torch.compile`` calls that name none: `TorchCompilePatch`, for ``gws run``."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..compiler.backend import Backend
from ..torch_internals import compilers
from ..warning import GwsWarning
from .model_kinds import ModelKinds
from .named_backend import stands_for

# Where a call of torch.compile passes through on its way from the user: Module.compile, torch.compiler.compile, and
# torch.compile's own decorator form.
_PASSED_THROUGH = ("torch", "torch.compiler", "torch.nn.modules.module")

# Libraries that compile functions of their own, some of them at import: an optimizer's update, a cast of its state.
_OPTIMIZERS = ("bitsandbytes", "torchao")


AUTO = "--auto"
"""Makes a call of a module that is trained."""

AUTO_COPY = "--auto, for a copy"
"""Makes a call of a module that is evaluated, and is of the kind of one that is trained."""


@dataclass(frozen=True)
class CompileCall:
    """One compilation that the script asked for, or that ``--auto`` added.

    Attributes:
        where: ``file:line`` of the caller.
        target: what is compiled: a class of modules or a function, by name.
        taken: whether it has the gws backend.
        reason: why it was left alone, such as ``"backend='cudagraphs'"``; for a taken one what made it so, such as
            `AUTO`.
    """

    where: str
    target: str
    taken: bool
    reason: str = ""


@dataclass
class CompileCalls:
    """What was seen, in order.

    Attributes:
        seen: each different call with how often it was made.
        own: the gws backends that the script made itself.
        rank: this process's in torch.distributed, None where there is none.
    """

    seen: Counter[CompileCall] = field(default_factory=Counter)
    own: list[Backend] = field(default_factory=list)
    rank: int | None = None

    def add(self, call: CompileCall) -> None:
        """Count a call."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.rank = torch.distributed.get_rank()  # kept: at the end the process group may be gone
        self.seen[call] += 1

    @property
    def taken(self) -> dict[CompileCall, int]:
        """The calls that have the gws backend, with how often they were made."""
        return {call: n for call, n in self.seen.items() if call.taken}

    @property
    def left(self) -> dict[CompileCall, int]:
        """The calls that were left alone."""
        return {call: n for call, n in self.seen.items() if not call.taken}

    def is_first_rank(self) -> bool:
        """Whether this process is rank 0, or there are no ranks."""
        launched = os.environ.get("RANK", "")
        rank = self.rank if self.rank is not None or not launched.isdecimal() else int(launched)
        return rank in (None, 0)

    def to_dict(self) -> list[dict[str, Any]]:
        """The calls for JSON, each with its ``count``."""
        return [{**asdict(call), "count": n} for call, n in self.seen.items()]


class TorchCompilePatch:
    """Stands in for ``torch.compile`` between `install` and `remove`.

    torch.compile itself is replaced, which every way to ask for compilation comes through: ``Module.compile``, the
    decorator with arguments and without, ``torch.compiler.compile``, and ``from torch import compile`` in a script that
    is run afterwards. Two less invasive ways do not do: Dynamo's registry is not asked for the name "inductor"
    (torch.compile handles it before any look-up), and ``torch.compiler.set_default_backend`` neither sees a script (or
    trainer) that says ``backend="inductor"`` nor tells which calls there were, which the report has to say.

    Args:
        backend: what calls for the default compiler get.
        calls: takes the record.
        met: called with each other gws backend that the script compiles with, before it does.

    Attributes:
        backend, calls: as given.
        kinds: of the modules that have a gws backend.
    """

    def __init__(
        self, backend: Backend, calls: CompileCalls, met: Callable[[Backend], None] = lambda backend: None
    ) -> None:
        self.backend = backend
        self.calls = calls
        self.kinds = ModelKinds()
        self._met = met
        self._original: Callable[..., Any] = torch.compile
        self._script: WeakIdKeyDictionary = WeakIdKeyDictionary()  # modules that the script has given to torch.compile
        self._here: WeakIdKeyDictionary = WeakIdKeyDictionary()  # modules given to `compile`

    def install(self) -> None:
        """Replace ``torch.compile``."""
        original = self._original = torch.compile

        @functools.wraps(original)
        def compile(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **self._redirected(args, kwargs))

        torch.compile = compile

    def remove(self) -> None:
        """Put torch's own back; what has been compiled stays as it is."""
        torch.compile = self._original

    def compile(self, module: nn.Module, reason: str = AUTO) -> None:
        """Compile a module in place with the backend; the call is on the record with the reason."""
        compilers.compile_in_place(module, self._original, backend=self.backend)
        self._here[module] = True
        self.kinds.add(module)
        self.calls.add(CompileCall(Caller.find().where, type(module).__name__, taken=True, reason=reason))

    def compiled_by_script(self, module: nn.Module) -> bool:
        """Whether the script has compiled the module itself, by ``torch.compile`` or in place."""
        return module in self._script or (compilers.is_compiled(module) and module not in self._here)

    def _redirected(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments with the backend exchanged where the default one is asked for."""
        model = args[0] if args else kwargs.get("model")
        caller = Caller.find()
        where = caller.where
        if caller.is_of_torch or (caller.is_of_optimizer and _module_of(model) is None):
            return kwargs  # compiles something of its own
        if isinstance(getattr(model, "__self__", None), torch.optim.Optimizer):
            return kwargs  # rounding of updates is asked for by naming the backend, not by running a script
        backend = kwargs.get("backend")
        if backend is None:
            backend = compilers.default_backend()
        ahead = bool((kwargs.get("options") or {}).get("use_aoti"))  # another compiler of the same name
        default = backend == "inductor" and not ahead and not kwargs.get("disable")
        target = describe(model)
        if default:
            kwargs = {**self._without_inductors(kwargs, target, where), "backend": self.backend}
        if model is None:
            return kwargs  # a decorator with arguments: the call with the function is still to come
        if isinstance(model, nn.Module) and not kwargs.get("disable"):
            self._script[model] = True
        if kwargs.get("disable"):
            self.calls.add(CompileCall(where, target, taken=False, reason="disable=True"))
        elif default or backend is self.backend:
            self._take(model, self.backend, CompileCall(where, target, taken=True))
        elif backend == "gws":
            call = CompileCall(where, target, taken=True, reason="backend='gws' in the script")
            self._take(model, stands_for(kwargs.get("options")), call)
        elif isinstance(backend, Backend):
            if not any(backend is known for known in self.calls.own):
                self.calls.own.append(backend)
            call = CompileCall(where, target, taken=True, reason="a gws backend of the script's own")
            self._take(model, backend, call)
        else:
            named = f"backend={backend!r}" if isinstance(backend, str) else f"backend={describe(backend)}"
            if ahead:
                named = "options={'use_aoti': True}"
            self.calls.add(CompileCall(where, target, taken=False, reason=named))
            warnings.warn(
                f"torch.compile of {target} at {where} is left alone: the script names {named}",
                GwsWarning,
                stacklevel=3,
            )
        return kwargs

    def _take(self, model: object, backend: Backend | None, call: CompileCall) -> None:
        """Note a call that has a gws backend."""
        self.calls.add(call)
        if backend is self.backend:
            if (module := _module_of(model)) is not None:
                self.kinds.add(module)
        elif backend is not None:
            self._met(backend)

    def _without_inductors(self, kwargs: dict[str, Any], target: str, where: str) -> dict[str, Any]:
        """The keyword arguments without those that are Inductor's, where another compiler is behind the backend."""
        inner = self.backend.config.inner
        if inner == "inductor":
            return kwargs
        dropped = {key: kwargs[key] for key in ("mode", "options") if kwargs.get(key) not in (None, "default", {})}
        if dropped:
            arguments = " and ".join(f"{key}={value!r}" for key, value in dropped.items())
            named = repr(inner) if isinstance(inner, str) else describe(inner)
            warnings.warn(
                f"torch.compile of {target} at {where} asks for {arguments}, which only Inductor has: dropped, since "
                f"--inner is {named}",
                GwsWarning,
                stacklevel=4,
            )
        return {key: value for key, value in kwargs.items() if key not in ("mode", "options")}


@dataclass(frozen=True)
class Caller:
    """Who calls torch.compile.

    Attributes:
        where: ``file:line`` of the first frame that is neither torch's nor this package's.
        is_of_torch: a function of torch or of this package asks for something of its own.
        is_of_optimizer: that frame is in a method of an optimizer, or in a library of optimizers.
    """

    where: str
    is_of_torch: bool
    is_of_optimizer: bool

    @classmethod
    def find(cls) -> Caller:
        """Look at this thread's stack."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and _module(frame) == __name__:
            frame = frame.f_back
        direct = "" if frame is None else _module(frame)
        while frame is not None and _package(_module(frame)) in ("torch", "gws_compile"):
            frame = frame.f_back
        return cls(
            "an unknown place" if frame is None else f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}",
            direct not in _PASSED_THROUGH and _package(direct) in ("torch", "gws_compile"),
            frame is not None and (_package(_module(frame)) in _OPTIMIZERS or _is_method_of_optimizer(frame)),
        )


def _is_method_of_optimizer(frame: FrameType) -> bool:
    code = frame.f_code
    owner = code.co_qualname.rpartition(".")[0]
    if not owner or not code.co_argcount:
        return False
    first = frame.f_locals.get(code.co_varnames[0])
    # A function of a script may have an optimizer for its first argument, too.
    return isinstance(first, torch.optim.Optimizer) and owner in {kind.__qualname__ for kind in type(first).__mro__}


def _module_of(target: object) -> nn.Module | None:
    """The module that is to be compiled; Module.compile compiles a bound method. None for a function."""
    module = getattr(target, "__self__", target)
    return module if isinstance(module, nn.Module) else None


def _package(module: str) -> str:
    return module.partition(".")[0]


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _short(filename: str) -> str:
    """A file as a reader knows it: from the working directory, or from the folder of installed packages."""
    if inside := filename.partition(f"site-packages{os.sep}")[2]:
        return inside
    path = Path(filename)
    with contextlib.suppress(OSError):  # the working directory may be gone
        if path.is_relative_to(Path.cwd()):
            return str(path.relative_to(Path.cwd()))
    return filename


def describe(target: object) -> str:
    """A module by its class, a function by its name; "a function" for None, which stands for one still to come."""
    if target is None:
        return "a function"
    if isinstance(target, nn.Module):
        return type(target).__name__
    if isinstance(owner := getattr(target, "__self__", None), nn.Module):
        return type(owner).__name__  # Module.compile compiles a bound method
    if isinstance(target, functools.partial):
        return describe(target.func)
    return str(getattr(target, "__qualname__", None) or type(target).__name__)
