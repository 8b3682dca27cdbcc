"""The file that says what a folder holds, and `load_export`, which reads it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .containers import CONTAINERS
from .encode import decode
from .export_report import ExportReport
from .layouts import Layout
from .plan import PlannedEntry

MANIFEST = "gws_export.json"
_VERSION = 1


def manifest_of(
    planned: Sequence[PlannedEntry], layout: Layout, ties: Mapping[str, str], report: ExportReport
) -> dict[str, Any]:
    """What is written beside the weights: how each is stored, and the report.

    Args:
        planned: the entries.
        layout: what their tensors are called.
        ties: names of tied tensors, by the names under which they are stored.
        report: of the export.
    """
    packed = {}
    for one in planned:
        weight, container = one.entry.weight, one.container
        if container is None or weight is None:
            continue
        packed[one.entry.name] = {
            "container": container.name,
            "shape": list(one.entry.shape),
            "dtype": str(weight.spec.dtype).removeprefix("torch."),
            "group": list(one.group),
            "tensors": {key: tensor.name for key, tensor in layout.tensors(one).items()},
        }
    return {
        "version": _VERSION,
        "gws_compile": importlib.metadata.version("gws-compile"),
        "packed": packed,
        "tied": dict(ties),
        "report": report.to_dict(),
    }


def load_export(path: str | Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Read a folder of `Backend.export` back into a state dict.

    Args:
        path: of the folder.
        dtype: of all floating-point tensors; when None each has the one in which it was trained, where the values are
            those of the compiled model, bit for bit.

    Returns:
        Name -> tensor, on the CPU: of an `nn.Module` what its ``load_state_dict`` takes, of a Hugging Face model the
        tensors of a dense checkpoint.

    Raises:
        FileNotFoundError: there is no such folder, or it is none of an export.
        ValueError: it was written by a newer version, or is not complete.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder / MANIFEST}: there is none, so {folder} is no folder of Backend.export()")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("version") != _VERSION:
        raise ValueError(
            f"{folder / MANIFEST} has version {manifest.get('version')!r}, and this gws_compile reads {_VERSION}"
        )
    files = sorted(folder.glob("*.safetensors"))
    state: dict[str, torch.Tensor] = {}
    parts = {name for packed in manifest["packed"].values() for name in packed["tensors"].values()}
    stored: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                (stored if name in parts else state)[name] = opened.get_tensor(name)
    if missing := sorted(parts - stored.keys()):
        raise ValueError(f"{folder} is not complete: {', '.join(missing[:4])} missing")
    for name, packed in manifest["packed"].items():
        tensors = {key: stored.pop(of) for key, of in packed["tensors"].items()}
        group = tuple(packed["group"])
        decoded = decode(tensors, CONTAINERS[packed["container"]], (group[0], group[1]), packed["shape"])
        state[name] = decoded.to(getattr(torch, packed["dtype"]))
    for name, of in manifest["tied"].items():
        state[name] = state[of]
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    return state
