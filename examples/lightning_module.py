"""PyTorch Lightning with pseudo-quantization training: the LightningModule is compiled in place by the backend's name.

Settings come from the environment: ``GWS_FMT=fp6_e3m2 python examples/lightning_module.py``.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gws_compile


class Classifier(lightning.LightningModule):
    """Tells on which side of a circle a point lies."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """(n, 2) points to (n, 2) logits."""
        return self.net(points)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        """The loss of a batch of points and labels."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on everything."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def train(model: lightning.LightningModule, **arguments: Any) -> lightning.Trainer:
    """Fit a model that is compiled, or not; ``arguments`` are the Trainer's."""
    points = torch.randn(1024, 2)
    data = TensorDataset(points, (points.norm(dim=1) > 1.2).long())
    trainer = lightning.Trainer(
        logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, **arguments
    )
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))
    return trainer


def main() -> None:
    torch.manual_seed(0)
    model = Classifier()
    model.compile(backend="gws")
    trainer = train(model, max_steps=200, accumulate_grad_batches=2)
    print(f"loss after {trainer.global_step} steps: {trainer.callback_metrics['loss'].item():.4f}")
    print(gws_compile.named_backend().report())


if __name__ == "__main__":
    main()
