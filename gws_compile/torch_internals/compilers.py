"""Compilers: those behind the rewrite, and what ``torch.compile`` and ``Module.compile`` make of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from .lookup import find, spared
from .modules import modules_alive


@dataclass(frozen=True)
class GraphPass:
    """A pass over the graphs that AOTAutograd traces: the joint one, or that of a forward alone.

    Attributes:
        run: changes a graph in place.
        identity: what it is, for the keys of compile caches.
    """

    run: Callable[[fx.Graph], object]
    identity: bytes


def inductor_compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None,
    options: dict[str, Any] | None,
    graph_pass: GraphPass | None = None,
) -> Callable[..., Any]:
    """Compile with Inductor, as ``torch.compile(mode=, options=)`` would.

    Relies on ``torch._TorchCompileInductorWrapper``, and for a pass on ``torch._inductor.config.joint_custom_pre_pass``
    and ``CustomGraphPass``, whose ``uuid`` is a part of Inductor's and AOTAutograd's cache keys. A pass that is
    configured already runs before. Checked on torch 2.11 to 2.15.
    """
    wrapper = find("torch", "_TorchCompileInductorWrapper")(mode, options, None)
    if graph_pass is None:
        compiled: Callable[..., Any] = wrapper(gm, list(example_inputs))
        return compiled
    config = find("torch._inductor", "config")
    with config.patch(joint_custom_pre_pass=_custom_pass(graph_pass, config.joint_custom_pre_pass)):
        compiled = wrapper(gm, list(example_inputs))
    return compiled


def compiled_function(function: Callable[..., Any], examples: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """A function of tensors to a tensor, and of nothing else, for tensors like the examples, compiled with Inductor.

    Beside ``torch.compile`` of the function: Dynamo has a limit for the forms of one function, and its callers' state.

    Relies on what `inductor_compile` does. Checked on torch 2.13.
    """
    graph = make_fx(lambda *given: (function(*given),))(*examples)  # AOTAutograd takes graphs that return a tuple
    compiled = inductor_compile(graph, examples, mode=None, options=None, graph_pass=None)
    return lambda *given: compiled(*given)[0]


def decompose(operator: Any, decomposition: Callable[..., Any]) -> None:
    """Have Inductor take an operator apart into what a function of its arguments computes.

    Relies on ``torch._inductor.decomposition.select_decomp_table``. Checked on torch 2.11 to 2.15. That it gives the
    table itself was seen on 2.13: where it gives a copy, the operator is called whole.
    """
    find("torch._inductor.decomposition", "select_decomp_table")()[operator] = decomposition


def _custom_pass(graph_pass: GraphPass, before: Any) -> Any:
    """A pass as Inductor takes it, behind one that is configured already."""
    others = () if before is None else tuple(before) if isinstance(before, (list, tuple)) else (before,)
    known = tuple(one.uuid() if hasattr(one, "uuid") else None for one in others)

    class Both(find("torch._inductor.custom_graph_pass", "CustomGraphPass")):  # type: ignore[misc]
        def __call__(self, graph: fx.Graph) -> None:
            for one in others:
                one(graph)
            graph_pass.run(graph)
            graph.lint()

        def uuid(self) -> object:
            # A pass without an identity has nothing cached; nor does it with this one behind it.
            return None if None in known else (graph_pass.identity, known)

    return Both()


def traced(gm: fx.GraphModule, example_inputs: Sequence[Any], graph_pass: GraphPass, *, decomposed: bool) -> None:
    """Have AOTAutograd trace a graph, run a pass over what it traces, and compile nothing.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs, fake.
        graph_pass: the pass.
        decomposed: into the operations that Inductor takes.

    Relies on what `aot_compile` does, and on ``torch._inductor.decomposition.select_decomp_table``.
    Checked on torch 2.11 to 2.15.
    """
    table = find("torch._inductor.decomposition", "select_decomp_table")() if decomposed else None
    aot_compile(gm, example_inputs, lambda graph, _: graph.forward, graph_pass, decompositions=table)


def aot_compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    compiler: Callable[..., Any],
    graph_pass: GraphPass,
    *,
    decompositions: Any = None,
) -> Callable[..., Any]:
    """Compile with AOTAutograd, a pass over its graph, and a compiler that gets the forward and the backward.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs.
        compiler: called with a graph of ATen's operations and its inputs; returns a function of them.
        graph_pass: runs on the joint graph, or on that of a forward without gradients.
        decompositions: a table of ATen's operations that are taken apart; None for the usual ones.

    Relies on ``torch._dynamo.backends.common.aot_autograd``, ``min_cut_rematerialization_partition`` and
    ``make_boxed_func``, as Dynamo's ``aot_eager`` does. Checked on torch 2.11 to 2.15.
    """
    partition = find("torch._functorch.partitioners", "min_cut_rematerialization_partition")
    boxed = find("torch._functorch.aot_autograd", "make_boxed_func")

    def partitioned(joint: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        _run(graph_pass, joint)
        return partition(joint, *args, **kwargs)

    def compiled(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return boxed(compiler(graph, inputs))

    def inference(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        _run(graph_pass, graph)
        return compiled(graph, inputs)

    aot: Callable[..., Any] = find("torch._dynamo.backends.common", "aot_autograd")(
        fw_compiler=compiled,
        bw_compiler=compiled,
        inference_compiler=inference,
        partition_fn=partitioned,
        decompositions=decompositions,
        keep_inference_input_mutations=True,
    )
    made: Callable[..., Any] = aot(gm, list(example_inputs))
    return made


def _run(graph_pass: GraphPass, gm: fx.GraphModule) -> None:
    graph_pass.run(gm.graph)
    gm.graph.lint()
    gm.recompile()


def named_compile(name: str, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile with one of Dynamo's own backends, by name.

    Relies on ``torch._dynamo.lookup_backend``. Checked on torch 2.11 to 2.15.
    """
    compiled: Callable[..., Any] = find("torch._dynamo", "lookup_backend")(name)(gm, list(example_inputs))
    return compiled


