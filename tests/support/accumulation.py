"""Training with gradients accumulated over micro-batches."""

import torch


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
