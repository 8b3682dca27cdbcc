"""Attention as a fused kernel computes it, in two products whose operands can be rounded."""

from __future__ import annotations

import math
from typing import Any

import torch

from .building import Builder, Value


def attend(
    build: Builder,
    q: Value,
    k: Value,
    v: Value,
    *,
    shapes: tuple[Any, Any, Any],
    device_type: str,
    mask: Value = None,
    bool_mask: bool = False,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
    probabilities: bool = False,
) -> tuple[Value, Value]:
    """``softmax(q k^T scale + mask) v``, with its operands rounded.

    The softmax is that of a fused kernel: ``p = exp(s - max s)`` is multiplied with the values, and what comes out is
    divided by the sum of p. All between the two products is float32. A query that no key is let through to gets zeros.

    Args:
        build: writes the operations, and says how operands are rounded.
        q, k, v: (..., tokens, features).
        shapes: theirs.
        device_type: of them.
        mask: added to the scores; or, with ``bool_mask``, true for the keys that are let through.
        dropout: probability of the probabilities' dropout.
        causal: a query sees the keys up to its own place.
        scale: of the scores; ``1 / sqrt(features)`` when None.
        grouped: keys and values have fewer heads, each for several of the queries' in turn.
        probabilities: they are asked for.

    Returns:
        (..., queries, features of v), in the dtype of v; and the probabilities, (..., queries, keys), as they would be
        without rounding, None where they are not asked for.
    """
    of_q, of_k, of_v = shapes
    if grouped and of_k[-3] != of_q[-3]:
        k = k.repeat_interleave(of_q[-3] // of_k[-3], -3)
    if grouped and of_v[-3] != of_q[-3]:
        v = v.repeat_interleave(of_q[-3] // of_v[-3], -3)
    settings, dims = build.settings, len(of_q) - 2
    q_rounded = build.round(settings.queries, q, dims, over_rows=False)
    k_rounded = build.round(settings.keys, k, len(of_k) - 2, over_rows=False)
    v_rounded = build.round(settings.values, v, len(of_v) - 2, over_rows=True)
    region = build.without_autocast(device_type)
    scores = torch.matmul(q_rounded.float(), k_rounded.float().transpose(-2, -1))
    scores = scores * (1 / math.sqrt(of_q[-1]) if scale is None else scale)
    if causal:
        queries, keys = q.size(-2), k.size(-2)
        seen = torch.arange(queries, device=q.device).unsqueeze(-1) >= torch.arange(keys, device=q.device)
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if bool_mask else scores + mask
    largest = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    p = (scores - largest).exp()
    total = p.sum(-1, keepdim=True)
    if dropout > 0.0:
        p = torch.nn.functional.dropout(p, dropout)
    p_rounded = build.round(settings.probabilities, p, max(dims, len(of_k) - 2), over_rows=False)
    out = torch.matmul(p_rounded, v_rounded.float()) / (total + (total == 0))
    out = out.to(v.dtype)
    weights = (p / (total + (total == 0))).to(v.dtype) if probabilities else None
    build.end(region)
    return out, weights
