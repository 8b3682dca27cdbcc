"""A loop with accelerate and pseudo-quantization training: the model is compiled in place by the backend's name.

``Accelerator(dynamo_backend="gws")`` does not do: accelerate takes names of a list of its own. Settings come from the
environment: ``GWS_FMT=fp6_e3m2 python examples/accelerate_loop.py``, or under ``accelerate launch``.
"""

from __future__ import annotations

from typing import Any

import accelerate
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gws_compile


def build_model() -> nn.Module:
    """A perceptron that is to learn the sine."""

    class Perceptron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.middle, self.down = nn.Linear(1, 64), nn.Linear(64, 64), nn.Linear(64, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.tanh(self.middle(torch.tanh(self.up(x)))))

    return Perceptron()


def train(model: nn.Module, steps: int, **arguments: Any) -> float:
    """Train a model that is compiled, or not, and return the last loss; ``arguments`` are the Accelerator's."""
    accelerator = accelerate.Accelerator(**arguments)
    x = torch.rand(1024, 1) * 6 - 3
    loader = DataLoader(TensorDataset(x, x.sin()), batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    done, loss = 0, torch.zeros(())
    while done < steps:
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            done += accelerator.sync_gradients
            if done == steps:
                break
    accelerator.print(f"loss after {steps} steps: {loss.item():.4f}")
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    model = build_model()
    model.compile(backend="gws")
    train(model, steps=200, gradient_accumulation_steps=2)
    print(gws_compile.named_backend().report())


if __name__ == "__main__":
    main()
