"""What is exported in tests: weights that are hard to store, and what an export has to decode to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import gws_compile


class Layer(nn.Module):
    """A linear layer with a given weight, alone in a module that torch traces."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.fc.weight.data = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def hard_weight(rows: int, cols: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Values that storing goes wrong with: what is saturated, subnormal, -0, a block of zeros, a row of 240 X.

    Of the blocks at the left. In e4m3, with the scale of a 32 x 32 block whose maximum is 1.9, that saturates at 448 X;
    beside it lies a row whose largest value is 240 X, of which a scale computed anew would be half as large, and values
    below X's smallest.
    """
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator)
    x = 2.0**-8  # the scale of e4m3 for a block with maximum 1.9
    w[0, 0] = 1.9
    w[1, :16] = 0.3
    w[1, 0] = 240 * x
    w[0:32, 1:16].clamp_(-1.8, 1.8)
    w[2:32, :32].clamp_(-1.5, 1.5)
    w[0, 16:32], w[1, 16:32] = 0.01, -0.01
    w[2, :4] = torch.tensor([2.0**-9 * x, 3 * 2.0**-10 * x, -(2.0**-12) * x, -0.0])
    if rows > 34 and cols >= 64:
        w[32:, 32:64] = 0
    return w.to(dtype)


def evaluated(pqt: gws_compile.Backend, model: nn.Module, *args: torch.Tensor) -> tuple[nn.Module, Any]:
    """The compiled model, and what it gives under ``no_grad``."""
    compiled = torch.compile(model, backend=pqt)
    with torch.no_grad():
        return compiled, compiled(*args)


def export_layer(
    weight: torch.Tensor, path: Path, format: str | None = None, **settings: Any
) -> dict[str, torch.Tensor]:
    """Export a linear layer with this weight; the tensors of the file."""
    pqt = gws_compile.backend(inner="eager", **settings)
    compiled, _ = evaluated(pqt, Layer(weight), torch.zeros(1, weight.shape[1], dtype=weight.dtype))
    pqt.export(compiled, path, format)
    return load_file(path / "model.safetensors")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same byte for byte."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def without_minus_zero(w: torch.Tensor) -> torch.Tensor:
    """-0 as 0: integers have no sign of zero."""
    return w + 0.0


def cast_state(model: nn.Module, cast: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The state of a model with some weights cast."""
    return {
        name: cast[name](value.detach()) if name in cast else value.detach()
        for name, value in model.state_dict().items()
    }


def read_json(path: Path) -> Any:
    """The content of a file."""
    return json.loads(path.read_text(encoding="utf-8"))
