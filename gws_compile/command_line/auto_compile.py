"""Compiling a script's models without being asked to: `AutoCompile`, for ``gws run --auto``."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..torch_internals import autograd, compilers, dynamo
from .model_kinds import model_inside
from .torch_compile_patch import AUTO, AUTO_COPY, TorchCompilePatch


class AutoCompile:
    """Compiles, on its first call, every outermost module that is called with gradients enabled.

    Outermost is a module that is not called from inside another one's call: the model, the wrapper around it
    (DistributedDataParallel), each of the two models of a GAN, but not a layer. Left as they are: modules without a
    trainable weight matrix (losses, metrics, frozen teachers), and whatever the script compiles itself, as a whole or
    in parts.

    Without gradients it compiles copies of what has been compiled before, which is to be evaluated with the same cast:
    averages of weights, target networks, models that are made anew to load a checkpoint. A copy is a model of the same
    class whose Parameters have the same names and shapes.

    Stands in for ``nn.Module.__call__`` between `install` and `remove`; a global forward hook could not, since it
    cannot turn the call that it is called in into a compiled one. The graphs are those of ``torch.compile(module)``.

    Args:
        patch: compiles.
    """

    def __init__(self, patch: TorchCompilePatch) -> None:
        self._patch = patch
        self._original: Callable[..., Any] = nn.Module.__call__
        self._left: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._unlike: WeakIdKeyDictionary = WeakIdKeyDictionary()  # module -> how many kinds it is none of
        self._thread = threading.local()

    def install(self) -> None:
        """Replace ``nn.Module.__call__``."""
        original = self._original = nn.Module.__call__
        thread = self._thread
        consider: Callable[..., None] = torch.compiler.disable(self._consider)  # type: ignore[no-untyped-call]

        @functools.wraps(original)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # While Dynamo traces, the first is a constant, and nothing else is looked at. (`is_compiling` is also true
            # while another thread compiles.)
            if torch.compiler.is_dynamo_compiling() or getattr(thread, "inside", False):
                return original(module, *args, **kwargs)
            thread.inside = True
            try:
                consider(module)
                return original(module, *args, **kwargs)
            finally:
                thread.inside = False

        dynamo.skip_frame_of(call)
        nn.Module.__call__ = call  # type: ignore[method-assign]

    def remove(self) -> None:
        """Put torch's own back; what has been compiled stays so."""
        nn.Module.__call__ = self._original  # type: ignore[method-assign]

    def _consider(self, module: nn.Module) -> None:
        if torch.is_grad_enabled():
            if self._may_compile(module) and any(p.requires_grad and p.ndim >= 2 for p in module.parameters()):
                self._compile(module, AUTO)  # else not remembered: a frozen model may be trained later on
        elif self._unlike.get(module) != len(self._patch.kinds):  # type: ignore[no-untyped-call]
            self._unlike[module] = len(self._patch.kinds)
            # The model itself, whatever is around it: its names are those of the one that is trained.
            model = model_inside(module)
            if self._may_compile(module) and self._may_compile(model) and self._patch.kinds.has(model):
                self._compile(model, AUTO_COPY)

    def _may_compile(self, module: nn.Module) -> bool:
        if compilers.is_compiled(module) or module in self._left:
            return False
        if autograd.inside_backward() or compilers.inside_jit_trace():
            return False  # a checkpoint runs a part of a model again; what is traced is no training
        return not isinstance(module, torch.jit.ScriptModule)  # no Python code to trace

    def _compile(self, module: nn.Module, reason: str) -> None:
        if any(self._patch.compiled_by_script(part) for part in module.modules()):
            self._left[module] = True
        else:
            self._patch.compile(module, reason)
