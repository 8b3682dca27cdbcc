"""Times of several functions, read in turns: a machine that slows down or speeds up does so for all of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch


def device_name(device: str) -> str:
    """The name of a GPU; of a CPU its architecture, threads and vector instructions."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads, {capability})"


def environment(device: str) -> dict[str, str]:
    """What a figure depends on besides the code: device and versions."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": device_name(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
    }


def keep(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write figures to a file, if one is asked for; in place of the former ones, never half of them.

    Programs call it after each figure: one that is ended before its time leaves what it had.
    """
    if path is None:
        return
    written = path.with_name(f"{path.name}.{os.getpid()}")
    written.write_text(json.dumps(figures, indent=1) + "\n")
    written.replace(path)


def quiet_profiler() -> None:
    """Before torch's profiler is used first: no word of it on starting and stopping."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class Rotation:
    """Copies of a tensor that together do not fit in a GPU's cache: each call gets one that has left it.

    A CPU's rounds go through one tensor; take one larger than its cache.
    """

    def __init__(self, make: Callable[[], torch.Tensor], device: str) -> None:
        first = make()
        copies = 1
        if device.startswith("cuda"):
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            copies = max(2, -(-3 * cache // first.nbytes))
        self._tensors = [first, *(make() for _ in range(copies - 1))]
        self._next = count()

    def __call__(self) -> torch.Tensor:
        """The next copy."""
        return self._tensors[next(self._next) % len(self._tensors)]


def interleaved(
    functions: Mapping[str, Callable[[], object]], device: str, *, rounds: int, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds a call, for each function and round.

    Args:
        functions: by name; each is called once before the first round.
        device: ``"cuda"`` times by events on the stream, anything else by the clock.
        rounds: in each, every function has its turn; the first one is another in each round.
        calls: of a function in one turn; the mean of these is one figure.
    """
    names = list(functions)
    for name in names:
        functions[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    turn = _cuda_turn if device.startswith("cuda") else _cpu_turn
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(turn(functions[name], calls))
    return times


def _cpu_turn(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _cuda_turn(function: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median over the rounds of one time over the other of the same round."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))
