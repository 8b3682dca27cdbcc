"""A C++ kernel of our own in Inductor's graph, compiled and called as Inductor's own templates are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from .lookup import find

if TYPE_CHECKING:
    from .inductor import TensorBox


def cpp_vector_size(device: torch.device) -> int | None:
    """float32 values in a vector of the C++ code for this device; None where Inductor writes no vectors for it.

    Relies on ``cpu_vec_isa.pick_vec_isa`` and ``config.cpu_backend``. Checked on torch 2.11 to 2.15.
    """
    if device.type != "cpu" or find("torch._inductor", "config").cpu_backend != "cpp":
        return None
    isa = find("torch._inductor.cpu_vec_isa", "pick_vec_isa")()
    return int(isa.nelements(torch.float32)) if isa else None


def cpp_kernel(
    inputs: Mapping[str, TensorBox | None],
    shape: Sequence[int],
    dtype: torch.dtype,
    render: Callable[..., str],
    **variables: object,
) -> TensorBox:
    """Inductor's tensor that a C++ kernel of our own writes. Nothing is fused with it; kernels of one text are one.

    Relies on ``ir.CppTemplateBuffer`` and ``CppTemplateKernel.def_kernel``, as Inductor's own C++ templates do, on
    ``DTYPE_TO_CPP``, ``parallel_num_threads`` and ``Placeholder.KERNEL_NAME``, and on
    ``V.graph.no_fuse_buffer_names``. Checked on torch 2.11 to 2.15.

    Args:
        inputs: name of a pointer argument -> stored, row-major tensor; None for one that there is not.
        shape: of the result, which is row-major and whose pointer is ``out``.
        dtype: of the result.
        render: called with ``variables``, the function's ``signature``, the number of ``threads``, and the C++ types of
            the inputs and of ``out`` as ``<name>_type``; returns the C++ source.
        variables: what else the source is rendered with.
    """
    storage_of = find("torch._inductor.ir", "as_storage_and_layout")
    graph = find("torch._inductor.virtualized", "V").graph
    config = find("torch._inductor", "config").cpp
    types = find("torch._inductor.codegen.cpp_utils", "DTYPE_TO_CPP")
    make_kernel = find("torch._inductor.codegen.cpp_template_kernel", "CppTemplateKernel")
    threads = find("torch._inductor.utils", "parallel_num_threads")()
    name = str(find("torch._inductor.utils", "Placeholder").KERNEL_NAME)
    nodes = {key: storage_of(x)[0].data for key, x in inputs.items() if x is not None}

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

    strides = find("torch._inductor.ir", "FlexibleLayout").contiguous_strides(list(shape))
    device = next(iter(nodes.values())).get_device()
    buffer = find("torch._inductor.ir", "CppTemplateBuffer")(
        layout=find("torch._inductor.ir", "FixedLayout")(device, dtype, list(shape), strides),
        inputs=list(nodes.values()),
        make_kernel_render=make_kernel_render,
        template=None,
        choice=None,
    )
    graph.no_fuse_buffer_names.add(buffer.get_name())
    return find("torch._inductor.ir", "TensorBox").create(buffer)
