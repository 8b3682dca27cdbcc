"""The dtype in which a device multiplies matrices fast.

A processor without bfloat16 instructions computes a bfloat16 product several times slower than a float32 one (4 to 11
times with AVX2 alone), so that autocast, which is there to save time, makes a step take seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

NAMES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, or float32 where the device has no instructions for bfloat16: a GPU is asked, a CPU measured."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # A product of this size takes a third of float32's time where the instructions are there, 1.7 times where AVX512
    # stands in for them, and more with AVX2. The fastest of some counts: what a busy machine adds is no measure.
    x, weight = torch.randn(1024, 512), torch.randn(2048, 512)
    seconds = {}
    for dtype in NAMES.values():
        operands = x.to(dtype), weight.to(dtype)
        seconds[dtype] = min(_seconds(lambda operands=operands: linear(*operands)) for _ in range(6))
    return min(NAMES.values(), key=seconds.__getitem__)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def computing_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Inside a ``with`` block products are computed in the dtype: bfloat16 by autocast, float32 as they are."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """``--dtype``, to be read by `chosen_dtype`."""
    parser.add_argument(
        "--dtype",
        choices=("auto", *NAMES),
        default="auto",
        help="computed in; bfloat16 by autocast; auto: bfloat16 where the device computes it fast (default: auto)",
    )


def chosen_dtype(name: str, device: torch.device) -> torch.dtype:
    """What ``--dtype`` asks for on this device."""
    return fast_dtype(device) if name == "auto" else NAMES[name]


def describe(dtype: torch.dtype, *, asked: bool) -> str:
    """The dtype for a line of output; with the reason, where a user who did not ask for it may wonder."""
    if dtype is torch.bfloat16:
        return "bfloat16 autocast"
    return "float32" if asked else "float32 (this device emulates bfloat16: that would be slower)"
