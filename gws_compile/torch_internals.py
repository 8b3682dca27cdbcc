"""Every private torch API that the project touches, in one place.

Checked on torch 2.11 and 2.13. Each function says what it relies on; where that is missing the error names it and
the versions, instead of a stack of torch's own frames.
"""

from __future__ import annotations

import importlib
import sys
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

CHECKED_VERSIONS = "2.11 and 2.13"


class UnsupportedTorchError(RuntimeError):
    """A private torch API is not where the checked versions have it."""


@cache
def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise UnsupportedTorchError(
            f"gws_compile uses {module}.{name}, which torch {torch.__version__} does not have; "
            f"it was checked on torch {CHECKED_VERSIONS}"
        ) from None


# --- Dynamo's graphs -------------------------------------------------------------------------------------------------


def placeholder_source(node: fx.Node) -> str | None:
    """Where Dynamo read a graph input from, such as ``L['self']._modules['fc']._parameters['weight']``, if known.

    Relies on ``node._dynamo_source`` (kept under DDP's graph splitting) and ``meta["grapharg"].source``.
    """
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return None
    name = getattr(source, "name", None)
    return name() if callable(name) else name


def add_placeholder(graph: fx.Graph, name: str, example_value: object) -> fx.Node:
    """Append an input that Dynamo knows nothing of, behind the last placeholder.

    Relies on AOTAutograd taking ``_dynamo_source = None`` for an input without a source.
    """
    last = [n for n in graph.nodes if n.op == "placeholder"]
    where = graph.inserting_after(last[-1]) if last else graph.inserting_before(next(iter(graph.nodes)))
    with where:
        node = graph.placeholder(name)
    node.meta["example_value"] = example_value
    node._dynamo_source = None
    return node


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph may be changed: new nodes, same submodules and attributes, Dynamo's metadata carried over.

    Relies on ``GraphModule.meta``, ``_param_name_to_source`` and each placeholder's ``_dynamo_source``.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    old_output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    graph.output(output).meta.update(old_output.meta)
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    graph._codegen = gm.graph._codegen
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copied._param_name_to_source = gm._param_name_to_source
    return copied


def checkpoint_body(node: fx.Node) -> fx.Node | None:
    """The ``get_attr`` of the body that an activation-checkpoint node calls; None for every other node."""
    tag = _find("torch._higher_order_ops.wrap", "tag_activation_checkpoint")
    if node.op == "call_function" and node.target is tag:
        body = node.args[0]
        assert isinstance(body, fx.Node)
        return body
    return None


def traces_recurrent_layers() -> bool:
    """Whether Dynamo traces LSTM, GRU and RNN modules. Relies on ``torch._dynamo.config.allow_rnn``."""
    return bool(getattr(_find("torch._dynamo", "config"), "allow_rnn", False))


def is_higher_order(node: fx.Node) -> bool:
    """Whether a node calls a higher-order operator (its graph lies in a submodule)."""
    return isinstance(node.target, _find("torch._ops", "HigherOrderOperator"))


def example_value(node: fx.Node) -> Any:
    """The fake value that Dynamo computed for a node; None if it has none."""
    return node.meta.get("example_value")


def fake_mode() -> Any:
    """A new mode for fake tensors, in which a model may also meet real ones."""
    return _find("torch._subclasses.fake_tensor", "FakeTensorMode")(allow_non_fake_inputs=True)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside ``torch.compile``'s and DistributedDataParallel's wrappers. Relies on ``_orig_mod``."""
    optimized = _find("torch._dynamo.eval_frame", "OptimizedModule")
    while True:
        if isinstance(model, optimized):
            model = model._orig_mod
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def is_fake(value: object) -> bool:
    """Whether a tensor is a FakeTensor: DDP's graph splitting calls the compiled function with such while compiling."""
    return isinstance(value, _find("torch._subclasses.fake_tensor", "FakeTensor"))


def any_fake(values: Sequence[object]) -> bool:
    """Whether one of the values `is_fake`; asked in every call, so each type is asked once."""
    fake = _find("torch._subclasses.fake_tensor", "FakeTensor")
    return any(issubclass(kind, fake) for kind in set(map(type, values)))


def fake_like(value: torch.Tensor, example: object) -> object:
    """A fake form of ``value`` in the mode of ``example``, for a placeholder's metadata; ``value`` if it has no mode.

    Relies on ``torch._guards.detect_fake_mode``, which also looks into a DTensor.
    """
    mode = _find("torch._guards", "detect_fake_mode")([example])
    return mode.from_tensor(value, static_shapes=True) if mode is not None else value


