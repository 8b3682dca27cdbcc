"""``gws export``: a low-bit checkpoint of a trained model, from its files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..compiler.backend import Backend
from ..config import Config
from ..deploy.export import FORMATS
from ..torch_internals.dynamo import raised_by_backend
from ..weight_names import without_number, without_stage
from .model_factory import BadFactoryError
from .options import UsageError, add_settings, check_folder, export_settings
from .trained_model import TrainedModel, backend_state, settings_of_state, trained_model

_DESCRIPTION = """\
Write the low-bit checkpoint of a trained model, bit for bit the model that was evaluated: the folder that vLLM, SGLang
and transformers take, or safetensors with a small JSON file. The model is traced once, on its own example or --input;
nothing is computed or compiled. How it was trained is said by --state, or by the settings.
"""

_EPILOG = """\
MODEL is a folder of save_pretrained, or package.module:function or path/to/file.py:function as for gws explain.

examples:
  gws export trained/ deployed/ --fmt mxfp8
  gws export trained/ deployed/ --state pqt.pt --format nvfp4
  gws export model.py:build_model deployed/ --checkpoint model.pt --input 2x128:int64:1000 --fmt int4_group
"""


def add_to(commands: Any) -> None:
    """Add the command to the parsers of ``gws``."""
    parser = commands.add_parser(
        "export",
        help="write the low-bit checkpoint of a trained model, for an engine",
        usage="gws export [options] MODEL PATH",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="the trained model")
    parser.add_argument("path", metavar="PATH", help="the folder to write (with --format gguf the file)")
    parser.add_argument(
        "--format",
        metavar="NAME",
        help=f"what weights are stored in: {', '.join(FORMATS)}; by default what each was trained for",
    )
    parser.add_argument(
        "--state",
        metavar="FILE",
        help="what Backend.state_dict() or gws run --state left: says the settings, and has learned widths",
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="the state dict of what MODULE:FUNCTION makes (.pt, .bin, .safetensors)"
    )
    parser.add_argument(
        "--input",
        metavar="[NAME=]SHAPE[:DTYPE[:N]]",
        action="append",
        default=[],
        help="an argument of the model's call, as for gws explain",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the table as JSON")
    add_settings(parser)
    parser.set_defaults(function=run)


def run(parsed: argparse.Namespace) -> int:
    """Export a model.

    Returns:
        0.

    Raises:
        UsageError: a bad setting, model, state or input; a weight that does not fit; a path that is taken.
    """
    settings = export_settings(parsed)
    check_folder(parsed.json)
    try:
        state = None if parsed.state is None else backend_state(parsed.state)
        if state is None and not settings:
            raise UsageError("how was the model trained? Give --state, or the settings (--fmt, ...) that it had")
        if state is not None:
            settings = _with_state(settings, state)
        backend = Backend(Config.make(**settings))
        if state is not None:
            backend.load_state_dict(state)
        model = trained_model(parsed.model, parsed.checkpoint, parsed.input)
        _prepare(backend, model)
        if state is not None:
            _check_names(state, model, parsed.state)
        report = backend.export(model.call.model, parsed.path, parsed.format, tokenizer=model.tokenizer)
    except (ValueError, BadFactoryError, OSError, ImportError) as error:
        raise UsageError(str(error)) from None
    if parsed.json is not None:
        Path(parsed.json).write_text(f"{report.to_json()}\n", encoding="utf-8")
    sys.stdout.write(f"{report}\n")
    return 0


def _with_state(settings: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """What was given, over what the state tells; a format that was given takes block and scale with it."""
    if "bits" in state and "bits" in settings:
        return {"seed": state["seed"], **settings}
    told = settings_of_state(state)
    if "fmt" in settings:
        told = {key: value for key, value in told.items() if key not in ("block", "scale")}
    return told | settings


def _prepare(backend: Backend, model: TrainedModel) -> None:
    call = model.call
    call.model.eval()
    try:
        backend.prepare(call.model, *call.args, **call.kwargs)
    except Exception as error:
        raised = raised_by_backend(error)
        if raised is not error and isinstance(raised, ValueError):
            raise raised from None
        raise ValueError(
            f"the model's call failed while it was traced ({type(error).__name__}: {error}): give it --input"
        ) from error


def _check_names(state: dict[str, Any], model: TrainedModel, file: str) -> None:
    """Hold the names of a state to those of the model."""
    known = {name for name, _ in model.call.model.named_parameters(remove_duplicate=False)}
    missing = [name for name, _ in state["weights"] if without_stage(without_number(name)) not in known]
    if missing:
        raise ValueError(
            f"--state {file} is of another model: it has {', '.join(missing[:4])}, and the model has no such weights"
        )
