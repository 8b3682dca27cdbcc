"""``gws explain``: what would be rewritten in a model, as a table and a page, with nothing compiled."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..compiler.tracer import explained
from ..config import Config
from ..report.report import Report
from ..torch_internals.dynamo import raised_by_backend
from .model_factory import BadFactoryError, ExampleCall, build
from .options import UsageError, add_settings, check_folder, export_settings

_DESCRIPTION = """\
Trace a model, rewrite its graphs, and say what would be rewritten; nothing is compiled. The model is called once, as it
is. Prints a table and writes a page with the weights, graph breaks, recompilations, and each graph before and after.
"""

_EPILOG = """\
MODULE:FUNCTION is package.module:function or path/to/file.py:function. The function is called without arguments and
returns the model, or (model, args), or (model, args, kwargs) with the arguments of the model's call. Where it returns
the model alone, these come from --input, or from a function example_inputs() beside it, which returns args or
(args, kwargs).

examples:
  gws explain train.py:build_model --input 2x128:int64:1000 --fmt fp6_e3m2
  gws explain package.models:small --input 8x3x32x32 --html page.html --json report.json
"""


def add_to(commands: Any) -> None:
    """Add the command to the parsers of ``gws``."""
    parser = commands.add_parser(
        "explain",
        help="say what would be rewritten in a model, and write a page of it",
        usage="gws explain [options] MODULE:FUNCTION",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("factory", metavar="MODULE:FUNCTION", help="what makes the model")
    parser.add_argument(
        "--input",
        metavar="[NAME=]SHAPE[:DTYPE[:N]]",
        action="append",
        default=[],
        help="an argument of the model's call, such as 2x128:int64:1000 (values 0 to 999; 2 where nothing is said) or "
        "mask=2x128:bool; float32 normal values by default; several times for several",
    )
    parser.add_argument(
        "--eval",
        action="store_true",
        help="call it in evaluation mode without gradients: casts alone; else in training",
    )
    parser.add_argument("--html", metavar="FILE", default="gws-report.html", help="where the page goes (%(default)s)")
    parser.add_argument("--no-html", action="store_true", help="write no page")
    parser.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    add_settings(parser)
    parser.set_defaults(function=run)


def run(parsed: argparse.Namespace) -> int:
    """Explain a model.

    Returns:
        0; 1 where no weight would be rewritten.

    Raises:
        UsageError: a bad setting, factory or input, or a file that cannot be written.
    """
    settings = export_settings(parsed)
    for file in (None if parsed.no_html else parsed.html, parsed.json):
        check_folder(file)
    try:
        config = Config.make(**settings)
        call = build(parsed.factory, parsed.input)
    except (ValueError, BadFactoryError) as error:
        raise UsageError(str(error)) from None
    call.model.train(not parsed.eval)
    with torch.set_grad_enabled(not parsed.eval):
        report = _explain(call, config)
    _write(report, parsed)
    return 0 if report.rewritten else 1


def _explain(call: ExampleCall, config: Config) -> Report:
    try:
        return explained(call.model, call.args, call.kwargs, config)
    except Exception as error:
        raised = raised_by_backend(error)
        if raised is not error and isinstance(raised, ValueError):  # strict, or a shard that cuts a block
            raise UsageError(str(raised)) from None
        if not call.args and not call.kwargs:
            raise UsageError(
                f"the model's call without arguments failed ({type(error).__name__}: {error}): give it --input, have "
                "the function return (model, args) or (model, args, kwargs), or put an example_inputs() beside it"
            ) from error
        raise


def _write(report: Report, parsed: argparse.Namespace) -> None:
    sys.stdout.write(f"{report}\n")
    if parsed.json is not None:
        Path(parsed.json).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    if not parsed.no_html:
        report.to_html(parsed.html)
        sys.stdout.write(f"\nThe page is {parsed.html}\n")
