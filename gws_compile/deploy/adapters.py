"""Models with adapters (PEFT): the base model's weights under its own names, and the adapters apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .collect import DeployedTensor
from .encode import cast_weight
from .folder import write_json

FOLDER = "adapter"
"""Where adapters go, inside the folder of the base model."""

_BETWEEN = ("base_layer", "original_module")
"""Components of names that adapters put around what they adapt."""


@dataclass(frozen=True, eq=False)
class Adapters:
    """What PEFT has put around a base model.

    Attributes:
        model: the ``PeftModel``.
        tensors: of the adapter that is active, by the names under which PEFT saves them; empty where it is merged into
            the base model's weights.
    """

    model: Any
    tensors: Mapping[str, DeployedTensor]

    def write(self, folder: Path, values: Sequence[torch.Tensor], base: Path) -> tuple[str, ...]:
        """Write the adapter beside the base model.

        Args:
            folder: of the base model.
            values: the gathered tensors, in the order of ``tensors``.
            base: where the base model will be.

        Returns:
            The files' names.
        """
        from safetensors.torch import save_file

        place = folder / FOLDER
        place.mkdir()
        saved = {}
        for (name, tensor), value in zip(self.tensors.items(), values, strict=True):
            weight = tensor.weight
            saved[name] = (value if weight is None else cast_weight(value, weight).to(value.dtype)).contiguous().clone()
        save_file(saved, place / "adapter_model.safetensors", metadata={"format": "pt"})
        config = self.model.peft_config[self.model.active_adapter]
        write_json(place / "adapter_config.json", {**_plain(config.to_dict()), **_of_base(base)})
        return tuple(f"{FOLDER}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors"))


def _of_base(base: Path) -> dict[str, Any]:
    return {"base_model_name_or_path": str(base), "inference_mode": True}


def _plain(value: Any) -> Any:
    """What JSON has no words for as lists and texts."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (set, tuple, list)):
        return sorted(value) if isinstance(value, set) else [_plain(one) for one in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return getattr(value, "value", value)
    return str(value)


def is_peft_model(model: nn.Module) -> bool:
    """Whether a module is a ``PeftModel``; without importing peft."""
    return any(kind.__name__ == "PeftModel" and kind.__module__.startswith("peft.") for kind in type(model).__mro__)


def split(model: Any, tensors: Sequence[DeployedTensor]) -> tuple[nn.Module, list[DeployedTensor], Adapters]:
    """The base model, its tensors under its own names, and the adapters.

    Args:
        model: a ``PeftModel``.
        tensors: of its state.

    Raises:
        ValueError: several adapters are active, or some are merged and some not.
    """
    import peft

    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"export() takes one active adapter, and {', '.join(active)} are: call set_adapter() with one")
    merged = {bool(one.merged) for one in model.modules() if isinstance(getattr(one, "merged", None), bool)}
    if len(merged) > 1:
        raise ValueError("some adapters are merged into their weights and some are not: merge all, or unmerge all")
    state = {tensor.name: tensor.tensor for tensor in tensors}
    saved = peft.get_peft_model_state_dict(model, state_dict=state, adapter_name=active[0])
    by_id = {id(tensor.tensor): tensor for tensor in tensors}
    of_adapter = {name: by_id[id(value)] for name, value in saved.items() if id(value) in by_id}
    base = model.get_base_model()
    own = {id(value) for value in base.state_dict(keep_vars=True).values()}
    others = {id(tensor.tensor) for tensor in of_adapter.values()}
    prefix = _prefix(model)
    kept = []
    for tensor in tensors:
        if id(tensor.tensor) not in own or id(tensor.tensor) in others or _of_another(tensor.name, model):
            continue
        parts = [part for part in tensor.name.removeprefix(prefix).split(".") if part not in _BETWEEN]
        name = ".".join(parts)
        weight = None if tensor.weight is None else replace(tensor.weight, name=name)
        kept.append(replace(tensor, name=name, weight=weight))
    return base, kept, Adapters(model, {} if merged == {True} else of_adapter)


def _prefix(model: Any) -> str:
    base = model.get_base_model()
    return next(f"{name}." for name, module in model.named_modules() if module is base)


def _of_another(name: str, model: Any) -> bool:
    """Whether a tensor belongs to an adapter that is not active."""
    prefix = model.base_model.prefix
    return any(part.startswith(prefix) or part == "modules_to_save" for part in name.split("."))
