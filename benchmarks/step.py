"""Time a whole training step (forward, backward, AdamW) of a Llama: plain Inductor, this backend, and its peers.

    plain          torch.compile(model)
    save           this backend
    recompute      with backward="recompute"
    learned        with learned bit widths, one for each block
    direct         with master=False: parameters on their grids, written behind the optimizer's step
    2:4            with sparsity="2:4"
    mxfp8, ...     with a recipe: weights, activations and gradients rounded
    parametrize    the noise by hand: torch.nn.utils.parametrize, torch.randn
    torchao        quantization-aware training of torchao, float8 weights
    torchao-mx     MXFP8 training of torchao, emulated: what "mxfp8" is to be held to
    diffq          DiffQ, by its hooks

all compiled by Inductor in the same process, and timed in turns; a peer that is not installed is left out, and that is
said. ``x plain`` is the median, over the rounds, of the time over plain's of the same round. Peak memory is that of the
tensors at the worst moment of one step, the model's own and the optimizer's included, the other models' not.

Compilation is timed in processes of their own: from the first call to the end of the first step, less a later step;
``cold`` with empty caches, ``warm`` with those that the cold one has left. ``--where`` adds what the time goes into;
``--profile`` says so of a step, kernel by kernel.

    python benchmarks/step.py                                # small on a CPU, 134m on a GPU
    python benchmarks/step.py --size 1b --variants plain save recompute --json step.json

Needs ``pip install "gws-compile[examples,bench]"``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from llama import SIZES, Size, build_model
from memory import PRECISIONS, peak_of
from tabulate import tabulate
from timing import environment, interleaved, keep, quiet_profiler, ratio
from torch._dynamo.utils import compilation_time_metrics, counters

import gws_compile

OWN: dict[str, dict[str, Any]] = {
    "save": {},
    "recompute": {"backward": "recompute"},
    "learned": {"fmt": None, "bits": gws_compile.LearnedBits()},
    "direct": {"master": False},
    "2:4": {"sparsity": "2:4"},
    **{name: {"fmt": "e3m2" if name == "exmy" else None, "recipe": name} for name in gws_compile.RECIPES},
}
VARIANTS = ("plain", *OWN, *peers.PEERS)

# What torch times of a compilation (torch 2.11 to 2.15), and what it is.
PHASES = {
    "dynamo": ("bytecode_tracing",),
    "rewriting": ("gws_compile.rewrite",),
    "autograd": ("aot_trace_joint_graph", "_recursive_joint_graph_passes", "min_cut_rematerialization_partition"),
    "lowering": ("GraphLowering.run",),
    "scheduling": ("Scheduler.__init__", "Scheduler.codegen"),
    "C++ or Triton": ("compile_file", "async_compile.wait", "PyCodeCache.load_by_key_path"),
}


@dataclass(frozen=True)
class Timing:
    """One variant's step.

    Attributes:
        seconds: median of a step.
        over_plain: median of its ratio to plain's step of the same round.
        tokens: a second.
        peak: bytes, see `memory.peak_of`.
        graphs: that Dynamo has compiled.
        breaks: graph breaks.
        recompilations: of a frame that had been compiled.
    """

    variant: str
    precision: str
    seconds: float
    over_plain: float
    tokens: float
    peak: int
    graphs: int
    breaks: int
    recompilations: int


@dataclass(frozen=True)
class Compilation:
    """Seconds that compiling one variant takes, and what they go into where it is cold.

    Attributes:
        phases: `PHASES` -> seconds; they overlap where one waits for another.
    """

    variant: str
    precision: str
    cold: float
    warm: float
    phases: dict[str, float]


@dataclass(frozen=True)
class Profile:
    """What one step's time goes into.

    Attributes:
        kernels: seconds and calls by kernel, those of the longest time first; on a CPU, by operator.
    """

    variant: str
    precision: str
    kernels: dict[str, tuple[float, int]]


class Training:
    """One variant's model, with what trains it.

    Raises:
        peers.Missing: its package is not installed.
    """

    def __init__(self, variant: str, precision: str, size: Size, fmt: str, device: str) -> None:
        torch.manual_seed(0)
        self.model = build_model(size).to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
        backend: Any = "inductor"
        tokens = torch.randint(0, size.vocabulary, (size.batch, size.seq), device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        if variant in peers.PEERS:
            peers.PEERS[variant](self.model, self.optimizer)
        elif variant in OWN:
            backend = gws_compile.backend(**{"fmt": fmt, **OWN[variant]})
        self._compiled = torch.compile(self.model, backend=backend)
        if variant == "learned":
            backend.prepare(self.model, input_ids=tokens, labels=tokens)
            self.optimizer.add_param_group({"params": list(backend.parameters())})
        self._tokens = tokens
        self._autocast = (torch.device(device).type, torch.bfloat16)
        self._enabled = precision == "autocast"

    def step(self) -> None:
        """Forward, backward, optimizer."""
        with torch.autocast(*self._autocast, enabled=self._enabled):
            loss = self._compiled(input_ids=self._tokens, labels=self._tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def standing(self) -> int:
        """Bytes of parameters and of the optimizer's state."""
        state = (t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
        return sum(t.nbytes for t in [*self.model.parameters(), *state])


def start(
    variants: Iterable[str], precision: str, size: Size, fmt: str, device: str
) -> tuple[dict[str, Training], dict[str, tuple[int, int, int]], dict[str, str]]:
    """Compile the variants: by name the trainings, what Dynamo counted of each, and why others were left out."""
    # Each variant is another backend for the same code of transformers.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(VARIANTS))
    trainings: dict[str, Training] = {}
    missing: dict[str, str] = {}
    counted: dict[str, tuple[int, int, int]] = {}
    for variant in variants:
        torch._dynamo.reset()
        counters.clear()
        try:
            trainings[variant] = training = Training(variant, precision, size, fmt, device)
        except peers.Missing as error:
            missing[variant] = str(error)
            continue
        for _ in range(2):
            training.step()
        stats = counters["stats"]
        counted[variant] = (
            stats["unique_graphs"],
            sum(counters["graph_break"].values()),
            sum(counters["recompiles"].values()),
        )
    return trainings, counted, missing


def measure(
    trainings: Mapping[str, Training],
    counted: Mapping[str, tuple[int, int, int]],
    precision: str,
    size: Size,
    device: str,
    rounds: int,
) -> list[Timing]:
    """Time the variants' steps in turns."""
    times = interleaved({name: t.step for name, t in trainings.items()}, device, rounds=rounds)
    peaks = {name: _peak(t, device) for name, t in trainings.items()}
    base = times.get("plain", times[next(iter(times))])
    result = []
    for name, of_variant in times.items():
        seconds = statistics.median(of_variant)
        over, speed = ratio(of_variant, base), size.batch * size.seq / seconds
        result.append(Timing(name, precision, seconds, over, speed, peaks[name], *counted[name]))
    return result


def profile_of(training: Training, variant: str, precision: str, device: str) -> Profile:
    """What the time of one step goes into, as torch's profiler sees it."""
    quiet_profiler()
    activity = torch.profiler.ProfilerActivity
    gpu = device.startswith("cuda")
    with torch.profiler.profile(activities=[activity.CUDA if gpu else activity.CPU]) as profiler:
        training.step()
        if gpu:
            torch.cuda.synchronize()
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    spent = {event.key: (getattr(event, key) / 1e6, event.count) for event in profiler.key_averages()}
    spent = {name: found for name, found in spent.items() if found[0]}
    return Profile(variant, precision, dict(sorted(spent.items(), key=lambda item: -item[1][0])))


def profile_table(profile: Profile, most: int = 15) -> str:
    """The kernels that take longest, and all of those that sample weights."""
    total = sum(seconds for seconds, _ in profile.kernels.values())
    shown = [name for i, name in enumerate(profile.kernels) if i < most or "sample_weight" in name]
    rows = [
        (name[:90], profile.kernels[name][1], f"{1e3 * profile.kernels[name][0]:.3f}",
         f"{100 * profile.kernels[name][0] / total:.2f} %")
        for name in shown
    ]  # fmt: skip
    head = f"One step of {profile.variant}, {PRECISIONS[profile.precision]}: {1e3 * total:,.1f} ms in kernels"
    headers = ("kernel", "calls", "ms", "of all")
    return f"{head}\n{tabulate(rows, headers=headers, colalign=('left', 'right', 'right', 'right'))}"


def _peak(training: Training, device: str) -> int:
    others = 0
    if device.startswith("cuda"):
        others = torch.cuda.memory_allocated(device) - training.standing
    return peak_of(training.step, training.standing, device) - others


def measure_compilation(variant: str, precision: str, size: Size, fmt: str, device: str) -> Compilation:
    """Compile in two fresh processes, the second with the first one's caches."""
    context = multiprocessing.get_context("spawn")
    kept = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(dict.fromkeys(kept, folder))
        try:
            found = []
            for _ in range(2):
                with ProcessPoolExecutor(1, context) as fresh:
                    found.append(fresh.submit(_compile, variant, precision, size, fmt, device).result())
        finally:
            for name, value in kept.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
    (cold, phases), (warm, _) = found
    return Compilation(variant, precision, cold, warm, phases)


def _compile(variant: str, precision: str, size: Size, fmt: str, device: str) -> tuple[float, dict[str, float]]:
    training = Training(variant, precision, size, fmt, device)

    def seconds(function: Callable[[], None]) -> float:
        start = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = seconds(training.step)
    later = min(seconds(training.step) for _ in range(2))
    spent = {name: sum(times) for name, times in compilation_time_metrics.items()}
    return first - later, {phase: sum(spent.get(name, 0.0) for name in names) for phase, names in PHASES.items()}


def step_table(timings: Sequence[Timing]) -> str:
    """One row for each variant and precision."""
    rows = [
        (
            PRECISIONS[t.precision],
            t.variant,
            f"{t.seconds * 1e3:,.1f}",
            f"{t.over_plain:.4f}",
            f"{t.tokens:,.0f}",
            f"{t.peak / 2**20:,.1f}",
            t.graphs,
            t.breaks,
            t.recompilations,
        )
        for t in timings
    ]
    headers = ("precision", "variant", "ms", "x plain", "tokens/s", "peak MiB", "graphs", "breaks", "recompiled")
    return tabulate(rows, headers=headers, colalign=("left", "left", *["right"] * 7), disable_numparse=True)


def compilation_table(compilations: Sequence[Compilation], *, where: bool) -> str:
    """One row for each variant and precision; the phases of a cold compilation where they are wanted."""
    rows = []
    for c in compilations:
        plain = next((p for p in compilations if (p.variant, p.precision) == ("plain", c.precision)), c)
        phases = [f"{c.phases[phase]:.1f}" for phase in PHASES] if where else []
        over = [f"{c.cold:.1f}", f"{c.cold / plain.cold:.2f}", f"{c.warm:.1f}", f"{c.warm / plain.warm:.2f}"]
        rows.append((PRECISIONS[c.precision], c.variant, *over, *phases))
    headers = ("precision", "variant", "cold s", "x plain", "warm s", "x plain", *(PHASES if where else ()))
    return tabulate(
        rows, headers=headers, colalign=("left", "left", *["right"] * (len(headers) - 2)), disable_numparse=True
    )


def main(argv: Sequence[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="134m" if cuda else "small", help="(default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(default: all)")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="(default: all)")
    parser.add_argument("--fmt", default="fp8_e4m3", help="format of the weights (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="(default: %(default)s here)")
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--no-compile-time", dest="compilation", action="store_false", help="time steps alone")
    parser.add_argument("--where", action="store_true", help="what a cold compilation's time goes into")
    parser.add_argument("--profile", action="store_true", help="what a step's time goes into, kernel by kernel")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)
    if "plain" not in args.variants:
        parser.error("--variants needs plain, which the others are compared with")

    size, facts = SIZES[args.size], environment(args.device)
    common = (size, args.fmt, args.device)
    timings: list[Timing] = []
    compilations: list[Compilation] = []
    profiles: list[Profile] = []

    def keep_figures() -> None:
        figures = {
            **facts,
            "size": {"name": args.size, **asdict(size)},
            "fmt": args.fmt,
            "rounds": args.rounds,
            "steps": [asdict(t) for t in timings],
            "compilations": [asdict(c) for c in compilations],
            "profiles": [asdict(p) for p in profiles],
        }
        keep(args.json, figures)

    print(f"Llama {args.size}, {size.batch} x {size.seq} tokens, {args.fmt}; {facts['device']}, torch {facts['torch']}")
    for precision in args.precision:
        trainings, counted, missing = start(args.variants, precision, *common)
        timings += measure(trainings, counted, precision, size, args.device, args.rounds)
        keep_figures()
        for variant, reason in missing.items():
            print(f"{variant} was left out: {reason}")
        if args.profile:
            profiles += [profile_of(t, variant, precision, args.device) for variant, t in trainings.items()]
            keep_figures()
        if args.compilation:
            for variant in trainings:
                compilations.append(measure_compilation(variant, precision, *common))
                keep_figures()
    print(step_table(timings))
    if compilations:
        print(f"\n{compilation_table(compilations, where=args.where)}")
    for profile in profiles:
        print(f"\n{profile_table(profile)}")


if __name__ == "__main__":
    main()
