"""Exporting a trained model: `export`, which is `gws_compile.Backend.export`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..settings.weight_settings import check_choice
from . import adapters
from .checkpoints import Checkpoint, HuggingFaceCheckpoint, ModuleCheckpoint
from .collect import DeployedTensor
from .containers import CONTAINERS
from .export_report import ExportedWeight, ExportReport
from .folder import check_path, whole_file, whole_or_nothing, write_json
from .gguf_file import GgufFile
from .huggingface import is_pretrained_model
from .manifest import MANIFEST, manifest_of
from .ranks import Ranks
from .writing import SHARD_BYTES, Group, Writer, groups_of

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
    adapted: adapters.Adapters | None = None
    if adapters.is_peft_model(model):
        model, tensors, adapted = adapters.split(model, tensors)
    ranks = Ranks.of((tensor.tensor for tensor in tensors), stage=stage)
    gguf = GgufFile(model, tokenizer) if fmt == "gguf" and is_pretrained_model(model) else None
    if is_pretrained_model(model):
        checkpoint: Checkpoint = HuggingFaceCheckpoint(model, tensors, fmt, tokenizer)
    else:
        checkpoint = ModuleCheckpoint(model, tensors, fmt, tokenizer)
    if adapted is not None and adapted.tensors and fmt == "gguf":
        raise ValueError('format="gguf" is one file, without adapters: merge them first, with merge_adapter()')
    report = _report(place, checkpoint, tensors, adapted)
    if gguf is not None:
        return _export_gguf(place, gguf, checkpoint, ranks, report)
    beside = [] if adapted is None else [tensor.tensor for tensor in adapted.tensors.values()]
    writer = Writer(checkpoint.planned, checkpoint.layout, checkpoint.family_of, beside, shard_bytes=shard_bytes)

    def work(values: Iterator[torch.Tensor]) -> ExportReport:
        check_path(place)
        with whole_or_nothing(place) as folder:
            files = [*writer.write(folder, values), *checkpoint.write_beside(folder), MANIFEST]
            if adapted is not None and adapted.tensors:
                files += adapted.write(folder, list(values), place)
            done = replace(report, files=tuple(sorted(files)))
            write_json(folder / MANIFEST, manifest_of(checkpoint.planned, checkpoint.layout, checkpoint.ties, done))
        return done

    return ranks.write(writer.gathers(), work, report)


def _export_gguf(
    place: Path, file: GgufFile, checkpoint: Checkpoint, ranks: Ranks, report: ExportReport
) -> ExportReport:
    file.check(checkpoint.planned)
    gathers = [one.entry.source.tensor for one in checkpoint.planned]

    def work(values: Iterator[torch.Tensor]) -> ExportReport:
        check_path(place, file=True)
        with whole_file(place) as partial:
            file.write(partial, checkpoint.planned, values)
        return replace(report, files=(place.name,), load=f"llama-cli --model {place}")

    return ranks.write(gathers, work, report)


def _report(
    place: Path, checkpoint: Checkpoint, tensors: Sequence[DeployedTensor], adapted: adapters.Adapters | None
) -> ExportReport:
    weights, rest = [], 0
    for group in groups_of(checkpoint.planned):
        source = group.source
        size = sum(stored.bytes for one in group.entries for stored in checkpoint.layout.tensors(one).values())
        if source.tensor.ndim < 2 or not source.is_parameter:
            rest += size
            continue
        weights.append(_row(group, size))
    notes = checkpoint.notes()
    if adapted is not None and adapted.tensors:
        for name, tensor in adapted.tensors.items():
            size = tensor.tensor.numel() * tensor.tensor.element_size()
            trained = "" if tensor.weight is None else tensor.weight.text
            shape, bits = tuple(tensor.tensor.shape), 8.0 * tensor.tensor.element_size()
            weights.append(ExportedWeight(name, shape, trained, "dense", bits, size, "an adapter's: stored apart"))
        tensors = [*tensors, *adapted.tensors.values()]
        notes = (*notes, f"adapters are apart: peft.PeftModel.from_pretrained(model, {str(place / adapters.FOLDER)!r})")
    unique = {id(tensor.tensor): tensor.tensor for tensor in tensors}.values()
    return ExportReport(
        path=str(place),
        format=checkpoint.format,
        weights=tuple(weights),
        rest_bytes=rest,
        model_bytes=sum(tensor.numel() * tensor.element_size() for tensor in unique),
        files=(),
        load=checkpoint.load(place),
        notes=notes,
    )


def _row(group: Group, size: int) -> ExportedWeight:
    source, weight = group.source, group.source.weight
    container = "dense" if group.container is None else group.container.name
    elements = sum(math.prod(one.entry.shape) for one in group.entries)
    reason = next((one.reason for one in group.entries if one.reason), "") if weight is not None else source.reason
    return ExportedWeight(
        name=source.name,
        shape=tuple(source.tensor.shape),
        trained="" if weight is None else weight.text,
        container=container,
        bits=8 * size / max(elements, 1),
        stored_bytes=size,
        reason=reason,
        note="" if weight is None or container == "dense" else weight.note,
        sparsity="" if weight is None else weight.sparsity,
    )
