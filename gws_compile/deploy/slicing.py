"""Cutting out what is pruned: `slice_pruned`, which makes layers smaller."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def slice_pruned(consumer: nn.Module, producers: Sequence[nn.Module], *, size: int = 1) -> torch.Tensor:
    """Cut features that nothing looks at out of the layers that compute them, and out of the one that would read them.

    A feature is cut where all of its column in the consumer's weight is zero, as `gws_compile.PrunedGroups` of columns
    leave it; what its rows in the producers' weights are does not matter. The layers then compute the same with fewer
    features: sums without terms that were zero. Of a gated MLP the consumer is ``down_proj`` and the producers are
    ``gate_proj`` and ``up_proj``; of attention they are ``o_proj`` and ``q_proj``, ``k_proj``, ``v_proj``, and ``size``
    is that of a head.

    The weights have to be those that are deployed, with the zeros in them: of `gws_compile.load_export`, say. What lies
    between the layers has to compute each feature, or each group of ``size``, from the same one of the producers alone,
    as activations, products and attention heads do. That is not checked.

    Args:
        consumer: a `torch.nn.Linear`, or transformers' ``Conv1D``; changed in place.
        producers: likewise; each has as many outputs as the consumer has inputs.
        size: how many features that lie side by side are cut together, or not at all.

    Returns:
        int64: the features that are left, by their numbers.

    Raises:
        ValueError: another kind of layer, sizes that do not go together, or nothing, or everything, to cut; then
            nothing is changed.
    """
    layers = [_Layer(one) for one in (consumer, *producers)]
    into, inputs = layers[0], layers[0].inputs
    if not producers:
        raise ValueError("slice_pruned takes one producer or more, got none")
    for layer in layers[1:]:
        if layer.outputs != inputs:
            raise ValueError(
                f"each producer must have the {inputs} outputs that the consumer takes, got one with {layer.outputs}: "
                "layers that are fused into one have to be parted first"
            )
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or inputs % size:
        raise ValueError(f"size must be a divisor of the consumer's {inputs} inputs, got {size!r}")
    dead = (into.weight == 0).all(0).view(-1, size).all(1).repeat_interleave(size)
    if not dead.any():
        raise ValueError(
            f"no {'input' if size == 1 else f'group of {size} inputs'} of the consumer has zeros alone: slice_pruned "
            "takes deployed weights, such as those of load_export, trained with PrunedGroups(share, 'columns') for "
            "the consumer"
        )
    if dead.all():
        raise ValueError("all inputs of the consumer have zeros alone: nothing would be left")
    kept = (~dead).nonzero().flatten()
    into.keep_inputs(kept)
    for layer in layers[1:]:
        layer.keep_outputs(kept)
    return kept


class _Layer:
    """A linear layer, whichever way its weight lies."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._turned = type(module).__name__ == "Conv1D"
        if not (isinstance(module, nn.Linear) or self._turned):
            raise ValueError(f"slice_pruned takes nn.Linear and Conv1D layers, got {type(module).__name__}")

    @property
    def weight(self) -> torch.Tensor:
        """(out, in)."""
        weight: torch.Tensor = self._module.weight.detach()  # type: ignore[operator]
        return weight.t() if self._turned else weight

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[1])

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0])

    def keep_inputs(self, kept: torch.Tensor) -> None:
        self._replace(self.weight[:, kept])
        setattr(self._module, "nx" if self._turned else "in_features", len(kept))

    def keep_outputs(self, kept: torch.Tensor) -> None:
        self._replace(self.weight[kept])
        bias = self._module.bias
        if isinstance(bias, torch.Tensor):
            self._module.bias = nn.Parameter(bias.detach()[kept], bias.requires_grad)
        setattr(self._module, "nf" if self._turned else "out_features", len(kept))

    def _replace(self, weight: torch.Tensor) -> None:
        trained = bool(self._module.weight.requires_grad)
        self._module.weight = nn.Parameter((weight.t() if self._turned else weight).contiguous(), trained)
