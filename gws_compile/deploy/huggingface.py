"""A Hugging Face model as a checkpoint: the names that engines look for, and the files beside the weights."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .collect import DeployedTensor
from .folder import write_json
from .module_entries import is_raw
from .plan import Entry, PlannedEntry

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Layers beside each other that engines make one of."""


def is_pretrained_model(model: nn.Module) -> bool:
    """Whether a module is a ``PreTrainedModel`` of transformers; without importing it."""
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in type(model).__mro__
    )


def huggingface_entries(model: Any, tensors: Sequence[DeployedTensor]) -> tuple[list[Entry], bool]:
    """An entry for each tensor of the checkpoint, and whether a head that was tied is stored apart.

    Runtime and checkpoint may name and cut weights differently (experts lie in one tensor at run time, and apart in a
    checkpoint). transformers' own conversion says how: it is given the numbers of rows in place of their values.

    Args:
        model: the ``PreTrainedModel``.
        tensors: of its state, under names without what adapters put in.
    """
    kept, untied = _without_ties(model, tensors)
    entries = []
    head = model.get_output_embeddings()
    for name, source, rows, shape in _converted(model, kept):
        raw = is_raw(source, tensors)
        is_linear, because = _linear(source, name, shape, head)
        entries.append(Entry(name, source, rows, shape, is_linear, raw, because))
    return entries, untied


def _without_ties(model: Any, tensors: Sequence[DeployedTensor]) -> tuple[list[DeployedTensor], bool]:
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    names = {tensor.name: tensor for tensor in tensors}
    kept: list[DeployedTensor] = []
    untied = False
    met: set[tuple[int, bool]] = set()
    for tensor in tensors:
        raw = is_raw(tensor, tensors)
        source = names.get(tied.get(tensor.name, ""))
        if source is not None and source.tensor is tensor.tensor:
            if is_raw(source, tensors) == raw:
                continue
            untied = True
        elif (id(tensor.tensor), raw) in met:
            continue
        met.add((id(tensor.tensor), raw))
        kept.append(tensor)
    return kept, untied


def _converted(
    model: Any, tensors: Sequence[DeployedTensor]
) -> list[tuple[str, DeployedTensor, torch.Tensor | None, tuple[int, ...]]]:
    """Name, source, rows and shape of every tensor of the checkpoint."""
    numbers: dict[str, torch.Tensor] = {}
    starts: list[tuple[int, DeployedTensor]] = []
    start = 0
    for tensor in tensors:
        count = _rows_of(tensor)
        shape = tuple(tensor.tensor.shape)
        numbers[tensor.name] = torch.arange(start, start + count).view(shape if len(shape) < 2 else (*shape[:-1], 1))
        starts.append((start, tensor))
        start += count
    found: list[tuple[str, DeployedTensor, torch.Tensor | None, tuple[int, ...]]] = []
    met: dict[int, int] = {}
    for name, rows in _reverted(model, numbers).items():
        if not rows.numel():  # a tensor of nothing, which is not parted
            source = next(tensor for tensor in tensors if tensor.name == name)
            found.append((name, source, None, tuple(source.tensor.shape)))
            continue
        source, own = _source_of(rows, starts)
        shape = tuple(rows.shape) if source.tensor.ndim < 2 else (*rows.shape[:-1], source.tensor.shape[-1])
        met[id(source)] = met.get(id(source), 0) + rows.numel()
        found.append((name, source, own, shape))
    for tensor in tensors:
        if met.get(id(tensor), 0) != _rows_of(tensor):
            raise ValueError(_unknown_conversion("something that lacks a part of it", tensor))
    return found


def _rows_of(tensor: DeployedTensor) -> int:
    """How many numbers stand for a tensor: of its rows, or of the elements of a vector."""
    shape = tuple(tensor.tensor.shape)
    return math.prod(shape if len(shape) < 2 else shape[:-1])


