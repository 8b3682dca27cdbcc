"""Plot how cost grows: sampling over copying, with the weights' size; compiling, with the number of layers.

Left: the compiled sample of one square weight over its compiled cast to bfloat16, each with a fresh result, in turns,
for weights from 1 M elements up. Right: seconds from the first call to the end of the first step, less a later step,
with empty caches, of Llamas of more and more layers; each compiled as a whole, and layer by layer
(``layer.compile(...)``), where all layers share one compiled function.

    python benchmarks/growth.py --write            # benchmarks/results/growth-cpu.json and docs/growth-cpu.png

Needs ``pip install "gws-compile[examples]"``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from kernels import Case, measure
from llama import SIZES, build_model
from timing import environment, keep

import gws_compile

ROOT = Path(__file__).parents[1]
WAYS = ("plain", "sampled", "plain, layer by layer", "sampled, layer by layer")


@dataclass(frozen=True)
class Sampling:
    """One size of weight.

    Attributes:
        elements: of the weight.
        over_cast: median ratio of the times.
    """

    elements: int
    over_cast: float


@dataclass(frozen=True)
class Compiling:
    """One number of layers, compiled in one of `WAYS`.

    Attributes:
        seconds: median of the tries.
    """

    way: str
    layers: int
    seconds: float


def sampling(sides: Sequence[int], device: str, rounds: int) -> list[Sampling]:
    """Time square float32 weights of these sides."""
    calls = 20 if device.startswith("cuda") else 1
    found = []
    for side in sides:
        case = Case("fp8_e4m3", "rounded_normal", "float32", (side, side))
        timings = measure(case, device, rounds=rounds, calls=calls, peers=False)
        (over,) = [t.over_cast for t in timings if (t.variant, t.output) == ("sample", "fresh")]
        found.append(Sampling(side * side, over))
    return found


def compiling(layers: Sequence[int], device: str, tries: int) -> list[Compiling]:
    """Compile Llamas of these numbers of layers, in fresh processes with empty caches, the ways in turns."""
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(tries):
        for count in layers:
            for way in WAYS:
                times.setdefault((way, count), []).append(_in_a_fresh_process(way, count, device))
    return [Compiling(way, count, statistics.median(found)) for (way, count), found in times.items()]


def _in_a_fresh_process(way: str, layers: int, device: str) -> float:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, context) as fresh:
        return fresh.submit(_compile, way, layers, device, folder).result()


def _compile(way: str, layers: int, device: str, folder: str) -> float:
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
    size = replace(SIZES["tiny"], layers=layers, width=256, inner_width=704, heads=4)
    torch.manual_seed(0)
    model = build_model(size).to(device)
    backend = gws_compile.backend() if way.startswith("sampled") else "inductor"
    compiled = model
    if way.endswith("layer by layer"):
        for layer in model.model.layers:
            layer.compile(backend=backend)
    else:
        compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, size.vocabulary, (size.batch, size.seq), device=device)

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = step()
    return first - min(step(), step())


def plot(samplings: Sequence[Sampling], compilings: Sequence[Compiling], title: str, path: Path) -> None:
    """Draw both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    left.semilogx([s.elements for s in samplings], [s.over_cast for s in samplings], "o-", color="#1f5fa8")
    left.axhline(1, color="0.6", linewidth=1)
    left.set(xlabel="elements of the weight", ylabel="time over that of the cast", ylim=(0, None))
    left.set_title("sampling, float32 to bfloat16", fontsize=10)
    styles = dict(zip(WAYS, (("#888888", "-"), ("#1f5fa8", "-"), ("#888888", "--"), ("#1f5fa8", "--")), strict=True))
    for way, (color, line) in styles.items():
        points = sorted((c.layers, c.seconds) for c in compilings if c.way == way)
        right.plot(*zip(*points, strict=True), marker="o", color=color, linestyle=line, label=way)
    right.set(xlabel="layers", ylabel="seconds, caches empty", ylim=(0, None))
    right.set_title("compiling a training step", fontsize=10)
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="(default: %(default)s here)")
    parser.add_argument(
        "--largest", type=float, metavar="M", default=1074, help="million elements (default: %(default)s: 13 GB)"
    )
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 2, 4, 8], help="(default: 1 2 4 8)")
    parser.add_argument("--rounds", type=int, default=15, help="of sampling (default: %(default)s)")
    parser.add_argument("--tries", type=int, default=1, help="of each compilation (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of growth.json and growth.png")
    parser.add_argument("--write", action="store_true", help="keep both in benchmarks/results and docs instead")
    args = parser.parse_args(argv)

    sides = [side for side in (1024, 2048, 4096, 8192, 16384, 32768) if side * side <= args.largest * 1e6]
    facts = environment(args.device)
    kind = args.device.split(":")[0]
    data = ROOT / f"benchmarks/results/growth-{kind}.json" if args.write else args.out / "growth.json"
    picture = ROOT / f"docs/growth-{kind}.png" if args.write else args.out / "growth.png"
    samplings = sampling(sides, args.device, args.rounds)
    figures = {**facts, "sampling": [asdict(s) for s in samplings]}
    keep(data, figures)
    compilings = compiling(args.layers, args.device, args.tries)
    keep(data, {**figures, "compiling": [asdict(c) for c in compilings]})
    plot(samplings, compilings, f"{facts['device']}, torch {facts['torch']}", picture)
    print(f"wrote {data} and {picture}")


if __name__ == "__main__":
    main()
