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
from .torch_compile_patch import TorchCompilePatch


class AutoCompile:
    """Compiles, on its first call, every outermost module that is called with gradients enabled.

    Outermost is a module that is not called from inside another one's call: the model, the wrapper around it
    (DistributedDataParallel), each of the two models of a GAN, but not a layer. Left as they are: modules without a
    trainable weight matrix (losses, metrics, frozen teachers), and whatever the script compiles itself, as a whole or
    in parts.

    Stands in for ``nn.Module.__call__`` between `install` and `remove`; a global forward hook could not, since it
    cannot turn the call that it is called in into a compiled one. The graphs are those of ``torch.compile(module)``.

    Args:
        patch: compiles.
    """

    def __init__(self, patch: TorchCompilePatch) -> None:
        self._patch = patch
        self._original: Callable[..., Any] = nn.Module.__call__
        self._left: WeakIdKeyDictionary = WeakIdKeyDictionary()
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
        if self._wants(module):
            self._patch.compile(module)

    def _wants(self, module: nn.Module) -> bool:
        if not torch.is_grad_enabled() or compilers.is_compiled(module) or module in self._left:
            return False
        if autograd.inside_backward() or compilers.inside_jit_trace():
            return False  # a checkpoint runs a part of a model again; what is traced is no training
        if isinstance(module, torch.jit.ScriptModule):
            return False  # no Python code to trace
        if not any(p.requires_grad and p.ndim >= 2 for p in module.parameters()):
            return False  # not remembered: a frozen model may be trained later on
        if any(self._patch.compiled_by_script(part) for part in module.modules()):
            self._left[module] = True
            return False
        return True
