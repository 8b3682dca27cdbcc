"""The keys of weights, as graphs take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..numerics.keys import key_words
from ..torch_internals.modes import plain_tensors


def key_tensors(seed: int, names: Sequence[str], device: torch.device) -> tuple[torch.Tensor, ...]:
    """The keys that say which random streams weights draw from.

    Args:
        seed: of the backend.
        names: the weights' unique names.
        device: that of the weights.

    Returns:
        int32, (2,) each: `gws_compile.numerics.keys.key_words`.
    """
    # Each of them at a multiple of 16 bytes, or Inductor would copy it at each call.
    with plain_tensors():
        table = torch.tensor([[*key_words(seed, name), 0, 0] for name in names], dtype=torch.int32, device=device)
        return tuple(row[:2] for row in table.unbind())
