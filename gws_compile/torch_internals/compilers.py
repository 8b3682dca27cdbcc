"""Compilers: those behind the rewrite, and what ``torch.compile`` and ``Module.compile`` make of a model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .lookup import find


def inductor_compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None, options: dict[str, Any] | None
) -> Callable[..., Any]:
    """Compile with Inductor, as ``torch.compile(mode=, options=)`` would.

    Relies on ``torch._TorchCompileInductorWrapper``. Checked on torch 2.11 and 2.13.
    """
    wrapper = find("torch", "_TorchCompileInductorWrapper")
    compiled: Callable[..., Any] = wrapper(mode, options, None)(gm, list(example_inputs))
    return compiled


def named_compile(name: str, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile with one of Dynamo's own backends, by name.

    Relies on ``torch._dynamo.lookup_backend``. Checked on torch 2.11 and 2.13.
    """
    compiled: Callable[..., Any] = find("torch._dynamo", "lookup_backend")(name)(gm, list(example_inputs))
    return compiled


def default_backend() -> str | Callable[..., Any]:
    """What ``torch.compile`` takes when it is given no backend; 2.11 has no other than "inductor".

    Relies on ``torch.compiler.get_default_backend``, where there is one. Checked on torch 2.11 and 2.13.
    """
    get = getattr(torch.compiler, "get_default_backend", None)
    backend: str | Callable[..., Any] = "inductor" if get is None else get()
    return backend


def compile_in_place(module: torch.nn.Module, compile: Callable[..., Any], **arguments: Any) -> None:
    """``module.compile(...)``, also for torch's own containers, whose frame Dynamo skips.

    Relies on ``_compiled_call_impl``, which Module.compile sets, on ``_call_impl``, and on ``trace_rules.check``, by
    which ``torch.compile(module)`` tells such modules. Checked on torch 2.11 and 2.13.
    """
    if module._compiled_call_impl is not None:
        return
    forward: Callable[..., Any] = module._call_impl
    if find("torch._dynamo.trace_rules", "check")(module.forward):
        this = weakref.ref(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            called = this()
            assert called is not None
            return called._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    module._compiled_call_impl = compile(forward, **arguments)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module was made by ``torch.compile(module)``, or had ``Module.compile`` called on it.

    Relies on ``torch._dynamo.eval_frame.OptimizedModule`` and ``Module._compiled_call_impl``.
    Checked on torch 2.11 and 2.13.
    """
    optimized = find("torch._dynamo.eval_frame", "OptimizedModule")
    return isinstance(module, optimized) or module._compiled_call_impl is not None


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside ``torch.compile``'s and DistributedDataParallel's wrappers.

    Relies on ``torch._dynamo.eval_frame.OptimizedModule`` and its ``_orig_mod``. Checked on torch 2.11 and 2.13.
    """
    optimized = find("torch._dynamo.eval_frame", "OptimizedModule")
    while True:
        if isinstance(model, optimized):
            model = model._orig_mod
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def inside_jit_trace() -> bool:
    """Whether ``torch.jit.trace`` is running.

    Relies on ``torch._C._is_tracing``. Checked on torch 2.11 and 2.13.
    """
    return bool(torch._C._is_tracing())


def is_given_to_compile(backend: object) -> bool:
    """Whether a compiled function that is alive was made by ``torch.compile(..., backend=backend)``.

    Looks at every object that the garbage collector knows: some 50 ms.

    Relies on ``torch._TorchCompileWrapper`` and its ``compiler_fn``. Checked on torch 2.11 and 2.13.
    """
    wrapper = find("torch", "_TorchCompileWrapper")
    return any(type(thing) is wrapper and thing.compiler_fn is backend for thing in gc.get_objects())
