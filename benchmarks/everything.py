"""Run all benchmarks here and keep their figures: benchmarks/results/<device>.json, and a table in Markdown.

On a GPU also the tests marked ``gpu``. What fails, or takes longer than it may, is left out, and said, with the figures
that it had by then; the rest goes on. The file keeps what other calls on the same device and torch have written to it.

    python benchmarks/everything.py                          # all that docs/performance.md shows of a device
    python benchmarks/everything.py --part 1 --minutes 9.5   # a GPU's programs, in three parts of ten minutes
    python benchmarks/everything.py --rehearse               # a GPU's programs, small and on the CPU
    python benchmarks/everything.py --only step-1b kernels

A GPU may take half an hour: tests, kernels, a step of 1 B and of 134 M parameters with 16,384 tokens, where its time
goes, their memory, growth. Two CPU cores take about an hour. Needs ``pip install "gws-compile[examples,bench]"`` and
pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from timing import device_name, environment, keep

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# Where a rehearsal departs from the command of a GPU: the sizes that a CPU can do.
SMALLER = {"--size": ("tiny",), "--rounds": ("2",), "--shape": ("64x96",), "--layers": ("1",), "--largest": ("5",)}


@dataclass(frozen=True)
class Program:
    """One program, as it is called.

    Attributes:
        command: file and arguments.
        minutes: it may take.
        part: of the three into which a GPU's programs are divided; 0 on a CPU.
    """

    command: tuple[str, ...]
    minutes: float
    part: int = 0


# The dearest figures first: a machine that is lent may be taken back.
OWN = ("--variants", "plain", "save", "recompute")
ON_GPU: dict[str, Program] = {
    "step-1b": Program(("step.py", "--size", "1b", "--rounds", "10", *OWN, "--no-compile-time", "--profile"), 6, 1),
    "kernels": Program(("kernels.py", "--shape", "4096x4096", "4096x14336", "2304x768", "--rounds", "10"), 3.5, 1),
    "tests": Program(("-m", "pytest", "-q", "-m", "gpu", "../tests/codegen/test_gpu.py"), 4, 2),
    "memory-1b": Program(("memory.py", "--size", "1b", "--precision", "autocast"), 5.5, 2),
    "step-134m": Program(("step.py", "--size", "134m", "--rounds", "10", "--no-compile-time", "--profile"), 5, 3),
    "memory-134m": Program(("memory.py", "--size", "134m", "--precision", "bf16"), 3, 3),
    "growth": Program(("growth.py", "--largest", "1074", "--layers", "1", "4", "8"), 6, 3),
}
ON_CPU: dict[str, Program] = {
    "kernels": Program(("kernels.py",), 10),
    "step-small": Program(
        ("step.py", "--size", "small", "--rounds", "10", "--where", "--precision", "autocast", "--profile"), 60
    ),
    "memory-small": Program(("memory.py", "--size", "small"), 30),
    "growth": Program(("growth.py",), 30),
}


def rehearsed(program: Program) -> Program:
    """The same on a CPU, with the sizes of `SMALLER`."""
    command: list[str] = []
    values: tuple[str, ...] | None = None
    for word in program.command:
        if values is not None and not word.startswith("--"):
            continue  # replaced
        values = SMALLER.get(word)
        command += [word, *(values or ())]
    own = command[0].endswith(".py")
    return replace(program, command=(*command, *(("--device", "cpu") if own else ())))


def run(name: str, program: Program, seconds: float) -> dict[str, Any]:
    """Run one program, which prints as it goes; its figures, those that it had when it was ended, and why it was."""
    command = program.command
    print(f"\n=== {name}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "growth.json" if name == "growth" else "out.json")
        rest = {"tests": (), "growth": ("--out", folder)}.get(name, ("--json", str(out)))
        failed = None
        limit = min(60 * program.minutes, seconds)
        # A group of its own: what it has started ends with it.
        process = subprocess.Popen([sys.executable, *command, *rest], cwd=HERE, start_new_session=True)
        try:
            if code := process.wait(limit):
                failed = f"exit code {code}"
        except subprocess.TimeoutExpired:
            failed = f"ended after {limit / 60:.1f} minutes"
            os.killpg(process.pid, 9)
            process.wait()
        found: dict[str, Any] = {"command": " ".join(command), "minutes": (time.perf_counter() - start) / 60}
        if out.exists():
            found["figures"] = json.loads(out.read_text())
        return {**found, "failed": failed} if failed else found


def table(results: dict[str, dict[str, Any]]) -> str:
    """The steps and the float32 kernels, in Markdown."""
    rows: list[tuple[str, ...]] = []
    for name, result in results.items():
        figures = result.get("figures", {})
        for t in figures.get("steps", []):
            overhead = f"{100 * (t['over_plain'] - 1):+.2f} %"
            what = f"{t['precision']}, {t['variant']}, peak {t['peak'] / 2**20:,.0f} MiB"
            rows.append((name, what, f"{t['seconds'] * 1e3:,.1f}", overhead))
        for p in figures.get("profiles", []):
            spent = sum(seconds for kernel, (seconds, _) in p["kernels"].items() if "sample_weight" in kernel)
            total = sum(seconds for seconds, _ in p["kernels"].values())
            if not spent and figures["device"].startswith("CPU"):
                continue  # the profiler sees operators there, and a compiled graph as one of them
            what = f"{p['precision']}, {p['variant']}: in kernels that sample"
            rows.append((name, what, f"{spent * 1e3:,.2f}", f"{100 * spent / total:.2f} % of the step's"))
        for t in figures.get("timings", []):
            case = t["case"]
            what = f"{case['dtype']} {'x'.join(map(str, case['shape']))}, {t['variant']}, {t['output']}"
            rows.append((name, what, f"{t['seconds'] * 1e3:.3f}", f"x {t['over_cast']:.2f}"))
        for m in figures.get("measurements", []):
            plain = next(
                p for p in figures["measurements"] if (p["variant"], p["precision"]) == ("plain", m["precision"])
            )
            extra = f"{(m['peak'] - plain['peak']) / m['sampled']:+.3f} bytes a parameter" if m["sampled"] else ""
            rows.append((name, f"{m['precision']}, {m['variant']}, peak {m['peak'] / 2**20:,.0f} MiB", "", extra))
        if "failed" in result:
            rows.append((name, "", "", result["failed"]))
    headers = ("benchmark", "what", "ms", "over plain")
    return tabulate(rows, headers=headers, tablefmt="github", colalign=("left", "left", "right", "right"))


def former(out: Path, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What earlier calls have written to the file; nothing where device or versions were others."""
    if not out.exists():
        return {}
    kept = json.loads(out.read_text())
    if any(kept.get(name) != fact for name, fact in facts.items()):
        print(f"{out} has figures of {kept.get('device')}, torch {kept.get('torch')}: they are replaced")
        return {}
    results: dict[str, dict[str, Any]] = kept["results"]
    return results


