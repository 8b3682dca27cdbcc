"""Count the instructions of the Triton kernels that Inductor generates for a sampled weight. Needs no GPU.

The kernels are generated as for an H100, compiled by Triton's own ptxas for each compute capability, in the first of
the launch configurations that Inductor would time on the GPU, and disassembled. For each kernel:

    instr/elem    instructions of a thread over the elements that it computes; exact, since the kernels have no loops
    registers     of a thread; 65,536 / 2,048 = 32 is what full occupancy leaves
    spills        loads and stores of local memory
    bytes/elem    that the kernel has to load and store of tensors as large as the weight

A weight that is read once takes one kernel. Where an operation of the model's own is fused behind the sample, or a
block is partial, it is read twice, by two kernels.

    python benchmarks/codegen.py                 # the table
    python benchmarks/codegen.py --write         # keep it in benchmarks/results/codegen.json, which a test reads

Needs ``pip install triton`` (3.6 or newer); the figures depend on its version, which is kept with them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from offline_gpu import Call, Outcome, compile_kernels, kernel_sources, run_calls
from tabulate import tabulate
from torch.nn import functional as F

import gws_compile.codegen.lowering  # noqa: F401  registers the lowerings
from gws_compile import LearnedBits
from gws_compile.config import Config
from gws_compile.numerics.blocks import block_argument
from gws_compile.ops.sample_arguments import OPERATOR_VERSION

KEPT = Path(__file__).parent / "results" / "codegen.json"
CAPABILITIES = (80, 90, 100)
BLOCK = 32


@dataclass(frozen=True)
class Figure:
    """One kernel's figures.

    Attributes:
        case: what is compiled, see `CASES`.
        capability: compute capability, 90 for sm_90.
        kernel: number of the kernel among those of a weight.
        instructions: an element.
        registers: a thread.
        spills: loads and stores of local memory.
        bytes: an element, of tensors as large as the weight.
        libdevice: calls of functions that are none of the arithmetic here.
        wide: 64-bit integer operations other than those that addresses are put together by.
    """

    case: str
    capability: int
    kernel: int
    instructions: float
    registers: int
    spills: int
    bytes: float
    libdevice: int
    wide: int


@dataclass(frozen=True)
class Case:
    """A linear layer with a sampled weight, in bfloat16.

    Attributes:
        rows, cols: the weight's shape.
        dtype: its dtype.
        fmt: format of the cast, or a preset.
        noise: its law.
        inside: whether the conversion to bfloat16 is the operator's, as the backend has it; else it comes behind.
        learned: whether bit widths are learned, one for each block.
    """

    rows: int
    cols: int
    dtype: torch.dtype = torch.float32
    fmt: str = "fp8_e4m3"
    noise: str = "rounded_normal"
    inside: bool = True
    learned: bool = False


CASES = {
    "4096 x 4096": Case(4096, 4096),
    "4096 x 4096, read twice": Case(4096, 4096, inside=False),
    "2304 x 768": Case(2304, 768),
    "2304 x 768, read twice": Case(2304, 768, inside=False),
    "4096 x 4096, bf16 weight": Case(4096, 4096, torch.bfloat16),
    "4096 x 4096, uniform": Case(4096, 4096, noise="uniform"),
    "4096 x 4096, no noise": Case(4096, 4096, noise="none"),
    "4096 x 4096, fp4_e2m1": Case(4096, 4096, fmt="fp4_e2m1"),
    "4096 x 4096, bf16 grid": Case(4096, 4096, fmt="bf16"),
    "4096 x 4096, learned": Case(4096, 4096, fmt="bf16", learned=True),
    "4096 x 4096, nvfp4": Case(4096, 4096, fmt="nvfp4"),
    "4096 x 4096, int4_group": Case(4096, 4096, fmt="int4_group"),
    "4096 x 4096, fp8_channel": Case(4096, 4096, fmt="fp8_channel"),
    "2304 x 768, fp8_channel": Case(2304, 768, fmt="fp8_channel"),
    "4096 x 4096, fp8_block": Case(4096, 4096, fmt="fp8_block"),
    "4096 x 4096, fp8_tensor": Case(4096, 4096, fmt="fp8_tensor"),
}


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    source: tuple[torch.Tensor | None, torch.Tensor | None],
    settings: tuple[Any, ...],
    rest: tuple[Any, ...],
) -> torch.Tensor:
    """What is compiled."""
    w_hat = torch.ops.gws.sample_weight(w, *source, 0, *settings, *rest, True, 0, "", OPERATOR_VERSION)
    return F.linear(x, w_hat.to(torch.bfloat16))


def call(case: Case) -> Call:
    """The call to compile, on large tensors that take no memory."""
    x = torch.empty(16, case.cols, dtype=torch.bfloat16, device="meta")
    w = torch.empty(case.rows, case.cols, dtype=case.dtype, device="meta")
    source = (torch.zeros(2, dtype=torch.int32), torch.zeros(4, dtype=torch.int32))
    weights = Config.make(case.fmt, noise=case.noise).weights
    block = tuple(block_argument(weights.block))
    settings = (weights.fmt.spec, weights.bits, case.noise, block, weights.scale or "")
    learned = torch.ones(case.rows // BLOCK, case.cols // BLOCK) if case.learned else None
    rule = LearnedBits().rule.spec if case.learned else ""
    out_dtype = torch.bfloat16 if case.inside and case.dtype != torch.bfloat16 else None
    rest = (learned, rule, (), (), None, out_dtype)
    return Call(linear, (x, w, (None, None) if case.noise == "none" else source, settings, rest), interpret=False)


def figures(name: str, outcome: Outcome, capability: int) -> list[Figure]:
    """The figures of a case's kernels."""
    case = CASES[name]
    sources = list(kernel_sources(outcome.sources[0]).values())
    result = []
    for number, kernel in enumerate(compile_kernels(outcome.sources[0], capability)):
        source = re.sub(r"(?m)^\s*#.*\n", "", sources[number])
        result.append(
            Figure(
                name,
                capability,
                number,
                round(kernel.instructions_per_element, 2),
                kernel.registers,
                kernel.spills,
                _bytes(source, case),
                len(set(re.findall(r"\b(?:libdevice|tl_math)\.(\w+)", source)) - {"abs"}),
                len(wide_arithmetic(kernel.ptx)),
            )
        )
    return result


