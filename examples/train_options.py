"""The command line of ``train_gpt.py``: everything that can be wrong is found before anything is compiled.

What does not depend on how many models are trained, and where, is shared with ``train_distributed.py``.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compute_dtype import add_dtype_option, chosen_dtype, describe
from small_models import MODELS, SIZES, Size
from text_data import Text, load_text

import gws_compile


@dataclass(frozen=True)
class Settings:
    """What is trained, and how.

    Attributes:
        model: a key of `MODELS`.
        size: a key of `SIZES`.
        shape: the model's shape; its training figures hold where no option replaces them.
        dtype: what products are computed in.
        computed_in: the same in words.
    """

    model: str
    size: str
    shape: Size
    steps: int
    batch: int
    seq: int
    lr: float
    seed: int
    inner: str
    device: torch.device
    dtype: torch.dtype
    computed_in: str
    out: Path


def parse(argv: Sequence[str] | None) -> tuple[Settings, Text, dict[str, gws_compile.Backend]]:
    """Read the command line; a mistake ends the program with a usage message.

    Returns:
        The settings, the text, and a backend for each format by the format's name.
    """
    cuda = torch.cuda.is_available()
    size, device = ("small", "cuda") if cuda else ("tiny", "cpu")
    parser = argparse.ArgumentParser(description="Train a model plain and with low-precision weights, side by side.")
    add = parser.add_argument
    add(
        "--fmt",
        nargs="+",
        default=["fp8_e4m3"],
        metavar="FORMAT",
        help="formats or presets, a run each (default: fp8_e4m3)",
    )
    add("--learned", choices=("block", "weight"), help="train once more with learned bit widths, per block or weight")
    add("--average", type=float, default=5.0, help="average that learned widths end with (default: %(default)s)")
    add("--backward", default="save", help="save, or recompute the weights in backward (default: %(default)s)")
    add_training_options(parser, size)
    add_dtype_option(parser)
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where picture and figures go (default: out)")
    add("--device", default=device, help="cpu, cuda, cuda:1, ... (default: %(default)s here)")
    args = parser.parse_args(argv)
    try:
        target = _device(args.device)
        dtype = chosen_dtype(args.dtype, target)
        settings = Settings(
            args.model,
            args.size,
            SIZES[args.size],
            **training_figures(args),
            seed=args.seed,
            inner=args.inner,
            device=target,
            dtype=dtype,
            computed_in=describe(dtype, asked=args.dtype != "auto"),
            out=args.out,
        )
        backends = [
            gws_compile.backend(
                fmt, bits=args.bits, noise=args.noise, seed=args.seed, backward=args.backward, inner=args.inner
            )
            for fmt in args.fmt
        ]
        named = {backend.config.weights.name: backend for backend in backends}
        if args.learned is not None:
            named[f"learned per {args.learned}"] = gws_compile.backend(
                bits=gws_compile.LearnedBits(average=args.average, granularity=args.learned),
                noise=args.noise,
                seed=args.seed,
                backward=args.backward,
                inner=args.inner,
            )
        text = load_text(args.data, batch=settings.batch, seq=settings.seq)
        args.out.mkdir(parents=True, exist_ok=True)
        if not os.access(args.out, os.W_OK):
            raise ValueError(f"cannot write to the folder {args.out}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return settings, text, named


def add_training_options(parser: argparse.ArgumentParser, size: str) -> None:
    """Options of the model, its noise and its training; ``size`` is the default size of the model."""
    add = parser.add_argument
    add("--bits", type=float, help="bit width of the noise (default: that of each format)")
    add("--noise", default="rounded_normal", help="rounded_normal, uniform or none (default: %(default)s)")
    add("--inner", default="inductor", help="compiler: inductor, aot_eager or eager (default: %(default)s)")
    add("--model", choices=MODELS, default="gpt2", help="architecture (default: %(default)s)")
    add("--size", choices=SIZES, default=size, help="of the model; decides the next four (default: %(default)s here)")
    add("--steps", type=int, help="optimizer steps")
    add("--batch", type=int, help="sequences per step")
    add("--seq", type=int, help="bytes per sequence")
    add("--lr", type=float, help="peak learning rate")
    add("--seed", type=int, default=0, help="of weights, data order and noise (default: 0)")
    add("--data", type=Path, metavar="PATH", help="text file or folder (default: Python's standard library)")


def training_figures(args: argparse.Namespace) -> dict[str, Any]:
    """``steps``, ``batch``, ``seq`` and ``lr``: as given, or else as the model's size has them.

    Raises:
        ValueError: one of them is out of range.
    """
    given = {name: getattr(args, name) for name in ("steps", "batch", "seq", "lr")}
    figures = {name: getattr(SIZES[args.size], name) if value is None else value for name, value in given.items()}
    for name, least in (("steps", 1), ("batch", 1), ("seq", 2)):
        if figures[name] < least:
            raise ValueError(f"--{name} must be at least {least}, got {figures[name]}")
    if not 0 < figures["lr"] < math.inf:
        raise ValueError(f"--lr must be a positive number, got {figures['lr']}")
    return figures


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device
