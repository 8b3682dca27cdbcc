"""Measure the memory of a training step: plain Inductor, and sampled weights that are saved or recomputed.

Each variant trains a Llama in a process of its own, once with float32 weights under bf16 autocast, once with bf16
weights. Two figures are read, both of them counted, not estimated:

    saved   what autograd keeps from forward to backward, beside the parameters
    peak    tensor memory at the worst moment of a step (forward, backward, AdamW), parameters and optimizer included

and their differences to the plain model in bytes per parameter that is sampled. On a CPU the peak is that of torch's
allocator too, as its profiler sees it; the process's resident size also holds compilers and what malloc keeps back.

    python benchmarks/memory.py --size small
    python benchmarks/memory.py --size 1b --json memory.json     # on a GPU

Needs ``pip install "gws-compile[examples]"``.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch._functorch.config
from llama import SIZES, Size, build_model
from tabulate import tabulate
from timing import keep, quiet_profiler

import gws_compile

VARIANTS = ("plain", "save", "recompute")
PRECISIONS = {"autocast": "float32 weights, bf16 autocast", "bf16": "bf16 weights"}
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Measurement:
    """One variant's figures, in bytes.

    Attributes:
        sampled: parameters (elements) that are rewritten; 0 in the plain model.
        saved: kept for backward, without the parameters themselves.
        peak: of a step, in tensors.
    """

    variant: str
    precision: str
    parameters: int
    sampled: int
    saved: int
    peak: int


def measure(variant: str, precision: str, size: Size, fmt: str, device: str) -> Measurement:
    """Train a few steps and measure one."""
    torch.manual_seed(0)
    model = build_model(size).to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    backend = None if variant == "plain" else gws_compile.backend(fmt, backward=variant)
    compiled = torch.compile(model, backend=backend or "inductor", fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, size.vocabulary, (size.batch, size.seq), device=device)

    def forward() -> torch.Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "autocast"):
            return compiled(input_ids=tokens, labels=tokens).loss

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    # What is compiled here and now is measured, not what another process has left in the cache.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        for _ in range(WARM_UP_STEPS):
            step()
    tensors = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    peak = peak_of(step, sum(t.nbytes for t in tensors), device)

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    loss.backward()

    rewritten = backend.report().rewritten if backend else []
    sampled = sum(model.get_parameter(record.name).numel() for record in rewritten)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Measurement(variant, precision, parameters, sampled, sum(kept.values()), peak)


def peak_of(step: Callable[[], None], standing: int, device: str) -> int:
    """Tensor memory at the worst moment of a step that begins with ``standing`` bytes."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    quiet_profiler()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return standing + max(itertools.accumulate(changes))


def table(measurements: Sequence[Measurement]) -> str:
    """Absolute figures, and the differences to the plain model in bytes per sampled parameter."""
    rows = []
    for m in measurements:
        plain = next(p for p in measurements if (p.variant, p.precision) == ("plain", m.precision))
        extra = ["", ""]
        if m.sampled:
            extra = [f"{difference / m.sampled:+.3f}" for difference in (m.saved - plain.saved, m.peak - plain.peak)]
        mib = [f"{figure / 2**20:,.2f}" for figure in (m.saved, m.peak)]
        rows.append((PRECISIONS[m.precision], m.variant, mib[0], extra[0], mib[1], extra[1]))
    return tabulate(
        rows,
        headers=("precision", "variant", "saved MiB", "bytes/param", "peak MiB", "bytes/param"),
        colalign=("left", "left", *["right"] * 4),
        disable_numparse=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="134m" if cuda else "small", help="(default: %(default)s)")
    parser.add_argument("--fmt", default="fp8_e4m3", help="format of the weights (default: %(default)s)")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="(default: all)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="(default: %(default)s here)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)

    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "CPU"
    facts = {
        "size": {"name": args.size, **asdict(SIZES[args.size])},
        "fmt": args.fmt,
        "device": device,
        "platform": platform.platform(),
        "torch": torch.__version__,
    }
    measurements: list[Measurement] = []
    for precision, variant in itertools.product(args.precision, VARIANTS):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            job = fresh.submit(measure, variant, precision, SIZES[args.size], args.fmt, args.device)
            measurements.append(job.result())
        keep(args.json, {**facts, "measurements": [asdict(m) for m in measurements]})
    sampled, parameters = measurements[-1].sampled, measurements[-1].parameters
    print(f"Llama, {parameters / 1e6:.3g} M parameters, {sampled / 1e6:.3g} M sampled ({args.fmt}), {device}")
    print(table(measurements))


if __name__ == "__main__":
    main()