def mark_recompute(node: fx.Node, group: int) -> None:
    """Have the partitioner compute the node again in backward instead of saving it.

    Relies on ``meta["recompute"]`` and ``meta["ac_graph_id"]`` as activation checkpointing sets them.
    """
    policy = _find("torch.utils.checkpoint", "CheckpointPolicy")
    node.meta["recompute"] = policy.MUST_RECOMPUTE
    node.meta["ac_graph_id"] = group


def graph_break(gm: fx.GraphModule) -> tuple[str, list[traceback.FrameSummary]] | None:
    """Why Dynamo ended a graph early, and the user's stack there; None for one that ends where its function does.

    Relies on ``GraphModule.compile_subgraph_reason``, which `torch._dynamo.explain` reads too.
    """
    cause = getattr(gm, "compile_subgraph_reason", None)
    if cause is None or not getattr(cause, "graph_break", False):
        return None
    return str(cause.reason), list(cause.user_stack)


def compilation() -> tuple[str, str]:
    """Inside a backend: which compilation it is, ``"frame/number"``, and why its frame is compiled again, if it is.

    Relies on ``CompileContext.current_compile_id`` and on the ``recompile_reason`` of the compilation metrics.
    """
    number = _find("torch._guards", "CompileContext").current_compile_id()
    metrics = _find("torch._dynamo.utils", "get_metrics_context")()
    reason = getattr(metrics, "_metrics", {}).get("recompile_reason") or ""
    # What was compiled before for another backend is no reason: nothing is compiled twice for this one.
    return "" if number is None else str(number), "" if "BACKEND_MATCH" in reason else reason


def not_traced() -> dict[str, int]:
    """What made Dynamo leave a frame so far in this process: cause -> how often.

    Relies on ``torch._dynamo.utils.counters["unimplemented"]``.
    """
    return dict(_find("torch._dynamo.utils", "counters")["unimplemented"])


def raised_by_backend(error: BaseException) -> BaseException:
    """What a backend raised, out of what Dynamo makes of it; every other error as it is.

    Relies on ``BackendCompilerFailed.inner_exception``.
    """
    failed = _find("torch._dynamo.exc", "BackendCompilerFailed")
    return error.inner_exception if isinstance(error, failed) else error


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to torch's structured trace (``TORCH_TRACE``), which tlparse shows; made only if there is a trace."""
    trace_structured = _find("torch._logging", "trace_structured")
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def timed(name: str) -> AbstractContextManager[None]:
    """Have torch's own record of compile times (``torch._dynamo.utils.compile_times``) count what runs inside."""
    context: AbstractContextManager[None] = _find("torch._dynamo.utils", "dynamo_timed")(name)
    return context


def inside_backward() -> bool:
    """Whether the autograd engine is running in this thread: a forward seen now is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def inside_jit_trace() -> bool:
    """Whether ``torch.jit.trace`` is running."""
    return bool(torch._C._is_tracing())


def shard_range(value: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """What this rank holds of a DTensor: (local shape, offset in the whole tensor); None for a plain tensor.

    Relies on ``torch.distributed.tensor._utils.compute_local_shape_and_global_offset``.

    Raises:
        ValueError: a placement other than Shard and Replicate.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(value, DTensor):
        return None
    if not all(type(placement) in (Shard, Replicate) for placement in value.placements):
        raise ValueError(f"placements {value.placements}")
    compute = _find("torch.distributed.tensor._utils", "compute_local_shape_and_global_offset")
    shape, offset = compute(value.shape, value.device_mesh, value.placements)
    return tuple(shape), tuple(offset)


def local_example(value: Any) -> Any:
    """The fake local tensor of a fake DTensor. Relies on ``DTensor._local_tensor``."""
    return value._local_tensor


