"""Time sampling a weight against the cast that it replaces: compiled, on one device, in turns.

For each format, noise, weight dtype and shape:

    cast      w.to(torch.bfloat16), compiled by Inductor (for a bf16 weight, a copy): what autocast does without us
    sample    noise and cast of this project, to bfloat16 in the same kernel
    fused     the same with an elementwise reader, a change of sign, which takes Inductor's loops over the elements
    randn     the same noise by hand, as PyTorch code under Inductor: torch.randn, rounded, on the block maximum
    uniform   DiffQ's noise (arXiv 2104.09987) by hand likewise: torch.rand, on the block maximum
    floor     where the scale is no power of two: the same with one

The hand-written ones add noise and convert to bfloat16; they are on no narrower format's grid, so they do less. Each is
timed writing to a fresh tensor (``fresh``), as a training step does, and to one that is there (``into``), which is an
elementwise reader too. ``x cast`` is the median, over the rounds, of the time over that of ``cast``, and ``x floor`` of
that over ``floor``; ``GB/s`` counts what has to move: the weight once and the result once.

    python benchmarks/kernels.py                       # what the documentation shows
    python benchmarks/kernels.py --all --json k.json   # every format and noise
    python benchmarks/kernels.py --presets             # what people train for: mxfp8, nvfp4, int4_group, ...

On a CPU without a GPU the shapes are smaller. On a GPU inputs rotate, so that none is found in the cache.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate
from timing import Rotation, environment, interleaved, keep, ratio

import gws_compile.codegen.lowering  # noqa: F401  registers the lowerings
from gws_compile.config import Config
from gws_compile.numerics.blocks import block_argument
from gws_compile.numerics.formats import FORMATS
from gws_compile.numerics.noise import NOISES
from gws_compile.numerics.presets import PRESETS
from gws_compile.numerics.scales import POWERS_OF_TWO
from gws_compile.ops.sample_arguments import SampleArguments
from gws_compile.settings.weight_settings import WeightSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = {"cuda": ("4096x4096", "4096x14336", "2304x768"), "cpu": ("4096x4096", "2304x768")}
BLOCK = 32


@dataclass(frozen=True)
class Case:
    """What is sampled."""

    fmt: str
    noise: str
    dtype: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Timing:
    """One function's figures.

    Attributes:
        variant: ``"cast"``, ``"sample"``, ``"fused"``, ``"randn"`` or ``"uniform"``.
        output: ``"fresh"`` or ``"into"``.
        seconds: median of a call.
        over_cast: median of its ratio to the cast of the same round and output.
        over_floor: the same to power-of-two scales; None where the scales are that.
        bandwidth: bytes that have to move, a second.
    """

    case: Case
    variant: str
    output: str
    seconds: float
    over_cast: float
    over_floor: float | None
    bandwidth: float


def settings_of(case: Case) -> WeightSettings:
    """How the weight of a case is sampled."""
    return Config.make(case.fmt, noise=case.noise).weights


def with_floor(settings: WeightSettings) -> WeightSettings:
    """The same elements in the same blocks, with power-of-two scales."""
    return replace(settings, scale="floor")


def sampler(settings: WeightSettings, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The operator as the backend calls it under bf16 autocast."""
    key = clock = None
    if settings.noise != "none":
        key = torch.tensor([11, -12], dtype=torch.int32, device=device)
        clock = torch.tensor([7, -1, 0, 0], dtype=torch.int32, device=device)
    given = SampleArguments(
        w=None,
        key=key,
        clock=clock,
        batch_dims=0,
        fmt=settings.fmt.spec,
        bits=settings.bits,
        noise=settings.noise,
        block=block_argument(settings.block),
        scale=settings.scale or "",
        learned=None,
        rule="",
        whole=[],
        offset=[],
        maxima=None,
        out_dtype=torch.bfloat16,
        keep=True,
    )
    _, *rest = given.call()

    def sample(w: torch.Tensor) -> torch.Tensor:
        return torch.ops.gws.sample_weight(w, *rest)

    return sample


def _by_hand(w: torch.Tensor, noise: torch.Tensor, bits: float) -> torch.Tensor:
    rows, cols = w.shape
    blocked = w.float().view(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK)
    amax = blocked.abs().amax((1, 3), keepdim=True)
    return (blocked + noise.view_as(blocked) * amax * 2 ** (1 - bits)).view_as(w).to(torch.bfloat16)


def with_randn(w: torch.Tensor, bits: float) -> torch.Tensor:
    """The rounded normal noise, by hand."""
    return _by_hand(w, torch.round(torch.randn(w.shape, device=w.device) / 2), bits)


def with_uniform(w: torch.Tensor, bits: float) -> torch.Tensor:
    """DiffQ's noise, by hand."""
    return _by_hand(w, torch.rand(w.shape, device=w.device) - 0.5, bits)


