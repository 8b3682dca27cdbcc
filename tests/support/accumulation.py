"""A small model, and its training with gradients accumulated over micro-batches."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(40, 72), nn.Linear(72, 40)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def loss_of(call, x):
    return call(x).square().mean()


def train(call, model, micro_batches):
    """SGD with gradients accumulated over the micro-batches; the mean loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batches in micro_batches:
        total = 0.0
        for x in batches:
            loss = loss_of(call, x)
            (loss / len(batches)).backward()
            total += loss.item() / len(batches)
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses
