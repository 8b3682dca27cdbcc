"""``gws compare``: the same training from the same seeds under several settings."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..comparison.compared_settings import DEFAULT_METHODS, METHODS, ComparedSetting, ComparisonError
from ..comparison.comparing import (
    DEFAULT_FOLDER,
    DEFAULT_FORMATS,
    DEFAULT_SEEDS,
    compare,
    listed,
    make_runs,
    seeds_of,
    write,
)
from ..comparison.run_folder import RunFolder
from ..comparison.summary import Comparison, summarize
from .compared_script import ComparedScript, NoLossError, check_script_settings, warn_of_equal_seeds
from .compared_settings_file import own_from_file
from .model_factory import BadFactoryError, find_function
from .options import UsageError

_DESCRIPTION = """\
Train the same model from the same seeds under several settings: plain, cast afterwards, straight-through, with noise,
and others; and write a table of means with 95 % intervals, paired by seed, plots, and JSON. A comparison that was
stopped goes on where it was, and several processes may work on one.
"""

_EPILOG = """\
What is trained is MODULE:FUNCTION, package.module:function or path/to/file.py:function, which is called as
function(backend, seed, key=value, ...) and returns (model, evaluate); gws_compile.compare says more.

Or it is a script, unmodified, which is run once for each setting and seed, as gws run does. It has to compile its model
(or --auto does it), to evaluate with gradients disabled, to print the loss of that, and to draw its seed from the
generators of torch, numpy and random, or from its arguments, in which {seed} stands for it. Its weights cannot be seen
from outside: there is no loss with noise, and no cast to further formats.

examples:
  gws compare --fmts fp8_e4m3,fp4_e2m1,int3 examples/compare_models.py:llama steps=300
  gws compare --methods rounded-normal --settings own.toml --seeds 5 train.py:train lr=0.001
  gws compare --fmts fp4_e2m1,int3 --auto train.py --lr 3e-4 --seed {seed}