def _reverted(model: Any, numbers: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5 there were no conversions
        return numbers
    reverted: Mapping[str, torch.Tensor] = revert_weight_conversion(model, numbers)
    return reverted


def _source_of(
    rows: torch.Tensor, starts: Sequence[tuple[int, DeployedTensor]]
) -> tuple[DeployedTensor, torch.Tensor | None]:
    """The tensor that rows come from, and which of its rows they are; None where they are all of them, in order."""
    flat = rows.reshape(-1)
    first = int(flat[0])
    start, source = next((s, t) for s, t in reversed(starts) if s <= first)
    count = _rows_of(source)
    own = flat - start
    is_matrix = source.tensor.ndim >= 2
    if (is_matrix and rows.shape[-1] != 1) or bool((own < 0).any()) or bool((own >= count).any()):
        raise ValueError(_unknown_conversion(source.name, source))
    whole = own.numel() == count and bool((own == torch.arange(count)).all())
    return source, None if whole else own


def _unknown_conversion(name: str, source: DeployedTensor) -> str:
    return (
        f"{source.name}: transformers' checkpoint has it as {name}, in a form that is not made of its rows, which "
        "export() cannot follow. Please report it, with the model's class"
    )


def _linear(
    source: DeployedTensor, name: str, shape: tuple[int, ...], head: nn.Module | None
) -> tuple[bool, str | None]:
    """Whether an engine takes a weight as that of a linear layer; and why it has to stay dense, if it has to."""
    weight = source.weight
    owner = source.owner
    is_linear = isinstance(owner, nn.Linear) and source.attribute == "weight"
    is_expert = source.tensor.ndim == 3 and len(shape) == 2 and name.endswith(".weight") and "experts." in name
    if weight is None:
        return is_linear, None
    if head is not None and owner is head:
        return is_linear, "an output head: engines take it dense"
    if is_linear or is_expert:
        return True, None
    if source.tensor.ndim - weight.batch_dims != 2:
        return False, "a convolution's weight: no container holds it"
    kind = type(owner).__name__
    if kind == "Conv1D":
        return False, "a Conv1D's weight, stored transposed: engines take it dense"
    if weight.batch_dims:
        return (
            False,
            f"experts in one tensor ({kind}), also in this model's checkpoints: engines take it dense",
        )
    return False, f"held by {kind}, which is no nn.Linear: engines take it dense"


def siblings(planned: Iterable[PlannedEntry]) -> list[list[str]]:
    """Names of weights that engines fuse."""
    names = {one.entry.name for one in planned if one.entry.is_linear}
    groups: dict[tuple[str, int], list[str]] = {}
    for name in sorted(names):
        parent, _, layer = name.removesuffix(".weight").rpartition(".")
        for number, members in enumerate(FUSED):
            if layer in members:
                groups.setdefault((parent, number), []).append(name)
        before, found, _ = name.partition(".experts.")
        if found:  # one kernel multiplies by all experts of a layer
            groups.setdefault((before, -1), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def ignored(model: Any, planned: Sequence[PlannedEntry]) -> list[str]:
    """Names of the layers that stay dense, in the checkpoint's terms, a tied head among them."""
    packed = {id(one.entry.source.tensor) for one in planned if one.container is not None}
    names: dict[int, str] = {}
    for one in planned:
        if one.entry.rows is None:
            names[id(one.entry.source.tensor)] = one.entry.name
    head = model.get_output_embeddings()
    found = []
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim < 2 or isinstance(module, nn.Embedding):
            continue
        if id(weight) in packed:
            continue
        if module is head:  # by its own name: tied, its weight is stored under that of the table
            found.append(path)
        elif id(weight) in names:
            found.append(names[id(weight)].removesuffix(".weight"))
    return found


def family_of(name: str) -> str:
    """The module whose layers may be fused with one another: a layer's attention, its MLP, or all of its experts."""
    before, found, _ = name.partition(".experts.")
    return before if found else name.removesuffix(".weight").rpartition(".")[0]


def write_beside(
    model: Any, folder: Path, quantization: Mapping[str, Any] | None, tokenizer: Any, *, untied: bool
) -> tuple[str, ...]:
    """Write what a model's folder has beside its weights.

    Args:
        model: the ``PreTrainedModel``.
        folder: to write into.
        quantization: of ``config.json``; None for a dense checkpoint.
        tokenizer: has ``save_pretrained``; None for none.
        untied: the output head is stored apart from the table that it was tied to.

    Returns:
        The files' names.
    """
    before = set(folder.iterdir())
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):  # of the folder that the model came from
        delattr(config, "quantization_config")
    config.architectures = [type(model).__name__]
    if untied:
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    place = folder / "config.json"
    content = json.loads(place.read_text(encoding="utf-8"))
    content["dtype"] = str(model.dtype).removeprefix("torch.")
    content.pop("quantization_config", None)
    if quantization is not None:
        content["quantization_config"] = dict(quantization)
    write_json(place, content)
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if getattr(config, "auto_map", None) and not type(model).__module__.startswith("transformers."):
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, folder)  # the files of its code; config.json has named them
    return tuple(sorted(path.name for path in set(folder.iterdir()) - before))
