"""Masks of sparse weights in numpy, by another way than the package's: sorting, and norms in exact integers."""

import math

import numpy as np
import torch


def element_mask(matrix: np.ndarray, kept: int, of: int) -> np.ndarray:
    """N of M along the last dim of (rows, columns)."""
    groups = np.abs(matrix).reshape(-1, of)
    order = np.argsort(-groups, axis=1, kind="stable")
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[:, :kept], True, axis=1)
    return mask.reshape(matrix.shape)


def group_mask(matrix: np.ndarray, share: float) -> np.ndarray:
    """Whether each row of (rows, elements) is kept; norms are compared as integers of any length."""
    norms = [sum(int(math.ldexp(float(v), 149)) ** 2 for v in row) for row in matrix]
    order = sorted(range(len(norms)), key=lambda i: (-norms[i], i))
    mask = np.zeros(len(norms), bool)
    mask[order[: len(norms) - round(share * len(norms))]] = True
    return mask


def mask_of(w: torch.Tensor, sparsity: str, *, over_rows: bool = False) -> torch.Tensor:
    """bool, shape of a weight of two dims.

    Args:
        w: (out, in), or (in, out) where products sum over the rows.
        sparsity: ``"N:M"``, or ``"rows:SHARE"`` and ``"columns:SHARE"``.
        over_rows: products sum over the rows.
    """
    matrix = w.detach().float().numpy()
    matrix = matrix.T if over_rows else matrix
    kind, _, number = sparsity.partition(":")
    if kind.isdigit():
        mask = element_mask(np.ascontiguousarray(matrix), int(kind), int(number))
    elif kind == "rows":
        mask = np.repeat(group_mask(matrix, float(number))[:, None], matrix.shape[1], 1)
    else:
        mask = np.repeat(group_mask(matrix.T, float(number))[None], matrix.shape[0], 0)
    return torch.from_numpy((mask.T if over_rows else mask).copy())
