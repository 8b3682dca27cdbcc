"""The process in which Inductor believes in a GPU; started by `offline_gpu.run_calls`.

What has to be known about torch and triton here. The CUDA builds of torch 2.11, 2.12 and 2.13 pin triton 3.6.0, 3.7.0
and 3.7.1; with torch 2.13, all of 3.6.0, 3.7.1 and 3.9.0 were tried and work.

- ``torch._inductor.config.cpu_backend = "triton"`` is simpler but gives other kernels than a GPU gets: with a CPU
  device the reduction hints are ``DEFAULT``, so block sizes differ and no reduction is persistent.
- ``TRITON_INTERPRET`` is read when triton is imported (its own ``tl.max`` and the like are decorated then), hence a
  process of its own. Inductor asks for it too, skips compilation and launches ``configs[0]`` of every kernel.
- ``torch.cuda.is_available()`` has to stay False in the worker: with True, Dynamo saves the CUDA generator's state and
  fails. What Inductor needs comes from ``device_interface.CudaInterface``, whose attributes are bound when it is
  imported, and registering another interface is undone by the lazy registration of torch's own.
- Matrices are multiplied by the CPU: results behind a matrix product are the CPU's, not cuBLAS's.
- The interpreter is slow: some 10 ms per program of a sampling kernel, and a program has 256 elements where the weight
  is small. As it comes it takes seconds more for each 32 x 32 block maximum, reduced one by one in Python, and
  patches ``triton.language`` anew in every device function; `_mend_interpreter` mends both.
- Its conversions between float32 and bfloat16 truncate, and get subnormals wrong (both directions, triton 3.6 to 3.9);
  `_mend_interpreter` again.
- Under the interpreter nothing is contracted into fused multiply-adds. That a GPU's code does not do so either shows in
  the instructions of `compile_kernels`.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import CAPABILITY, Call, Outcome

_DEVICE = torch.device("cuda", 0)

# An H100; Inductor reads these to choose splits, block sizes and warps.
_PROPERTIES = SimpleNamespace(
    name="stub GPU",
    major=CAPABILITY // 10,
    minor=CAPABILITY % 10,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    gcnArchName="",
)


def serve(request: str, reply: str) -> None:
    """Read a pickled list of calls from one file, and write what came of each to the other."""
    calls = pickle.loads(Path(request).read_bytes())
    answer = _install()
    Path(reply).write_bytes(pickle.dumps([answer(call) for call in calls]))


def _install() -> Callable[[Call], Outcome | str]:
    """Make Inductor believe in a GPU, for the rest of this process; returns what answers a call."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import compile_fx
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", CAPABILITY, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = lambda: None

    # What Inductor asks while it generates code, and what the generated wrapper calls. Each a function of its own:
    # Dynamo keeps tables keyed by these functions.
    stubs: dict[str, Callable[..., Any]] = {
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "exchange_device": lambda device: 0,
        "get_device_properties": lambda device=None: _PROPERTIES,
        "is_bf16_supported": lambda including_emulation=True: True,
        "maybe_exchange_device": lambda device: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
    }
    for name, stub in stubs.items():
        setattr(torch.cuda, f"_{name}" if "exchange" in name else name, stub)
        setattr(CudaInterface, name, staticmethod(stub))
    torch.cuda.get_device_capability = lambda device=None: divmod(CAPABILITY, 10)
    CudaInterface.is_available = staticmethod(lambda: True)
    CudaInterface.get_raw_stream = staticmethod(lambda device: 0)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch._C._dynamo.guards._empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cpu

    _mend_interpreter()
    mode = SimpleNamespace(interpret=True)
    inner = functools.partial(_compile_for_stub, compile_fx.compile_fx_inner, mode)
    original = compile_fx.compile_fx

    @functools.wraps(original)
    def compile_fx_for_stub(
        gm: fx.GraphModule, inputs: Sequence[Any], inner_compile: Any = inner, **kwargs: Any
    ) -> Any:
        return original(gm, inputs, inner_compile=inner_compile, **kwargs)

    compile_fx.compile_fx = compile_fx_for_stub
    return functools.partial(_answer, mode)