def main(argv: Sequence[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="a GPU's programs, small and on the CPU")
    parser.add_argument("--part", type=int, choices=(1, 2, 3), help="of a GPU's programs")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"of {', '.join(ON_GPU)}; on a CPU {', '.join(ON_CPU)}"
    )
    parser.add_argument("--minutes", type=float, default=120, help="for all together (default: %(default)g)")
    parser.add_argument("--out", type=Path, help="(default: benchmarks/results/<device>.json; of a rehearsal, none)")
    args = parser.parse_args(argv)
    end = time.perf_counter() + 60 * args.minutes
    programs = ON_GPU if cuda or args.rehearse else ON_CPU
    device = "cuda" if cuda and not args.rehearse else "cpu"
    if args.part is not None and programs is ON_CPU:
        parser.error("--part divides a GPU's programs: there is none here; --rehearse runs them on the CPU")
    wanted = args.only or [name for name, program in programs.items() if args.part in (None, program.part)]
    if unknown := [name for name in wanted if name not in programs]:
        parser.error(f"--only takes {', '.join(programs)} here, got {', '.join(unknown)}")

    facts = environment(device)
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") if device == "cuda" else "cpu"
    out = args.out or (None if args.rehearse else RESULTS / f"{name}.json")
    kept = former(out, facts) if out else {}
    results: dict[str, dict[str, Any]] = {}
    if args.rehearse:
        os.environ["GPU_TESTS_DEVICE"] = "cpu"
    for program in wanted:
        left = end - time.perf_counter()
        if left < 10:
            results[program] = {"failed": f"no time left of {args.minutes:g} minutes"}
        else:
            results[program] = run(program, rehearsed(programs[program]) if args.rehearse else programs[program], left)
        # Written each time: a machine that is lent may be taken back.
        keep(out, {**facts, "results": {**kept, **results}})
    print(f"\n{facts['device']}, torch {facts['torch']}, triton {facts['triton']}\n\n{table(results)}")
    if out:
        print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
