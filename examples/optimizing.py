"""The optimizer and the learning rates of the examples."""

from __future__ import annotations

import math

import torch


def adamw(model: torch.nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        fused=True,
    )


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warm_up: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear warm-up over a share of the steps, then half a cosine down to a tenth of the rate."""
    rising = max(1, int(steps * warm_up))

    def share(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.55 + 0.45 * math.cos(math.pi * (step - rising) / max(1, steps - rising))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)