def _mend_interpreter() -> None:
    """Speed up Triton's interpreter, and give it the GPU's conversions from and to bfloat16.

    Reductions by NumPy, one patch of each device function, no checks for overflow (Inductor has none on a GPU either).
    """
    import numpy as np
    import triton.language as tl
    from torch._inductor.runtime import triton_helpers
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # NumPy's maximum and minimum hand on a NaN, as these two functions do.
    numpy_forms = {triton_helpers.maximum.fn: np.max, triton_helpers.minimum.fn: np.min}
    reduce = interpreter.ReduceOps.apply_impl

    def apply_impl(self: Any, values: Any) -> Any:
        form = numpy_forms.get(getattr(self.combine_fn, "fn", None))
        return self.min_max(values[0], val_reduce_op=form) if form else reduce(self, values)

    patched: set[Any] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The interpreter never takes a device function's patches back, and repeats the kernel's own at every launch.
        if self.fn not in patched:
            patched.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    convert = interpreter._convert_float
    nearest_even = interpreter._ir.ROUNDING_MODE.RTNE

    def convert_float(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return x.view(np.uint16).astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16) and rounding in (None, nearest_even):
            bits = x.view(np.uint32)
            nearest = bits + 0x7FFF + (bits >> 16 & 1)
            return (np.where(np.isnan(x), bits | 0x400000, nearest) >> 16).astype(np.uint16)
        return convert(x, source, target, rounding)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        # Triton 3.6 takes the int of an array of one element, which NumPy 2.4 refuses; loop bounds need it.
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._convert_float = convert_float
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.ReduceOps.apply_impl = apply_impl
    interpreter.InterpretedFunction.__call__ = call


def _answer(mode: SimpleNamespace, call: Call) -> Outcome | str:
    from torch._inductor.utils import run_and_get_code

    def argument(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.is_meta:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)  # never touched, so never in memory
        return x

    mode.interpret = call.interpret
    try:
        fn = torch.compile(call.fn, fullgraph=True) if call.compiled else call.fn
        result, sources = run_and_get_code(fn, *pytree.tree_map(argument, call.args))
        result = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, result) if call.interpret else None
        return Outcome(sources, result)
    except Exception:
        return traceback.format_exc()


def _compile_for_stub(
    compile_inner: Callable[..., Any],
    mode: SimpleNamespace,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    **kwargs: Any,
) -> Any:
    """Inductor's ``inner_compile``, with the graph moved to the stub GPU first.

    Tensor constants inside the graph stay on the CPU.
    """
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    def on_gpu(value: Any) -> Any:
        return _DEVICE if isinstance(value, torch.device) and value.type == "cpu" else value

    for node in gm.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, on_gpu)
        node.kwargs = fx.node.map_aggregate(node.kwargs, on_gpu)
    gm.recompile()
    fake_mode = torch._guards.detect_fake_mode(example_inputs)
    assert fake_mode is not None
    with fake_mode:
        fake = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_DEVICE)
            if isinstance(x, torch.Tensor)
            else x
            for x in example_inputs
        ]
    FakeTensorProp(gm, fake_mode).propagate_dont_convert_inputs(*fake)
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    shapes = pytree.tree_map_only(fx.Node, lambda node: node.meta["val"], list(output.args[0]))

    compiled = compile_inner(gm, fake, **kwargs)
    if not mode.interpret:

        def no_kernels(inputs: list[Any]) -> list[Any]:
            inputs.clear()
            return [
                torch.empty_strided([int(n) for n in x.shape], [int(n) for n in x.stride()], dtype=x.dtype)
                if isinstance(x, torch.Tensor)
                else x
                for x in shapes
            ]

        compiled.current_callable = no_kernels
    return compiled
