"""Time and memory of an export, beside transformers' ``save_pretrained`` of the same model, which writes it dense.

    python benchmarks/export.py [--layers 18] [--formats mxfp8 mxfp4 nvfp4 int4_group] [--rounds 3] [--json FILE]

A Llama of random weights in float32; each round saves and exports in turn, and what is reported are medians, ratios in
one round, and by how much the process's peak of memory rose above what it had before, each export in a process of its
own. Writing is measured with the file synced to disk, and without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gws_compile


def model_of(layers: int) -> Any:
    """About 55 MB a layer, and 131 MB of tables."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def prepared(model: Any, fmt: str) -> gws_compile.Backend:
    """A backend that knows the model's weights."""
    backend = gws_compile.backend(fmt, inner="eager")
    torch._dynamo.reset()
    backend.prepare(model, torch.zeros(1, 8, dtype=torch.int64))
    return backend


def seconds(work: Callable[[Path], object], *, sync: bool) -> float:
    """Of writing a folder."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        start = time.perf_counter()
        work(Path(folder) / "out")
        if sync:
            os.sync()
        return time.perf_counter() - start


def peak_rise(layers: int, fmt: str) -> int:
    """Bytes by which one export raises the process's peak of memory."""
    command = [sys.executable, __file__, "--layers", str(layers), "--formats", fmt, "--peak"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(layers: int, fmt: str) -> None:
    """What `peak_rise` reads."""
    model = model_of(layers)
    backend = prepared(model, fmt)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    folder = Path(tempfile.mkdtemp(dir=Path.cwd()))
    try:
        backend.export(model, folder / "out", shard_bytes=256 * 2**20)
    finally:
        shutil.rmtree(folder)
    print(status("VmHWM") - before)


def status(key: str) -> int:
    """A figure of this process, in bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--formats", nargs="+", default=["mxfp8", "mxfp4", "nvfp4", "fp8_channel", "int4_group"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.peak:
        print_peak(parsed.layers, parsed.formats[0])
        return
    model = model_of(parsed.layers)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{size / 1e9:.2f} GB of float32 weights, {torch.get_num_threads()} threads")
    backends = {fmt: prepared(model, fmt) for fmt in parsed.formats}
    works = {"save_pretrained": model.save_pretrained}
    works |= {fmt: (lambda out, b=b: b.export(model, out)) for fmt, b in backends.items()}
    results: dict[str, Any] = {}
    for sync in (False, True):
        times = {name: [] for name in works}
        for _ in range(parsed.rounds):
            for name, work in works.items():
                times[name].append(seconds(work, sync=sync))
        for name in works:
            ratios = [a / b for a, b in zip(times[name], times["save_pretrained"], strict=True)]
            row = {"seconds": statistics.median(times[name]), "over_save_pretrained": statistics.median(ratios)}
            results.setdefault(name, {})["synced" if sync else "written"] = row
            print(
                f"{'synced ' if sync else 'written'} {name:16} {row['seconds']:6.2f} s  "
                f"{row['over_save_pretrained']:.2f} x"
            )
    for fmt in parsed.formats:
        results[fmt]["peak_rise_bytes"] = peak_rise(parsed.layers, fmt)
        print(f"{fmt}: peak of memory {results[fmt]['peak_rise_bytes'] / 2**20:.0f} MiB higher, files of 256 MiB")
    if parsed.json:
        content = {"bytes": size, "torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}
        Path(parsed.json).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