def wide_arithmetic(ptx: str) -> list[str]:
    """The 64-bit integer operations of a kernel, without what is no arithmetic.

    Addresses are 64 bits wide: they are added, shifted left, and converted to. And the comparisons of 32 elements may
    be kept as the bits of one register, each of them read by a shift, a mask, and a comparison with 0.
    """
    bit = r"shr\.u64\s+(%rd\d+), %rd\d+, \d+;\s+and\.b64\s+(%rd\d+), \1, 1;\s+(?=setp\.ne\.b64\s+%p\d+, \2, 0;)"
    wide = r"(?m)^\s+(?:@%p\d+ )?((?:sub|mul|mad|div|rem|shr|and|xor|min|max)\.(?!wide)\S*64) "
    return re.findall(wide, re.sub(bit, "", ptx))


def _bytes(source: str, case: Case) -> float:
    """Bytes an element: the weight is ``in_ptr0`` in each kernel; what is stored whole is bfloat16."""
    read = len(re.findall(r"tl\.load\(in_ptr0 \+", source)) * case.dtype.itemsize
    (signature,) = re.findall(r"'signature': \{(.*?)\}", source)
    return read + 2 * len(re.findall(r"'out_ptr\d': '\*bf16'", signature))


def measure(names: Iterable[str], capabilities: Sequence[int]) -> list[Figure]:
    """Generate and compile the cases of these names."""
    names = list(names)
    outcomes = run_calls([call(CASES[name]) for name in names])
    found = zip(names, outcomes, strict=True)
    return [f for name, outcome in found for capability in capabilities for f in figures(name, outcome, capability)]


def table(measured: Sequence[Figure]) -> str:
    """One row for each kernel."""
    rows = [
        (f.case, f"sm_{f.capability}", f.kernel, f"{f.instructions:.1f}", f.registers, f.spills, f"{f.bytes:g}")
        for f in measured
    ]
    headers = ("weight", "for", "kernel", "instr/elem", "registers", "spills", "bytes/elem")
    return tabulate(rows, headers=headers, colalign=("left", "left", *["right"] * 5), disable_numparse=True)


def versions() -> dict[str, str]:
    """What the figures depend on."""
    return {"torch": torch.__version__.split("+")[0], "triton": importlib.metadata.version("triton")}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="(default: all)")
    parser.add_argument("--capability", nargs="+", type=int, default=list(CAPABILITIES), help="(default: 80 90 100)")
    parser.add_argument("--write", action="store_true", help=f"write the figures to {KEPT.name}")
    args = parser.parse_args(argv)
    measured = measure(args.case, args.capability)
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(table(measured))
    if args.write:
        KEPT.write_text(json.dumps({**versions(), "figures": [asdict(f) for f in measured]}, indent=1) + "\n")


if __name__ == "__main__":
    # The worker imports what it compiles from this module by its name.
    import codegen

    codegen.main()