def data_parallel_groups(module: object) -> tuple[Any, ...]:
    """The process groups over which a DistributedDataParallel or FSDP2 module averages gradients; () for any other.

    Relies on ``DistributedDataParallel.process_group`` and, for FSDP2, on
    ``_get_fsdp_state()._fsdp_param_group.mesh_info``.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return ()
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        return (module.process_group,)
    if "torch.distributed.fsdp" in sys.modules and isinstance(module, _find("torch.distributed.fsdp", "FSDPModule")):
        params = module._get_fsdp_state()._fsdp_param_group
        info = None if params is None else params.mesh_info
        groups = (getattr(info, name, None) for name in ("shard_process_group", "replicate_process_group"))
        return tuple(group for group in groups if group is not None)
    return ()


def shard_groups(value: torch.Tensor) -> tuple[Any, ...]:
    """The process groups of the mesh dims along which a DTensor is sharded; () for a plain tensor."""
    if shard_range(value) is None:
        return ()
    from torch.distributed.tensor import DTensor

    assert isinstance(value, DTensor)
    mesh = value.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(value.placements) if placement.is_shard())


def whole_tensor(value: torch.Tensor) -> torch.Tensor:
    """The whole of a DTensor, gathered by all of its ranks together; a plain tensor as it is."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor

        if isinstance(value, DTensor):
            return value.full_tensor()
    return value


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call back when the backward that is running has ended. Relies on ``Variable._execution_engine``."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def pipeline_stage_index(value: object) -> int | None:
    """The stage number of a ``torch.distributed.pipelining`` stage; None for everything else.

    Relies on ``_PipelineStageBase.stage_index``, the base of ``PipelineStage`` and of the stages of a traced pipeline.
    """
    if "torch.distributed.pipelining.stage" not in sys.modules:
        return None
    base = _find("torch.distributed.pipelining.stage", "_PipelineStageBase")
    return int(value.stage_index) if isinstance(value, base) else None


# --- Compilers behind the rewrite ------------------------------------------------------------------------------------


def inductor_compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None, options: dict[str, Any] | None
) -> Callable[..., Any]:
    """Compile with Inductor, as ``torch.compile(mode=, options=)`` would."""
    wrapper = _find("torch", "_TorchCompileInductorWrapper")
    compiled: Callable[..., Any] = wrapper(mode, options, None)(gm, list(example_inputs))
    return compiled


