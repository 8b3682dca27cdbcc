"""``gws advise``: what a format will cost, by the scaling law of floating-point quantization training."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from ..advice.advise import advise
from ..advice.law import ScalingLaw
from ..advice.quantities import check_block, parse_quantity
from ..advice.runs import read_runs
from .options import UsageError, check_folder

_DESCRIPTION = """\
Say what training in a float format costs, by the scaling law of floating-point quantization training (arXiv
2501.02423): the loss, what of it the format adds, from how many tokens on more data would raise it, and the best
precision. Nothing is trained or compiled. What the law was fitted to is printed with every answer.
"""

_EPILOG = """\
examples:
  gws advise --params 1e9 --tokens 1e11                    every named format
  gws advise --params 1.3B --tokens 15T --fmt e4m3,e5m2 --block 32 --plot advice.png
  gws advise --compute 1e24                                the best bits, parameters and tokens of a budget
  gws advise --params 350M --tokens 10B --bits 6           every split of six bits
  gws advise --params 350M --tokens 10B --fit runs.json    a law fitted to runs of one's own

runs.json is a list of objects, or an object that has it under "runs"; each has params, tokens and loss, fmt (null for
no quantization) and block (128 where it is missing).
"""


def add_to(commands: Any) -> None:
    """Add the command to the parsers of ``gws``."""
    parser = commands.add_parser(
        "advise",
        help="say what a format will cost, by a scaling law",
        usage="gws advise [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--params", metavar="N", help="weights of the layers' matrices, without embeddings: 1e9, 1.3B")
    parser.add_argument("--tokens", metavar="D", help="tokens of training: 1e11, 15T")
    parser.add_argument(
        "--fmt",
        dest="advised_formats",
        metavar="FMT",
        action="append",
        help="a float format, such as e4m3 or fp6_e3m2; parted by commas, or given several times; the named ones by "
        "default",
    )
    parser.add_argument(
        "--block",
        dest="advised_block",
        metavar="B",
        help="elements that share a scale, along one dimension, or channel (128)",
    )
    parser.add_argument(
        "--compute",
        metavar="C",
        help="budget, C = 6/16 N P D: operations, those of P bits counted as P/16 of a 16-bit one's",
    )
    parser.add_argument("--bits", dest="advised_bits", metavar="P", type=int, help="every split of so many bits")
    parser.add_argument(
        "--plot", metavar="FILE", help="also draw the loss over tokens, or over bits with --compute alone"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the answer as JSON")
    parser.add_argument("--fit", metavar="FILE", help="fit the law to the runs of a JSON file first")
    parser.set_defaults(function=run)


def run(parsed: argparse.Namespace) -> int:
    """Advise.

    Returns:
        0.

    Raises:
        UsageError: a bad value, too much or too little given, runs that no law can be fitted to, a file that cannot be
            read or written, or a package that is missing.
    """
    for file in (parsed.plot, parsed.json):
        check_folder(file)
    try:
        law = _fitted(parsed.fit)
        if law is not None:
            sys.stdout.write(f"{law.fitted}\n")
        counts = {
            name: None if (text := getattr(parsed, name)) is None else parse_quantity(f"--{name}", text)
            for name in ("params", "tokens", "compute")
        }
        if law is None or parsed.advised_bits is not None or any(value is not None for value in counts.values()):
            _answer(parsed, counts, law)
        elif parsed.advised_formats or parsed.advised_block or parsed.plot or parsed.json:
            raise UsageError(
                "--fit alone prints the fit: --fmt, --block, --plot and --json need --params, --tokens or --compute"
            )
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from None
    return 0


def _answer(parsed: argparse.Namespace, counts: dict[str, float | None], law: ScalingLaw | None) -> None:
    formats = [one for text in parsed.advised_formats or () for one in text.split(",")] or None
    block = parsed.advised_block or "128"
    answer = advise(
        counts["params"],
        counts["tokens"],
        formats,
        block=check_block(int(block) if block.isdecimal() else block),
        compute=counts["compute"],
        bits=parsed.advised_bits,
        law=law,
    )
    if law is not None:
        sys.stdout.write("\n")
    sys.stdout.write(f"{answer}\n")
    if parsed.json is not None:
        Path(parsed.json).write_text(json.dumps(answer.to_dict(), indent=2) + "\n", encoding="utf-8")
    if parsed.plot is not None:
        answer.plot(parsed.plot)


def _fitted(file: str | None) -> ScalingLaw | None:
    """The law fitted to a file's runs; warnings of runs that are left out go to standard error as they are."""
    if file is None:
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        law = ScalingLaw.fit(read_runs(file))
    for warning in caught:
        sys.stderr.write(f"gws advise: {file}: {warning.message}\n")
    return law