def default_backend() -> str | Callable[..., Any]:
    """What ``torch.compile`` takes when it is given no backend; 2.11 has no other than "inductor".

    Relies on ``torch.compiler.get_default_backend``, where there is one. Checked on torch 2.11 to 2.15.
    """
    get = getattr(torch.compiler, "get_default_backend", None)
    backend: str | Callable[..., Any] = "inductor" if get is None else get()
    return backend


def compile_in_place(module: torch.nn.Module, compile: Callable[..., Any], **arguments: Any) -> None:
    """``module.compile(...)``, also for torch's own modules, whose frame Dynamo skips.

    Relies on ``_compiled_call_impl``, which Module.compile sets, and on ``_call_impl``. Checked on torch 2.11 to 2.15.
    """
    if module._compiled_call_impl is not None:
        return
    module._compiled_call_impl = compile(traceable(module._call_impl), **arguments)


def traceable(function: Callable[..., Any]) -> Callable[..., Any]:
    """What ``Module.compile`` gives to ``torch.compile``, in a form of which Dynamo traces a frame.

    For the bound ``_call_impl`` of one of torch's own modules a function around it, as ``torch.compile(module)`` makes
    one; everything else as it is. The function has code of its own: Dynamo keeps what it knows by code, and would leave
    all modules alone that share a wrapper's code with one that it could not trace.

    Relies on ``Module._call_impl``. Checked on torch 2.11 to 2.15.
    """
    module = getattr(function, "__self__", None)
    if not isinstance(module, torch.nn.Module) or function != module._call_impl or not _is_skipped(module.forward):
        return function
    this = weakref.ref(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        called = this()
        assert called is not None
        return called._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    forward.__code__ = forward.__code__.replace()
    return forward


def is_traced(module: torch.nn.Module) -> bool:
    """Whether Dynamo traces the ``forward`` of a module on which ``module.compile()`` was called.

    It skips the frames of torch's own files, also where a user's class inherits such a ``forward``: nothing is compiled
    of ``nn.Linear(...).compile()`` or ``nn.Sequential(...).compile()``, but for the modules inside whose ``forward`` is
    a user's. Of a user's ``forward`` in one of torch's decorators (``torch.autocast``) the inner frame is traced.

    Relies on ``torch._dynamo.config.wrap_top_frame``. Checked on torch 2.11 to 2.15.
    """
    if find("torch._dynamo", "config").wrap_top_frame:
        return True
    function: Any = module.forward
    while _is_skipped(function):
        if not hasattr(function, "__wrapped__"):
            return False
        function = function.__wrapped__
    return True


def _is_skipped(function: object) -> bool:
    """Whether Dynamo skips the frames of a function, as ``torch.compile(module)`` asks for a module's ``forward``.

    Relies on ``trace_rules.check``, which fails on callables that are no functions. Checked on torch 2.11 to 2.15.
    """
    known = isinstance(function, (FunctionType, MethodType))
    return known and bool(find("torch._dynamo.trace_rules", "check")(function))


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module was made by ``torch.compile(module)``, or had ``Module.compile`` called on it.

    Relies on ``torch._dynamo.eval_frame.OptimizedModule`` and ``Module._compiled_call_impl``.
    Checked on torch 2.11 to 2.15.
    """
    optimized = find("torch._dynamo.eval_frame", "OptimizedModule")
    return isinstance(module, optimized) or module._compiled_call_impl is not None


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside ``torch.compile``'s and DistributedDataParallel's wrappers.

    Relies on ``torch._dynamo.eval_frame.OptimizedModule`` and its ``_orig_mod``. Checked on torch 2.11 to 2.15.
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

    Relies on ``torch._C._is_tracing``. Checked on torch 2.11 to 2.15.
    """
    return bool(torch._C._is_tracing())


@spared(list)
def compiled_modules(backend: object) -> list[torch.nn.Module]:
    """Every module that is alive and was compiled with this backend, each once.

    Those inside ``torch.compile(module, backend=backend)``, and those on which ``module.compile(backend=backend)`` was
    called. Looks at every object that the garbage collector knows: some 50 ms.

    Relies on what `_context_of` does, and on ``OptimizedModule._orig_mod``. Checked on torch 2.11 to 2.15.
    """
    optimized = find("torch._dynamo.eval_frame", "OptimizedModule")
    found: dict[int, torch.nn.Module] = {}
    for module in modules_alive():
        if _is_of(_context_of(module), backend):
            inside = module._orig_mod if isinstance(module, optimized) else module
            found.setdefault(id(inside), inside)
    return list(found.values())


@spared(list)
def untraced_of(modules: Sequence[torch.nn.Module], backend: object) -> list[torch.nn.Module]:
    """Those of the `compiled_modules` of a backend of which torch traces nothing, whatever the backend.

    Neither their own ``forward`` nor that of a module inside: see `is_traced`.

    ``torch.compile(module)`` has its own way round, and so has `compile_in_place`.

    Relies on what `_context_of` does, and on ``_torchdynamo_orig_callable``, the function that was compiled.
    Checked on torch 2.11 to 2.15.
    """
    return [
        module
        for module in modules
        if module._compiled_call_impl is not None
        and getattr(module._compiled_call_impl, "_torchdynamo_orig_callable", None) == module._call_impl
        and _is_of(_context_of(module), backend)
        and not any(is_traced(part) for part in module.modules())
    ]


def backend_of(wrapper: Any) -> object:
    """The backend in what torch makes of the ``backend`` argument.

    A name stands for a function that may tell by ``stands_for(options)`` which backend it stands for.

    Relies on ``torch._TorchCompileWrapper``, its ``compiler_fn`` and ``kwargs``. Checked on torch 2.11 to 2.15.
    """
    given = wrapper.compiler_fn
    stands_for = getattr(given, "stands_for", None)
    return given if stands_for is None else stands_for(wrapper.kwargs.get("options"))


def _context_of(module: torch.nn.Module) -> Any:
    """The context with which torch runs a compiled module; None for a module that is not compiled.

    ``torch.compile(module)`` keeps it as ``dynamo_ctx``. ``module.compile()`` keeps, as ``_compiled_call_impl``, what
    ``torch.compile`` makes of ``module._call_impl``: a function that has its context as ``self`` in its closure.

    Relies on ``OptimizedModule.dynamo_ctx`` and ``Module._compiled_call_impl``. Checked on torch 2.11 to 2.15.
    """
    if isinstance(module, find("torch._dynamo.eval_frame", "OptimizedModule")):
        return module.dynamo_ctx
    compiled = vars(module).get("_compiled_call_impl")
    names = getattr(getattr(compiled, "__code__", None), "co_freevars", ())
    if "self" not in names:
        return None
    return getattr(compiled, "__closure__", ())[names.index("self")].cell_contents


def _is_of(context: Any, backend: object) -> bool:
    """Whether the innermost backend behind a context's callback is this one."""
    given = getattr(context, "callback", None)
    while (inside := getattr(given, "_torchdynamo_orig_backend", None)) is not None:
        given = inside
    return type(given) is find("torch", "_TorchCompileWrapper") and backend_of(given) is backend
