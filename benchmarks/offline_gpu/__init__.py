"""Inductor's GPU code on a machine without a GPU: generate it, run it under Triton's interpreter, compile it to SASS.

`run_calls` starts a worker process in which Inductor believes in one CUDA device. Dynamo and AOTAutograd see the CPU
tensors that were passed in; only for the last stage, Inductor's ``inner_compile``, is the graph moved to fake CUDA
tensors. So the code is what a GPU of that kind gets (reduction hints, block sizes), while autograd and AOTAutograd's
run-time wrappers work as ever, and the generated wrapper runs on the CPU tensors: kernels under the interpreter, matrix
products by the CPU's own ``extern_kernels``.

The worker is `offline_gpu.worker`, where what had to be found out about torch and triton is written down.
"""

from __future__ import annotations

import collections
import importlib.util
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

CAPABILITY = 90
"""Compute capability of the GPU that Inductor generates code for."""

_KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.DOTALL)
_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")


@dataclass(frozen=True)
class Call:
    """One function call to compile, and to run if ``interpret``.

    Attributes:
        fn: anything that pickles: a function of an importable module, a `functools.partial` of one, an `nn.Module`.
        args: its arguments, on the CPU. Without ``interpret``, a tensor on the meta device stands for one of that shape
            that takes no memory.
        interpret: run the kernels. Otherwise only generate them; what ``fn`` returns is then of no meaning.
        compiled: compile ``fn`` as one graph. False for a ``fn`` that calls ``torch.compile`` itself (whatever uses
            Inductor in the worker generates code for the stub GPU), say to run a backward pass.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    interpret: bool = True
    compiled: bool = True


@dataclass(frozen=True)
class Outcome:
    """Generated sources, one per graph, and what the call returned (None where it was not run)."""

    sources: list[str]
    result: Any


def run_calls(calls: Sequence[Call]) -> list[Outcome]:
    """Run calls one after the other in one worker process, which takes about 6 s to start.

    Raises:
        RuntimeError: a call failed; the message holds the worker's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, reply = Path(folder, "request"), Path(folder, "reply")
        request.write_bytes(pickle.dumps(list(calls)))
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
            "TRITON_CACHE_DIR": folder,
            "TRITON_INTERPRET": "1",
        }
        command = [
            sys.executable,
            "-P",  # or the working directory goes before the paths that this process imports from
            "-c",
            f"from {__package__}.worker import serve; serve({str(request)!r}, {str(reply)!r})",
        ]
        worker = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if worker.returncode or not reply.exists():
            raise RuntimeError(f"the worker ended with code {worker.returncode}:\n{worker.stderr}")
        outcomes = pickle.loads(reply.read_bytes())
    for call, outcome in zip(calls, outcomes, strict=True):
        if isinstance(outcome, str):
            raise RuntimeError(f"{call.fn} failed in the worker:\n{outcome}")
    return outcomes


def triton_source(fn: Callable[..., Any], *args: Any) -> list[str]:
    """What Inductor generates for ``fn`` on a GPU: per graph, its Triton kernels and the Python wrapper."""
    return run_calls([Call(fn, args, interpret=False)])[0].sources


def interpret(fn: Callable[..., Any], *args: Any) -> Any:
    """The result of the code that Inductor generates for ``fn`` on a GPU, run on the CPU."""
    return run_calls([Call(fn, args)])[0].result


def kernel_sources(source: str) -> dict[str, str]:
    """The Triton kernels in a generated source: name -> the module's text."""
    return dict(_KERNEL.findall(source))


# --- Compilation for a GPU -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A generated kernel compiled for a GPU with one of the launch configurations that Inductor chooses among.

    Attributes:
        name: the kernel's name.
        config: block sizes and warps.
        elements_per_thread: the block's elements over the threads that share it.
        ptx: PTX text.
        sass: the disassembled machine code.
        opcodes: how often each instruction stands in ``sass``, without the padding behind the end.
        registers: registers of a thread.
        stack: bytes of local memory of a thread.
        shared: bytes of shared memory of a program.
    """

    name: str
    config: str
    elements_per_thread: float
    ptx: str = field(repr=False)
    sass: str = field(repr=False)
    opcodes: collections.Counter[str] = field(repr=False)
    registers: int
    stack: int
    shared: int

    @property
    def instructions(self) -> int:
        """Instructions in the kernel; those that run, if it has no loop."""
        return self.opcodes.total()

    @property
    def instructions_per_element(self) -> float:
        """Instructions over the elements of one pass: what an element costs, if the kernel has no loop."""
        return self.instructions / self.elements_per_thread

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.split(".")[0] in ("LDL", "STL"))


def compile_kernels(source: str, capability: int = CAPABILITY, *, every_config: bool = False) -> list[Kernel]:
    """Compile the kernels of a generated source with triton's own ptxas, and disassemble them.

    Args:
        source: from `triton_source`.
        capability: compute capability to compile for. Inductor's choices stay those for `CAPABILITY`.
        every_config: compile every launch configuration that Inductor would time on the GPU, not the first alone.
    """
    kernels = []
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        for name, text in kernel_sources(source).items():
            tuner = _load(name, text, Path(folder))
            fixed = {k: int(v) for k, v in re.findall(r"(\w*BLOCK)\s*:\s*tl\.constexpr\s*=\s*(\d+)", text)}
            for config in tuner.configs if every_config else tuner.configs[:1]:
                kernels.append(_compile(name, tuner, config, fixed, capability, Path(folder)))
    return kernels


def _load(name: str, text: str, folder: Path) -> Any:
    """Run a kernel's module (triton reads the function's source from its file) -> Inductor's autotuner."""
    from torch._inductor.runtime import triton_helpers

    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(triton_helpers, "set_driver_to_gpu"):
        spec.loader.exec_module(module)
    return getattr(module, name)


def _compile(name: str, tuner: Any, config: Any, fixed: dict[str, int], capability: int, folder: Path) -> Kernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    meta = tuner.triton_meta
    # The options of Inductor's own CachingAutotuner._precompile_config.
    compiled = triton.compile(
        ASTSource(tuner.fn, dict(meta["signature"]), meta["constants"] | config.kwargs, meta["configs"][0]),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "debug": tuner.inductor_meta.get("assert_indirect_indexing", True),
            "sanitize_overflow": False,
            "enable_fp_fusion": meta.get("enable_fp_fusion", True),
        },
    )
    cubin = folder / f"{name}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    sass = _cuobjdump("-sass", cubin)
    usage = dict(re.findall(r"(\w+):(\d+)", _cuobjdump("--dump-resource-usage", cubin).splitlines()[-1]))
    block = math.prod((fixed | {k: v for k, v in config.kwargs.items() if k.endswith("BLOCK")}).values())
    return Kernel(
        name=name,
        config=", ".join(f"{k}={v}" for k, v in (fixed | config.all_kwargs()).items() if v is not None),
        elements_per_thread=block / (32 * config.num_warps),
        ptx=compiled.asm["ptx"],
        sass=sass,
        opcodes=_opcodes(sass),
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared=int(usage["SHARED"]),
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout.strip()


def _opcodes(sass: str) -> collections.Counter[str]:
    """Instructions, without the NOPs and the branch to itself that fill up the end."""
    return collections.Counter(
        opcode
        for address, opcode, operands in _SASS_LINE.findall(sass)
        if opcode != "NOP" and not (opcode == "BRA" and re.search(rf"\b0x0*{int(address, 16):x}\b", operands))
    )
