"""Run all benchmarks here and keep their figures: benchmarks/results/<device>.json, and a table in Markdown.

On a GPU also the tests marked ``gpu``. What fails, or takes longer than it may, is left out, and said; the rest goes
on.

    python benchmarks/everything.py                # all that docs/performance.md shows of a device
    python benchmarks/everything.py --only step-1b kernels

A GPU may take 25 minutes: kernels, a step of 134 M and of 1 B parameters with 16,384 tokens, their memory, growth. Two
CPU cores take about an hour. Needs ``pip install "gws-compile[examples,bench]"`` and pytest.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from timing import device_name, environment

HERE = Path(__file__).parent
RESULTS = HERE / "results"

# Program and arguments; the minutes it may take.
ON_GPU: dict[str, tuple[tuple[str, ...], int]] = {
    "tests": (("-m", "pytest", "-q", "-m", "gpu", "../tests/codegen/test_gpu.py"), 5),
    "kernels": (("kernels.py", "--rounds", "10"), 4),
    "step-134m": (("step.py", "--size", "134m", "--rounds", "10", "--where"), 12),
    "step-1b": (("step.py", "--size", "1b", "--rounds", "10", "--variants", "plain", "save", "recompute"), 10),
    "memory-134m": (("memory.py", "--size", "134m"), 5),
    "memory-1b": (("memory.py", "--size", "1b"), 6),
    "growth": (("growth.py", "--layers", "1", "4", "8"), 6),
}
ON_CPU: dict[str, tuple[tuple[str, ...], int]] = {
    "kernels": (("kernels.py",), 10),
    "step-small": (("step.py", "--size", "small", "--rounds", "10", "--where", "--precision", "autocast"), 60),
    "memory-small": (("memory.py", "--size", "small"), 30),
    "growth": (("growth.py",), 30),
}


def run(name: str, command: tuple[str, ...], minutes: int) -> dict[str, Any]:
    """Run one program, which prints as it goes; its figures, or why there are none."""
    print(f"\n=== {name}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "growth.json" if name == "growth" else "out.json")
        rest = {"tests": (), "growth": ("--out", folder)}.get(name, ("--json", str(out)))
        try:
            done = subprocess.run([sys.executable, *command, *rest], cwd=HERE, timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            return {"failed": f"took longer than {minutes} minutes"}
        found: dict[str, Any] = {"command": " ".join(command), "minutes": (time.perf_counter() - start) / 60}
        if done.returncode:
            return {**found, "failed": f"exit code {done.returncode}"}
        return {**found, **({"figures": json.loads(out.read_text())} if out.exists() else {})}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The steps and the float32 kernels, in Markdown."""
    rows: list[tuple[str, ...]] = []
    for name, result in results.items():
        for t in result.get("figures", {}).get("steps", []):
            overhead = f"{100 * (t['over_plain'] - 1):+.2f} %"
            rows.append((name, f"{t['precision']}, {t['variant']}", f"{t['seconds'] * 1e3:,.1f}", overhead))
        for t in result.get("figures", {}).get("timings", []):
            case = t["case"]
            what = f"{case['dtype']} {'x'.join(map(str, case['shape']))}, {t['variant']}, {t['output']}"
            rows.append((name, what, f"{t['seconds'] * 1e3:.3f}", f"x {t['over_cast']:.2f}"))
        if "failed" in result:
            rows.append((name, "", "", result["failed"]))
    headers = ("benchmark", "what", "ms", "over plain")
    return tabulate(rows, headers=headers, tablefmt="github", colalign=("left", "left", "right", "right"))


def main(argv: Sequence[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    programs = ON_GPU if cuda else ON_CPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=programs, default=list(programs), help="(default: all)")
    parser.add_argument("--out", type=Path, help="(default: benchmarks/results/<device>.json)")
    args = parser.parse_args(argv)
    device = "cuda" if cuda else "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") if cuda else "cpu"
    out = args.out or RESULTS / f"{name}.json"
    results: dict[str, dict[str, Any]] = {}
    for program in args.only:
        results[program] = run(program, *programs[program])
        # Written each time: a machine that is lent may be taken back.
        out.write_text(json.dumps({**environment(device), "results": results}, indent=1) + "\n")
    print(f"\n{table(results)}\n\nwrote {out}")


if __name__ == "__main__":
    main()
