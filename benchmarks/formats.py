"""What each preset costs and loses: bits per weight, largest error, and SQNR.

Nothing is timed: the figures are those of the arithmetic, the same on every device.

    bits per weight    an element, and its part of the scale that a file stores for each group, see `Preset.group`; of a
                       row of 4096, where a group is a row; the one scale of a whole matrix counts nothing
    largest error      the largest error that the cast makes of an element, over the maximum of its block: of elements
                       from 0 to the maximum, in blocks of maxima over several binades. Blocks so small beside their
                       matrix that the scale of NVFP4 has lost bits are left out
    SQNR               10 log10(sum w**2 / sum (w - cast(w))**2), of one seeded normal weight of 1024 x 1024 in float32.
                       Scales that are powers of two fit better or worse by where in its binade a block's maximum lies:
                       the mean over four standard deviations from 1 to 2, with the least and the most

    python benchmarks/formats.py                 # the table
    python benchmarks/formats.py --page          # the same, written into docs/formats.md, which a test reads
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import gws_compile
from gws_compile import PRESETS
from gws_compile.config import Config
from gws_compile.numerics.scales import POWERS_OF_TWO
from gws_compile.settings.weight_settings import WeightSettings

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
BEGIN = "<!-- table of presets: python benchmarks/formats.py --page -->"
END = "<!-- end of the table of presets -->"

ROW = 4096
"""Elements of a row, where a group is one."""

SIZE = 1024
"""Rows and columns of the weight whose SQNR is measured."""

BINADES = 3
"""Of maxima; the scale of NVFP4 has all of its bits in them."""

DEVIATIONS = tuple(2.0 ** (quarter / 4) for quarter in range(4))
"""Standard deviations of the weight; scales that are no powers of two do not see them."""

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in PRESETS),
    ("mxfp8", {"scale": "ceil"}),
    ("mxfp4", {"scale": "ceil"}),
    ("mxfp4", {"block": (1, 32)}),
    ("nvfp4", {"block": (1, 16)}),
    ("fp8_block", {"scale": "ceil"}),
    ("int4_group", {"block": (1, 32)}),
)
"""The presets, and some of what a block or scale given beside one makes of it."""


@dataclass(frozen=True)
class Figures:
    """The figures of a preset, or of one with another block or scale.

    Attributes:
        preset: its name.
        element: format of an element.
        block: what shares a scale in training, such as ``"32 x 32"``.
        scale: rule of the block scale.
        noise_bits: bit width b of the noise.
        bits_per_weight: in a file, scales included.
        largest: largest error of an element over its block's maximum.
        sqnr: in dB, for each of `DEVIATIONS`, or for the first alone.
    """

    preset: str
    element: str
    block: str
    scale: str
    noise_bits: float
    bits_per_weight: float
    largest: float
    sqnr: tuple[float, ...]


def bits_per_weight(settings: WeightSettings) -> float:
    """Of a stored element and its part of its group's scale."""
    preset = PRESETS[settings.preset]
    rows, cols = preset.stored_group(settings.block)
    scale = 0.0 if rows is None else preset.scale_bits / (rows * (cols or ROW))
    return preset.element.storage_bits + scale


def largest_error(settings: WeightSettings, maxima: int = 2**8, elements: int = 2**10) -> float:
    """The largest error of an element over its block's maximum, of blocks of all maxima with elements of all sizes."""
    binade = torch.cat([torch.arange(maxima) / maxima + 1, torch.tensor([2 - 2.0**-23])])
    # A row is a block; the largest maximum of all is that of the matrix.
    of_blocks = torch.cat([*(binade * 2.0**e for e in range(BINADES)), torch.tensor([2.0**BINADES])])[:, None]
    w = of_blocks * (torch.arange(elements + 1) / elements)
    cast = gws_compile.quantize(w, settings.fmt, block=(1, None), scale=settings.scale)
    return float(((cast - w).double() / of_blocks).abs().max())


def sqnr(settings: WeightSettings, weight: torch.Tensor) -> float:
    """Signal to quantization noise of a weight, in dB."""
    error = weight.double() - gws_compile.quantize(weight, settings.fmt, settings.block, settings.scale).double()
    return float(10 * torch.log10(weight.double().square().sum() / error.square().sum()))


def measure() -> list[Figures]:
    """The figures of all cases."""
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return [_figures(Config.make(name, **given).weights, weight) for name, given in CASES]


def _figures(settings: WeightSettings, weight: torch.Tensor) -> Figures:
    deviations = DEVIATIONS if settings.scale in POWERS_OF_TWO else DEVIATIONS[:1]
    return Figures(
        settings.preset,
        settings.fmt.name,
        settings.block_text,
        settings.scale or "none",
        settings.bits,
        bits_per_weight(settings),
        largest_error(settings),
        tuple(sqnr(settings, weight * deviation) for deviation in deviations),
    )


HEADERS = ("preset", "elements", "block", "scale", "`b`", "bits per weight", "largest error", "SQNR, dB")


def rows(figures: Sequence[Figures]) -> list[tuple[str, ...]]:
    """The figures as text."""
    return [
        (
            f"`{f.preset}`",
            f"`{f.element}`",
            f.block,
            f"`{f.scale}`",
            f"{f.noise_bits:g}",
            f"{f.bits_per_weight:.4g}",
            f"{100 * f.largest:.3g} %",
            _decibels(f.sqnr),
        )
        for f in figures
    ]


def _decibels(values: Sequence[float]) -> str:
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def table(figures: Sequence[Figures]) -> str:
    """One row for each case, in Markdown."""
    lines = [HEADERS, ("---",) * 4 + ("---:",) * 4, *rows(figures)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page_with(page: str, figures: Sequence[Figures]) -> str:
    """The page with this table in it."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE} has no place for the table, from {BEGIN} to {END}")
    return f"{before}{BEGIN}\n\n{table(figures)}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--page", action="store_true", help="write the table into docs/formats.md")
    args = parser.parse_args(argv)
    figures = measure()
    print(f"torch {torch.__version__}, a normal weight of {SIZE} x {SIZE}, seed 0")
    plain = [[cell.replace("`", "") for cell in row] for row in (HEADERS, *rows(figures))]
    print(tabulate(plain, headers="firstrow", disable_numparse=True, colalign=("left",) * 4 + ("right",) * 4))
    if args.json:
        content = {"torch": torch.__version__, "cases": [asdict(f) for f in figures]}
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    if args.page:
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")


if __name__ == "__main__":
    main()
