"""Exporting a trained model: `export`, which is `gws_compile.Backend.export`."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..settings.weight_settings import check_choice
from .collect import DeployedTensor
from .compressed_tensors import quantization_config, sglang_mxfp8
from .containers import CONTAINERS
from .export_report import ExportedWeight, ExportReport
from .folder import check_path, whole_or_nothing, write_json
from .huggingface import (
    family_of,
    huggingface_entries,
    ignored,
    is_pretrained_model,
    siblings,
    write_beside,
)
from .manifest import MANIFEST, manifest_of
from .module_entries import module_entries
from .plan import PlannedEntry, check_siblings, plan
from .ranks import Ranks
from .writing import SHARD_BYTES, Writer, stored_of

FORMATS = (*CONTAINERS, "mxfp8_sglang", "torchao", "gguf", "dense")
"""What `gws_compile.Backend.export` takes as ``format``, beside None."""


def export(
    model: nn.Module,
    tensors: Sequence[DeployedTensor],
    path: str | Path,
    fmt: str | None,
    *,
    tokenizer: Any = None,
    stage: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> ExportReport:
    """Write a checkpoint; see `gws_compile.Backend.export`.

    Args:
        model: without wrappers.
        tensors: of its state, see `gws_compile.deploy.collect.deployed_tensors`.
        path: of the folder.
        fmt: one of `FORMATS`, or None.
        tokenizer: saved beside a Hugging Face model.
        stage: it is a stage of a pipeline, which each rank writes itself.
        shard_bytes: of a file.
    """
    check_choice("format", fmt, (None, *FORMATS))
    place = Path(path)
    ranks = Ranks.of((tensor.tensor for tensor in tensors), stage=stage)
    if ranks.writes:
        check_path(place)
    kind = _HuggingFace if is_pretrained_model(model) else _Module
    job = kind(model, tensors, fmt, tokenizer)
    writer = Writer(job.planned, ranks, job.family_of, shard_bytes=shard_bytes)
    report = _report(place, job, tensors)

    def work() -> ExportReport:
        if not ranks.writes:
            for _ in ranks.gathered(writer.gathers() if ranks.together else ()):
                pass
            return report
        with whole_or_nothing(place) as folder:
            files = (*writer.write(folder), *job.beside(folder))
            done = replace(report, files=tuple(sorted((*files, MANIFEST))))
            write_json(
                folder / MANIFEST, manifest_of(job.planned, job.ties, done, importlib.metadata.version("gws-compile"))
            )
        return done

    told = ranks.tell(work)
    assert isinstance(told, ExportReport)
    return told


class _Module:
    """An `nn.Module`: its state under its own names, with a small JSON file that says how it is packed."""

    def __init__(self, model: nn.Module, tensors: Sequence[DeployedTensor], fmt: str | None, tokenizer: Any) -> None:
        if fmt == "mxfp8_sglang":
            raise ValueError(
                f"format={fmt!r} is a checkpoint of a Hugging Face model, and this is a {type(model).__name__}: "
                f"accepted are {', '.join(CONTAINERS)} and dense"
            )
        if tokenizer is not None:
            raise ValueError(
                f"tokenizer= goes into the folder of a Hugging Face model, and this is a {type(model).__name__}: "
                "leave it out"
            )
        entries, self.ties = module_entries(tensors)
        self.planned: list[PlannedEntry] = plan(entries, fmt)
        self.notes: tuple[str, ...] = ()
        self.format = _format_name(self.planned)

    def family_of(self, name: str) -> str:
        """Nothing is fused: each weight has scales of its own."""
        return name

    def load(self, place: Path) -> str:
        """What loads it."""
        return f"gws_compile.load_export({str(place)!r})"

    def beside(self, folder: Path) -> tuple[str, ...]:
        """Nothing."""
        return ()


def _format_name(planned: Sequence[PlannedEntry]) -> str:
    names = {one.container.name for one in planned if one.container is not None}
    return names.pop() if len(names) == 1 else "mixed" if names else "dense"


class _HuggingFace:
    """A Hugging Face model: the folder that vLLM, SGLang and transformers take."""

    def __init__(self, model: Any, tensors: Sequence[DeployedTensor], fmt: str | None, tokenizer: Any) -> None:
        self.ties: dict[str, str] = {}
        self._model, self._tokenizer = model, tokenizer
        self._sglang = fmt == "mxfp8_sglang"
        entries, self._untied = huggingface_entries(model, tensors)
        self.planned: list[PlannedEntry] = plan(entries, "mxfp8" if self._sglang else fmt)
        check_siblings(self.planned, siblings(self.planned))
        self.format = "mxfp8_sglang" if self._sglang else _format_name(self.planned)
        self.notes = _notes(self.planned)
        self.family_of: Callable[[str], str] = family_of

    def load(self, place: Path) -> str:
        """What loads it."""
        path = f"{type(self._model).__name__}.from_pretrained({str(place)!r}"
        if self.format == "dense":
            return f"{path})"
        if self._sglang:
            return f"python -m sglang.launch_server --model-path {place}"
        if self.format == "mixed":
            return f"{path}, dtype=torch.bfloat16)"
        return f"{path}, quantization_config=CompressedTensorsConfig(dequantize=True)); vllm serve {place}"

    def beside(self, folder: Path) -> tuple[str, ...]:
        """Configurations, and the tokenizer."""
        packed = any(one.container is not None for one in self.planned)
        quantization = None
        if packed:
            dense = ignored(self._model, self.planned)
            quantization = sglang_mxfp8(dense) if self._sglang else quantization_config(self.planned, dense)
        return write_beside(self._model, folder, quantization, self._tokenizer, untied=self._untied)


def _notes(planned: Sequence[PlannedEntry]) -> tuple[str, ...]:
    """What loaders do to some containers."""
    packed = [one for one in planned if one.container is not None and one.entry.weight is not None]
    notes = []
    if any(one.container.scale == "float32" for one in packed if one.container):
        notes.append(
            "scales are float32: transformers keeps them with dequantize=True, and rounds them to the model's dtype "
            "without; vLLM rounds those of int4 and int8"
        )
    two_levels = [one for one in packed if one.entry.weight and one.entry.weight.spec.needs_matrix_maximum]
    if two_levels:
        notes.append(
            "scales have two levels: transformers decodes nvfp4 in bfloat16, whatever dtype is asked for, and is "
            "exact there"
        )
        fused = [group for group in siblings(planned) if any(one.entry.name in group for one in two_levels)]
        if fused:
            notes.append(
                "each weight has an nvfp4 scale of its own, and vLLM takes one for layers that it fuses "
                f"({', '.join(fused[0][:3])}), which moves their weights a little; fmt='fp4_e2m1', block=(16, 16) "
                "trains with power-of-two scales, of which one serves the whole model"
            )
    return tuple(notes)


def _report(place: Path, job: _Module | _HuggingFace, tensors: Sequence[DeployedTensor]) -> ExportReport:
    by_tensor: dict[int, list[PlannedEntry]] = {}
    for one in job.planned:
        by_tensor.setdefault(id(one.entry.source.tensor), []).append(one)
    weights, rest = [], 0
    for planned in by_tensor.values():
        source = planned[0].entry.source
        size = sum(stored.bytes for one in planned for stored in stored_of(one).values())
        if source.tensor.ndim < 2 or not source.is_parameter:
            rest += size
            continue
        weights.append(_row(planned, size))
    unique = {id(tensor.tensor): tensor.tensor for tensor in tensors}.values()
    return ExportReport(
        path=str(place),
        format=job.format,
        weights=tuple(weights),
        rest_bytes=rest,
        model_bytes=sum(tensor.numel() * tensor.element_size() for tensor in unique),
        files=(),
        load=job.load(place),
        notes=job.notes,
    )


def _row(planned: Sequence[PlannedEntry], size: int) -> ExportedWeight:
    source = planned[0].entry.source
    container = next((one.container.name for one in planned if one.container is not None), "dense")
    elements = sum(math.prod(one.entry.shape) for one in planned)
    weight = source.weight
    reason = next((one.reason for one in planned if one.reason), "") if weight is not None else source.reason
    return ExportedWeight(
        name=source.name,
        shape=tuple(source.tensor.shape),
        trained="" if weight is None else weight.text,
        container=container,
        bits=8 * size / max(elements, 1),
        stored_bytes=size,
        reason=reason,
        note="" if weight is None or container == "dense" else weight.note,
    )
