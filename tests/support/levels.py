"""The cast onto levels a second time: numpy, one block after the other, and the gradient of its levels in float64."""

import numpy as np
import torch
from torch import nn
from torch.func import functional_call


def parts_of(w, table, block=(32, 32), *, scaled=True, batch_dims=0):
    """Of a float32 weight: (matrices, rows, columns), and each element's scale."""
    matrices = w.detach().float().numpy().reshape(int(np.prod(w.shape[:batch_dims])), w.shape[batch_dims], -1)
    largest = np.float32(max(map(abs, table)))
    scales = np.ones_like(matrices)
    rows, cols = (side or size for side, size in zip(block, matrices.shape[1:], strict=True))
    for matrix in range(len(matrices) if scaled else 0):
        for i in range(0, matrices.shape[1], rows):
            for j in range(0, matrices.shape[2], cols):
                here = matrix, slice(i, i + rows), slice(j, j + cols)
                a = np.abs(matrices[here]).max()
                scale = np.float32(a) / largest if np.isfinite(a) else np.float32(np.nan)
                scales[here] = max(scale, np.float32(2.0**-126)) if np.isfinite(a) else scale
    return matrices, scales


def numbers_of(matrices, scales, levels):
    """The number of the nearest level, in the order in which they are given; the lower one where two are as near."""
    levels = np.asarray(levels, np.float32)
    order = np.argsort(levels, kind="stable")
    midpoints = (levels[order][:-1] + levels[order][1:]) * np.float32(0.5)
    with np.errstate(invalid="ignore"):
        x = matrices * (np.float32(1) / scales)
    return order[(x[..., None] > midpoints).sum(-1)]


def cast_oracle(w, levels, table, block=(32, 32), *, scaled=True, batch_dims=0):
    """``s * p[q(w / s)]``, shape and dtype of w."""
    matrices, scales = parts_of(w, table, block, scaled=scaled, batch_dims=batch_dims)
    levels = np.asarray(levels.detach(), np.float32)
    found = levels[numbers_of(matrices, scales, levels)] * scales
    found[~np.isfinite(matrices)] = np.nan
    return torch.from_numpy(found).view(w.shape).to(w.dtype)


def gradient_oracle(grad, w, levels, table, block=(32, 32), *, scaled=True, batch_dims=0):
    """``dL/dp_j``, float64."""
    matrices, scales = parts_of(w, table, block, scaled=scaled, batch_dims=batch_dims)
    numbers = numbers_of(matrices, scales, levels.detach())
    parts = scales.astype(np.float64) * grad.double().numpy().reshape(scales.shape)
    return torch.tensor([parts[numbers == j].sum() for j in range(len(levels))])


def eager_step(model: nn.Module, levels, tables, loss_of, *, block=(32, 32)):
    """Loss, and gradients of the unmodified model's parameters and of the levels, without a compiler.

    Args:
        model: is not changed.
        levels: by the weights' names.
        tables: by the weights' names.
        loss_of: gets a function that calls the model.
    """
    values = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name in levels:
            value = cast_oracle(value, levels[name], tables[name], block)
        values[name] = value.clone().requires_grad_()
    loss = loss_of(lambda *args: functional_call(model, values, args))
    loss.backward()
    parameters = dict(model.named_parameters())
    of_levels = {
        name: gradient_oracle(values[name].grad, parameters[name], levels[name], tables[name], block) for name in levels
    }
    return loss, {name: value.grad for name, value in values.items()}, of_levels
