"""``gws run``: a script, unmodified, with this backend for its ``torch.compile`` calls."""

from __future__ import annotations

import argparse
import atexit
import random
from pathlib import Path
from typing import Any

import numpy
import torch

from ..compiler.backend import Backend
from ..compiler.cast_afterwards import CastAfterwards
from ..settings.arguments import SETTINGS
from ..torch_internals.modules import objects_alive
from .main_program import NotFoundError, run_module, run_script
from .options import UsageError, add_settings, check_folder, export_settings
from .run_session import RunOptions, RunSession

_DESCRIPTION = """\
Run a training script as `python train.py` does, with the gws backend for every torch.compile(...), Module.compile(...)
and @torch.compile that asks for the default compiler; their other arguments are kept. A call that names another backend
is left alone, with a warning. At the end a report on stderr says what was rewritten.
"""

_EPILOG = """\
examples:
  gws run train.py --lr 3e-4
  gws run --fmt fp6_e3m2 --include '*.mlp.*' -m package.train --lr 3e-4
  gws run --auto --report report.json train.py
  torchrun --nproc-per-node 8 -m gws_compile run --config gws.toml train.py

torch is imported before the script runs: variables that torch reads at its import (OMP_NUM_THREADS, TORCH_LOGS) are to
be set outside of the script.
"""


def add_to(commands: Any) -> None:
    """Add the command to the parsers of ``gws``."""
    parser = commands.add_parser(
        "run",
        help="run an unmodified training script with pseudo-quantization training",
        usage="gws run [options] (SCRIPT | -m MODULE) [arguments of the script]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is the name of a module, as for python -m")
    parser.add_argument(
        "--auto",
        action="store_true",
        help="compile what the script does not: every outermost module, on its first call with gradients enabled",
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="write the report there: JSON if it ends in .json, the page of gws explain if in .html, else text",
    )
    parser.add_argument(
        "--state",
        metavar="FILE",
        help="go on with the noise where the last run with this file has ended, and leave it there at the end",
    )
    parser.add_argument(
        "--random-seed",
        metavar="N",
        type=int,
        help="seed the generators of torch, numpy and random before the script begins (--seed is that of the noise)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--cast-afterwards",
        action="store_true",
        help="train as the script does, and cast weights in calls with gradients disabled alone: what casting costs",
    )
    form.add_argument(
        "--plain", action="store_true", help="leave everything as the script has it: the run to compare others with"
    )
    parser.add_argument("script", metavar="SCRIPT", help="the program to run")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="its own arguments")
    add_settings(parser)
    parser.set_defaults(function=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the script.

    Returns:
        0; whatever else the script ends with comes out of it as it is.

    Raises:
        UsageError: a bad setting, a state that is none or another's, or no such script.
    """
    _check_options(parsed)
    export_settings(parsed)
    report, state = _file_of("--report", parsed.report), _file_of("--state", parsed.state)
    session = None
    if not parsed.plain:
        try:
            session = RunSession(RunOptions(parsed.script, parsed.auto, report, state, parsed.cast_afterwards))
        except ValueError as error:  # of the state, or settings that are good one by one, but not together
            raise UsageError(str(error)) from None
        session.start()
        atexit.register(session.finish)  # behind the program's threads and its own exit handlers
    try:
        if parsed.random_seed is not None:
            _seed(parsed.random_seed)
        try:
            (run_module if parsed.module else run_script)(parsed.script, parsed.arguments)
        finally:
            if parsed.plain or parsed.cast_afterwards:
                _check_plain(parsed)
    except NotFoundError as error:
        if session is not None:
            atexit.unregister(session.finish)
        raise UsageError(str(error)) from None
    except BaseException as error:
        if session is not None:
            session.ended_by(error)
        raise
    return 0


def _check_options(parsed: argparse.Namespace) -> None:
    seed = parsed.random_seed
    if seed is not None and not 0 <= seed < 2**32:
        raise UsageError(f"--random-seed {seed}: accepted are 0 to 2**32 - 1, what numpy takes")
    if parsed.plain:
        others = ["auto", "report", "state", "config", *(setting.name for setting in SETTINGS)]
        if needless := [name for name in others if getattr(parsed, name) not in (None, False)]:
            raise UsageError(f"--plain leaves the script alone: --{needless[0]} has no effect beside it")


def _check_plain(parsed: argparse.Namespace) -> None:
    """Hold a script whose training is to stay plain to it: it may ask for a backend of this package by itself.

    Raises:
        UsageError: it does.
    """
    for one in objects_alive(Backend):
        if one.graphs and not isinstance(one, CastAfterwards):
            option = "--plain" if parsed.plain else "--cast-afterwards"
            raise UsageError(
                f"{option}: the script compiles with a gws backend of its own ({one.config.weights.name}), so this was "
                "no plain training: take that out of it"
            )


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _file_of(option: str, path: str | None) -> str | None:
    """The whole path of a file that is to be written, since the script may change the folder."""
    if path is None:
        return None
    check_folder(path, option)
    return str(Path(path).absolute())