def named_compile(name: str, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile with one of Dynamo's own backends, by name."""
    compiled: Callable[..., Any] = _find("torch._dynamo", "lookup_backend")(name)(gm, list(example_inputs))
    return compiled


def default_backend() -> Any:
    """What ``torch.compile`` takes when it is given no backend; 2.11 has no other than "inductor"."""
    get = getattr(torch.compiler, "get_default_backend", None)
    return "inductor" if get is None else get()


def compile_in_place(module: torch.nn.Module, compile: Callable[..., Any], **arguments: Any) -> None:
    """``module.compile(...)``, also for torch's own containers, whose frame Dynamo skips.

    Relies on ``_compiled_call_impl``, which Module.compile sets, and on ``trace_rules.check``, by which
    ``torch.compile(module)`` tells such modules.
    """
    if module._compiled_call_impl is not None:
        return
    forward: Callable[..., Any] = module._call_impl
    if _find("torch._dynamo.trace_rules", "check")(module.forward):
        this = weakref.ref(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            called = this()
            assert called is not None
            return called._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    module._compiled_call_impl = compile(forward, **arguments)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module was made by ``torch.compile(module)``, or had ``Module.compile`` called on it."""
    optimized = _find("torch._dynamo.eval_frame", "OptimizedModule")
    return isinstance(module, optimized) or module._compiled_call_impl is not None


def skip_frame_of(function: Callable[..., Any]) -> None:
    """Have Dynamo leave out the function's own frame and go on in what it calls. Relies on ``skip_code``."""
    _find("torch._dynamo.eval_frame", "skip_code")(function.__code__)


# --- Inductor's lowering ---------------------------------------------------------------------------------------------


@cache
def inductor() -> SimpleNamespace:
    """What a lowering is written with; imports Inductor on first use.

    Relies on ``virtualized.ops`` and ``V.graph`` (``current_node``, ``register_buffer``, ``register_operation``),
    ``ir.Pointwise``, ``Reduction``, ``Scatter``, ``ComputedBuffer``, ``FixedLayout``, ``TensorBox`` and
    ``FlexibleLayout.contiguous_strides``, ``lowering.register_lowering``, ``to_dtype``, ``view``, and the lowerings of
    ``aten.amax`` and ``aten.sum``.
    """
    sympy = importlib.import_module("sympy")
    ops = _find("torch._inductor.virtualized", "ops")
    floordiv = _find("torch.utils._sympy.functions", "FloorDiv")
    modular = _find("torch.utils._sympy.functions", "ModularIndexing")
    lowerings = _find("torch._inductor.lowering", "lowerings")
    register = _find("torch._inductor.lowering", "register_lowering")
    ir = importlib.import_module("torch._inductor.ir")
    virtualized = _find("torch._inductor.virtualized", "V")

    def product(sizes: Sequence[Any]) -> Any:
        total: Any = sympy.S.One
        for n in sizes:
            total = total * n
        return total

    def unflatten(index: Any, sizes: Sequence[Any]) -> list[Any]:
        """A row-major index into dims of these sizes -> one index per dim."""
        if len(sizes) <= 1:
            return [index] * len(sizes)
        result = []
        for i, n in enumerate(sizes):
            stride = product(sizes[i + 1 :])
            result.append(floordiv(index, stride) if i == 0 else modular(index, stride, n))
        return result

    def flatten(index: Sequence[Any], sizes: Sequence[Any]) -> Any:
        """The row-major index into dims of these sizes."""
        total: Any = 0
        for i, n in zip(index, sizes, strict=True):
            total = total * n + i
        return total

    def linear_int32(index: Sequence[Any], sizes: Sequence[Any], numel: Any) -> Any:
        """The row-major element index, mod 2**32, as an int32 value."""
        total = flatten(index, sizes)
        if numel < 2**31:
            return ops.index_expr(total, torch.int32)
        return ops.to_dtype(ops.index_expr(total, torch.int64), torch.int32, src_dtype=torch.int64)

    def block_index(index: Any, size: Any, side: int) -> Any:
        """``index // side``, for an index below ``size``.

        ``CppScheduling.try_loop_split`` (torch 2.13) splits a loop over n, in whose body one ``index // d`` stands,
        into n // d times d iterations: where d does not divide n the last n % d are never run. It looks for a loop
        variable as the dividend, so in that case the same number is written with another one.
        """
        if size % side == 0:
            return floordiv(sympy.sympify(index), sympy.Integer(side))
        return floordiv(2 * sympy.sympify(index) + 1, sympy.Integer(2 * side))

    def is_contiguous(x: Any) -> bool:
        """Whether a stored tensor is row-major."""
        stride = x.maybe_get_stride()
        wanted = ir.FlexibleLayout.contiguous_strides(x.get_size())
        return stride is not None and all(
            n == 1 or s == w for n, s, w in zip(x.get_size(), stride, wanted, strict=True)
        )

    def plain_shape(x: Any) -> list[int] | None:
        """The shape of a stored tensor, if it is static and the buffer is the tensor in row-major order."""
        if not is_contiguous(x) or ir.as_storage_and_layout(x, freeze=True)[1].offset != 0:
            return None
        sizes = [sympy.sympify(n) for n in x.get_size()]
        return [int(n) for n in sizes] if all(n.is_Integer for n in sizes) else None

    def has_pointwise_user() -> bool:
        """Whether an elementwise operation reads the result of the node that is being lowered, through views or not."""
        elementwise = (torch.ops.prims.convert_element_type.default, torch.ops.aten.copy_.default)
        views = (torch.ops.aten.permute, torch.ops.aten.t, torch.ops.aten.view, torch.ops.aten.unsqueeze)

        def reads(node: fx.Node) -> bool:
            if node.target in elementwise or torch.Tag.pointwise in getattr(node.target, "tags", ()):
                return True
            return getattr(node.target, "overloadpacket", None) in views and any(map(reads, node.users))

        return any(map(reads, virtualized.graph.current_node.users))

    def reduction(
        kind: str,
        device: torch.device,
        dtype: torch.dtype,
        value: Callable[[Sequence[Any], Sequence[Any]], Any],
        ranges: Sequence[Any],
        reduced: Sequence[Any],
    ) -> Any:
        """The ``"max"`` or ``"sum"`` over the dims ``reduced``; a GPU keeps up to 1024 elements in registers."""
        return ir.Reduction.create(
            device=device,
            dst_dtype=dtype,
            src_dtype=dtype,
            inner_fn=value,
            ranges=list(ranges),
            reduction_ranges=list(reduced),
            reduction_type=kind,
            reduction_hint=ir.ReductionHint.INNER,
        )

    def scatter(
        device: torch.device,
        dtype: torch.dtype,
        value: Callable[[Sequence[Any]], Any],
        ranges: Sequence[Any],
        to: Callable[[Sequence[Any]], Sequence[Any]],
        size: Sequence[Any],
    ) -> Any:
        """A row-major tensor of this size, whose element ``to(index)`` is ``value(index)``: each is written once."""
        written = ir.Scatter(
            device=device, dtype=dtype, inner_fn=value, ranges=list(ranges), output_indexer=to, scatter_mode=None
        )
        strides = ir.FlexibleLayout.contiguous_strides(list(size))
        buffer = ir.ComputedBuffer(name=None, layout=ir.FixedLayout(device, dtype, list(size), strides), data=written)
        buffer.name = virtualized.graph.register_buffer(buffer)
        virtualized.graph.register_operation(buffer)
        return ir.TensorBox.create(buffer)

    def register_lowering(op: Any, fn: Callable[..., Any]) -> None:
        if op not in lowerings:
            register(op, type_promotion_kind=None)(fn)

    return SimpleNamespace(
        ops=ops,
        Pointwise=ir.Pointwise,
        flatten=flatten,
        is_contiguous=is_contiguous,
        plain_shape=plain_shape,
        has_pointwise_user=has_pointwise_user,
        reduction=reduction,
        scatter=scatter,
        view=lambda x, size: lowerings[torch.ops.aten.view.default](x, list(size)),
        amax=lambda x, dims: lowerings[torch.ops.aten.amax.default](x, dims),
        sum=lambda x, dims: lowerings[torch.ops.aten.sum.dim_IntList](x, dims),
        floordiv=lambda a, b: floordiv(sympy.sympify(a), sympy.sympify(b)),
        modular=lambda a, divisor, modulus: modular(sympy.sympify(a), divisor, modulus),
        to_dtype=_find("torch._inductor.lowering", "to_dtype"),
        ceildiv=lambda a, b: floordiv(sympy.sympify(a) + (b - 1), sympy.Integer(b)),
        product=product,
        unflatten=unflatten,
        linear_int32=linear_int32,
        block_index=block_index,
        register_lowering=register_lowering,
    )


def cpp_vector_size(device: torch.device) -> int | None:
    """float32 values in a vector of the C++ code for this device; None where Inductor writes no vectors for it.

    Relies on ``cpu_vec_isa.pick_vec_isa`` and ``config.cpu_backend``.
    """
    if device.type != "cpu" or _find("torch._inductor", "config").cpu_backend != "cpp":
        return None
    isa = _find("torch._inductor.cpu_vec_isa", "pick_vec_isa")()
    return int(isa.nelements(torch.float32)) if isa else None


def cpp_kernel(
    inputs: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype, render: Callable[..., str], **variables: Any
) -> Any:
    """Inductor's tensor that a C++ kernel of our own writes. Nothing is fused with it; kernels of one text are one.

    Relies on ``ir.CppTemplateBuffer`` and ``CppTemplateKernel.def_kernel``, as Inductor's own C++ templates do, and on
    ``V.graph.no_fuse_buffer_names``.

    Args:
        inputs: name of a pointer argument -> stored, row-major tensor; None for one that there is not.
        shape, dtype: of the result, which is row-major and whose pointer is ``out``.
        render: called with ``variables``, the function's ``signature``, the number of ``threads``, and the C++ types of
            the inputs and of ``out`` as ``<name>_type``; returns the C++ source.
    """
    ir = importlib.import_module("torch._inductor.ir")
    graph = _find("torch._inductor.virtualized", "V").graph
    config = _find("torch._inductor", "config").cpp
    types = _find("torch._inductor.codegen.cpp_utils", "DTYPE_TO_CPP")
    make_kernel = _find("torch._inductor.codegen.cpp_template_kernel", "CppTemplateKernel")
    threads = _find("torch._inductor.utils", "parallel_num_threads")()
    name = str(_find("torch._inductor.utils", "Placeholder").KERNEL_NAME)
    nodes = {key: ir.as_storage_and_layout(x)[0].data for key, x in inputs.items() if x is not None}

    def make_kernel_render(
        out: Any, flag_template_buffer_has_other_users: bool, epilogue_nodes: Sequence[Any] | None = None
    ) -> tuple[Any, Callable[[], str]]:
        assert not epilogue_nodes
        kernel = make_kernel(kernel_name=name, num_threads=threads)

        def source(kernel: Any) -> str:
            return render(
                signature=kernel.def_kernel(inputs=nodes, outputs={"out": out}),
                threads=None if config.dynamic_threads else threads,
                out_type=types[dtype],
                **{f"{key}_type": types[node.get_dtype()] for key, node in nodes.items()},
                **variables,
            )

        return kernel, lambda: kernel.render(SimpleNamespace(render=source))

    strides = ir.FlexibleLayout.contiguous_strides(list(shape))
    device = next(iter(nodes.values())).get_device()
    buffer = ir.CppTemplateBuffer(
        layout=ir.FixedLayout(device, dtype, list(shape), strides),
        inputs=list(nodes.values()),
        make_kernel_render=make_kernel_render,
        template=None,
        choice=None,
    )
    graph.no_fuse_buffer_names.add(buffer.get_name())
    return ir.TensorBox.create(buffer)