"""


def add_to(commands: Any) -> None:
    """Add the command to the parsers of ``gws``."""
    parser = commands.add_parser(
        "compare",
        help="train one model under several settings, and compare what comes of it",
        usage="gws compare [options] (MODULE:FUNCTION [key=value ...] | SCRIPT [arguments] | -m MODULE [arguments])",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--fmts", metavar="NAMES", default=",".join(DEFAULT_FORMATS), help="formats, by commas (%(default)s)")
    add(
        "--methods",
        metavar="NAMES",
        default=",".join(DEFAULT_METHODS),
        help=f"of {', '.join(METHODS)}, by commas (%(default)s)",
    )
    add("--recipes", metavar="NAMES", default="", help="recipes to train with too, by commas")
    add(
        "--settings",
        metavar="FILE.toml",
        help="settings of your own: a table for each, with the arguments of backend()",
    )
    add("--presets", metavar="NAMES", help="formats that the weights of every run are cast to at the end (--fmts)")
    add("--seeds", metavar="N", default=str(DEFAULT_SEEDS), help="how many, or which, by commas (%(default)s)")
    add("--include", metavar="GLOBS", help="only weights that match, in all settings")
    add("--exclude", metavar="GLOBS", help="weights that are left alone in all settings")
    add("--inner", metavar="COMPILER", help="inductor, aot_eager or eager, in all settings")
    add("--out", metavar="DIR", default=DEFAULT_FOLDER, help="folder of the runs and results (%(default)s)")
    add("--no-plots", action="store_true", help="draw nothing")
    script = parser.add_argument_group("of a script")
    script.add_argument("-m", "--module", action="store_true", help="SCRIPT is the name of a module, as for python -m")
    script.add_argument("--auto", action="store_true", help="compile what the script does not, as gws run --auto")
    script.add_argument(
        "--loss",
        metavar="REGEX",
        help="how it prints the loss: a regular expression with one group, of which the last match counts; by default "
        "the last held-out loss (eval_loss, val loss, test loss, ...), else the last loss",
    )
    add("what", metavar="MODULE:FUNCTION | SCRIPT", help="what is trained")
    add("arguments", metavar="...", nargs=argparse.REMAINDER, help="its arguments")
    parser.set_defaults(function=run)


def run(parsed: argparse.Namespace) -> int:
    """Compare.

    Returns:
        0; 1 where a run failed.

    Raises:
        UsageError: a bad setting, an unknown function, or a folder with runs of another comparison.
    """
    try:
        comparison = _of_function(parsed) if _is_function(parsed) else _of_script(parsed)
    except (ComparisonError, BadFactoryError, NoLossError) as error:  # what a training function raises comes out
        raise UsageError(str(error)) from None
    sys.stdout.write(f"{comparison}\n\nThe runs, comparison.json and comparison.md are in {parsed.out}\n")
    if not parsed.no_plots:
        _plot(comparison, Path(parsed.out))
    return 1 if any(row.failed for row in comparison.rows) else 0


def _is_function(parsed: argparse.Namespace) -> bool:
    is_function = not parsed.module and ":" in parsed.what
    given = [name for name in ("auto", "loss") if getattr(parsed, name)]
    if is_function and given:
        raise UsageError(f"--{given[0]} is of a script and has no effect on the function {parsed.what}")
    if not is_function and parsed.presets is not None:
        raise UsageError(
            f"--presets has no effect on {parsed.what}: the weights of a script cannot be seen, those of a training "
            "function can"
        )
    return is_function


def _of_script(parsed: argparse.Namespace) -> Comparison:
    script = ComparedScript(parsed.what, tuple(parsed.arguments), parsed.module, parsed.auto, parsed.loss)
    own = _own(parsed)
    made = listed(_names(parsed.fmts), _names(parsed.methods), _names(parsed.recipes), own, _common(parsed))
    check_script_settings(made)
    folder = RunFolder(Path(parsed.out), script.identity)

    def one(setting: ComparedSetting, seed: int) -> dict[str, Any]:
        return script.run(setting, seed, folder)

    runs = make_runs(made, seeds_of(_seeds(parsed.seeds)), folder, one, lambda setting: (), progress=True)
    warn_of_equal_seeds(runs)
    return write(folder, summarize(made, runs, ()))


def _of_function(parsed: argparse.Namespace) -> Comparison:
    _, train = find_function(parsed.what)
    return compare(
        train,
        fmts=_names(parsed.fmts),
        methods=_names(parsed.methods),
        recipes=_names(parsed.recipes),
        settings=_own(parsed),
        presets=None if parsed.presets is None else _names(parsed.presets),
        seeds=_seeds(parsed.seeds),
        training=_keywords(parsed.arguments),
        common=_common(parsed),
        out=parsed.out,
    )


def _own(parsed: argparse.Namespace) -> dict[str, dict[str, Any]]:
    try:
        return {} if parsed.settings is None else own_from_file(parsed.settings)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def _common(parsed: argparse.Namespace) -> dict[str, Any]:
    given = {"include": parsed.include, "exclude": parsed.exclude}
    found: dict[str, Any] = {name: tuple(_names(text)) for name, text in given.items() if text is not None}
    return found if parsed.inner is None else {**found, "inner": parsed.inner}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> int | list[int]:
    parts = _names(text)
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--seeds {text}: accepted are how many, such as 3, or which, such as 0,1,7")
    return [int(part) for part in parts] if "," in text else int(text or 0)


def _keywords(arguments: Sequence[str]) -> dict[str, Any]:
    """``steps=300`` as a keyword argument; a value that is JSON or a Python literal is what it says, else text."""
    found: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"{argument}: accepted are arguments of the function as key=value, such as steps=300")
        if name in found:
            raise UsageError(f"{argument}: {name} is given twice")
        found[name] = _value(text)
    return found


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _plot(comparison: Comparison, folder: Path) -> None:
    try:
        files = comparison.plot(folder)
    except ImportError as error:
        sys.stderr.write(f"gws compare: no plots: {error}\n")
        return
    for file in files:
        sys.stdout.write(f"The picture is {file}\n")