def functions(case: Case, device: str, peers: bool) -> dict[tuple[str, str], Callable[[], object]]:
    """What is timed, compiled, by variant and output."""
    dtype, settings = DTYPES[case.dtype], settings_of(case)
    bits = settings.bits
    weight = Rotation(lambda: torch.randn(case.shape, device=device).mul_(0.02).to(dtype), device)
    sample = sampler(settings, device)
    variants: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "cast": (lambda w: w.to(torch.bfloat16)) if dtype == torch.float32 else torch.clone,
        "sample": sample,
        "fused": lambda w: -sample(w),
    }
    if settings.scale not in (*POWERS_OF_TWO, None):
        variants["floor"] = sampler(with_floor(settings), device)
    if peers:
        variants |= {"randn": lambda w: with_randn(w, bits), "uniform": lambda w: with_uniform(w, bits)}
    timed: dict[tuple[str, str], Callable[[], object]] = {}
    torch._dynamo.reset()  # once: it drops what was compiled before
    for name, function in variants.items():

        def into(w: torch.Tensor, out: torch.Tensor, function: Callable = function) -> None:
            out.copy_(function(w))

        compiled = partial(torch.compile, fullgraph=True, dynamic=False)
        fresh, written = compiled(function), compiled(into)
        out = Rotation(lambda: torch.empty(case.shape, dtype=torch.bfloat16, device=device), device)
        timed[name, "fresh"] = lambda f=fresh: f(weight())
        timed[name, "into"] = lambda f=written, out=out: f(weight(), out())
        for output in ("fresh", "into"):
            timed[name, output]()  # compiled here
    return timed


def measure(case: Case, device: str, *, rounds: int, calls: int, peers: bool) -> Iterator[Timing]:
    """Time one case."""
    with torch.no_grad():  # where they are compiled too: that is among the things that compiled code depends on
        timed = functions(case, device, peers)
        times = interleaved({" ".join(key): f for key, f in timed.items()}, device, rounds=rounds, calls=calls)
    rows, cols = case.shape
    moved = rows * cols * (DTYPES[case.dtype].itemsize + 2)
    for variant, output in timed:
        of_variant = times[f"{variant} {output}"]
        seconds = statistics.median(of_variant)
        floor = times.get(f"floor {output}")
        yield Timing(
            case,
            variant,
            output,
            seconds,
            over_cast=ratio(of_variant, times[f"cast {output}"]),
            over_floor=None if floor is None else ratio(of_variant, floor),
            bandwidth=moved / seconds,
        )


def cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    pairs: list[tuple[str, str]]
    if args.presets:
        pairs = [(name, args.noise) for name in PRESETS]
    elif args.all:
        pairs = list(itertools.product(FORMATS, NOISES))
    else:
        pairs = [(fmt, args.noise) for fmt in args.fmt]
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shape]
    return [Case(fmt, noise, dtype, shape) for fmt, noise in pairs for dtype in args.dtype for shape in shapes]


def table(timings: Sequence[Timing]) -> str:
    """One row for each function."""
    rows = [
        (
            t.case.fmt,
            t.case.noise,
            t.case.dtype,
            "x".join(map(str, t.case.shape)),
            t.variant,
            t.output,
            f"{t.seconds * 1e3:.3f}",
            f"{t.over_cast:.2f}",
            "" if t.over_floor is None else f"{t.over_floor:.2f}",
            f"{t.bandwidth / 1e9:.1f}",
        )
        for t in timings
    ]
    return tabulate(
        rows,
        headers=("format", "noise", "weight", "shape", "variant", "output", "ms", "x cast", "x floor", "GB/s"),
        colalign=("left",) * 6 + ("right",) * 4,
        disable_numparse=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="(default: %(default)s here)")
    parser.add_argument("--fmt", nargs="+", default=["fp8_e4m3"], help="formats (default: fp8_e4m3)")
    parser.add_argument("--noise", choices=NOISES, default="rounded_normal", help="(default: %(default)s)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="weight dtypes (default: all)")
    parser.add_argument("--shape", nargs="+", metavar="ROWSxCOLS", help="multiples of 32")
    parser.add_argument("--all", action="store_true", help="every format with every noise")
    parser.add_argument("--presets", action="store_true", help="every preset")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="without the noise by hand")
    parser.add_argument("--rounds", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--calls", type=int, help="calls in each turn (default: 20 on a GPU, 1 elsewhere)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)
    args.shape = args.shape or SHAPES.get(args.device.split(":")[0], SHAPES["cpu"])
    calls = args.calls or (20 if args.device.startswith("cuda") else 1)

    facts = environment(args.device)
    timings: list[Timing] = []
    for case in cases(args):
        timings += measure(case, args.device, rounds=args.rounds, calls=calls, peers=args.peers)
        keep(args.json, {**facts, "rounds": args.rounds, "timings": [asdict(t) for t in timings]})
    print(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}; blocks of 32 x 32, but for presets")
    print(table(timings))


if __name__ == "__main__":
    main()
