"""How large the noise is beside the error of the cast that it stands for, on the weights of a small trained model.

    python examples/noise_size.py --model llama --steps 2000

Trains one of the models of ``compare_models.py`` plainly, and prints for each format and width of the noise, over all
weights: sqrt(sum (w - cast(w))**2 / sum w**2), what the cast changes, and the same of ``cast(w + noise)``.

Needs ``pip install "gws-compile[examples]"``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import compare_models
import torch
from small_models import MODELS
from tabulate import tabulate

import gws_compile

FORMATS = ("fp8_e4m3", "fp6_e3m2", "fp4_e2m1", "nvfp4", "int4", "int3", "int2")
WIDTHS = {"fp4_e2m1": (2, 3, 4, 5)}
"""Widths b of formats that are looked at with others than the default one."""


def settings() -> Iterator[dict[str, Any]]:
    """Arguments of the backends to look at."""
    for fmt in FORMATS:
        for noise in ("rounded_normal", "uniform"):
            for bits in WIDTHS.get(fmt, (None,)):
                yield {"fmt": fmt, "noise": noise, "bits": bits}


def sizes(model: torch.nn.Module, tokens: torch.Tensor, arguments: dict[str, Any]) -> tuple[float, float, float]:
    """Width b, what the cast changes, and what noise and cast change, relative to the weights."""
    torch.compiler.reset()
    backend = gws_compile.backend(**arguments, inner="eager")
    torch.compile(model, backend=backend)(input_ids=tokens, labels=tokens).loss.backward()
    weights = {name: p.detach().double().square().sum() for name, p in model.named_parameters()}
    cast = noisy = total = 0.0
    for one in backend.metrics().values():
        square = float(weights[one.name])
        total += square
        cast += square * 10 ** (-one.sqnr / 10)
        noisy += square * 10 ** (-(one.sqnr if one.sqnr_noise is None else one.sqnr_noise) / 10)
    return backend.config.bits, (cast / total) ** 0.5, (noisy / total) ** 0.5


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The size of the noise beside that of the cast.")
    parser.add_argument("--model", choices=MODELS, default="llama", help="architecture (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (default: %(default)s)")
    args = parser.parse_args(argv)
    plain = gws_compile.backend(rules=[("*", None)])  # leaves every weight alone
    compiled, _, _ = compare_models.train(args.model, plain, 0, steps=args.steps)
    model = next(compiled.children())  # inside of what torch.compile makes
    tokens = torch.randint(0, 256, (2, 32), device=next(model.parameters()).device)
    rows = []
    for arguments in settings():
        bits, cast, noisy = sizes(model, tokens, arguments)
        name = arguments["noise"].replace("_", " ")
        rows.append((arguments["fmt"], name, f"{bits:g}", f"{cast:.3f}", f"{noisy:.3f}", f"{noisy / cast:.1f}"))
    headers = ("format", "noise", "b", "cast / weights", "noise and cast / weights", "ratio")
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
