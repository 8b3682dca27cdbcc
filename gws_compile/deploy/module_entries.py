"""The entries of an `nn.Module` that no library has a checkpoint format for: its state, under its own names."""

from __future__ import annotations

from collections.abc import Sequence

from .collect import DeployedTensor
from .plan import Entry


def module_entries(tensors: Sequence[DeployedTensor]) -> tuple[list[Entry], dict[str, str]]:
    """An entry for each tensor, and the names of tied ones that are left out, by the names under which they are there.

    Args:
        tensors: of the state.

    Raises:
        ValueError: one tensor is looked up as it is, and multiplied by as it is cast, under one name.
    """
    entries: list[Entry] = []
    ties: dict[str, str] = {}
    known: dict[tuple[int, bool], str] = {}
    for tensor in tensors:
        raw = is_raw(tensor, tensors)
        key = (id(tensor.tensor), raw)
        if key in known:
            ties[tensor.name] = known[key]
            continue
        known[key] = tensor.name
        shape = tuple(tensor.tensor.shape)
        entries.append(Entry(tensor.name, tensor, None, shape, False, raw, _dense_because(tensor)))
    return entries, ties


def is_raw(tensor: DeployedTensor, tensors: Sequence[DeployedTensor]) -> bool:
    """Whether a tensor that is cast elsewhere is used as it is under this name: a table that an output head is tied to.

    Raises:
        ValueError: it is both under one name.
    """
    if tensor.weight is None or not (tensor.is_table or tensor.weight.embedded):
        return False
    others = [one for one in tensors if one.tensor is tensor.tensor and not one.is_table]
    if tensor.is_table and others:
        return True
    if tensor.is_table or len(others) == len([one for one in tensors if one.tensor is tensor.tensor]):
        raise ValueError(
            f"{tensor.name} is an embedding table, which is looked up as it is, and multiplied by as "
            f"{tensor.weight.text}: one tensor cannot hold both. Exclude it, or give the "
            "output head a name of its own"
        )
    return False


def _dense_because(tensor: DeployedTensor) -> str | None:
    weight = tensor.weight
    if weight is not None and tensor.tensor.ndim - weight.batch_dims != 2:
        return "a convolution's weight: no container holds it"
    return None
