"""torch's multi-head attention, which Dynamo leaves as one operation, taken apart."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx
from torch.nn.functional import linear, multi_head_attention_forward

from gws_compile.torch_internals.graphs import example_value

from .building import Builder, Value
from .explicit import attend

_SIGNATURE = inspect.signature(multi_head_attention_forward)

_NOT_TAKEN_APART = ("bias_k", "bias_v", "add_zero_attn", "static_k", "static_v")


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of `torch.nn.functional.multi_head_attention_forward`, by name."""
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def why_not(node: fx.Node) -> str:
    """Why a call is not taken apart; empty where it is."""
    given = arguments_of(node)
    used = [name for name in _NOT_TAKEN_APART if given[name] not in (None, False)]
    if used:
        return f"multi-head attention with {', '.join(used)} is not taken apart"
    known = all(isinstance(example_value(given[name]), torch.Tensor) for name in ("query", "key", "value"))
    return "" if known else "the shapes of multi-head attention's inputs are not known"


def take_apart(build: Builder, node: fx.Node) -> tuple[Value, Value]:
    """Projections, attention, and the projection of what comes out, in place of a call.

    Args:
        build: writes the operations, and rounds what attention multiplies.
        node: the call.

    Returns:
        What the call returns: (tokens, batch, features), or without the batch; and the probabilities, or None.
    """
    given = arguments_of(node)
    example: torch.Tensor = example_value(given["query"])
    batched = example.ndim == 3
    q, k, v = _projected(build, given)
    of_query, of_key = example, example_value(given["key"])
    tokens, width = of_query.shape[0], of_query.shape[-1]
    batch = of_query.shape[1] if batched else 1
    keys, heads = of_key.shape[0], given["num_heads"]
    features = width // heads
    q = q.reshape(tokens, batch, heads, features).permute(1, 2, 0, 3)
    k = k.reshape(keys, batch, heads, features).permute(1, 2, 0, 3)
    v = v.reshape(keys, batch, heads, features).permute(1, 2, 0, 3)
    shape_q, shape_k = (batch, heads, tokens, features), (batch, heads, keys, features)
    mask = _mask(build, given, (batch, heads, tokens, keys))
    out, weights = attend(
        build,
        q,
        k,
        v,
        shapes=(shape_q, shape_k, shape_k),
        device_type=example.device.type,
        mask=mask,
        dropout=given["dropout_p"] if given["training"] else 0.0,
        probabilities=given["need_weights"],
    )
    out = out.permute(2, 0, 1, 3).reshape(tokens, batch, width)
    out = linear(out, build.given(given["out_proj_weight"]), build.given(given["out_proj_bias"]))
    if weights is not None and given["average_attn_weights"]:
        weights = weights.mean(1)
    if not batched:
        out = out.squeeze(1)
        weights = None if weights is None else weights.squeeze(0)
    return out, weights


def _projected(build: Builder, given: dict[str, Any]) -> tuple[Value, Value, Value]:
    """Queries, keys and values."""
    inputs = [given[name] for name in ("query", "key", "value")]
    bias = build.given(given["in_proj_bias"])
    if given["use_separate_proj_weight"]:
        weights = [build.given(given[name]) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    else:
        packed = build.given(given["in_proj_weight"])
        if inputs[0] is inputs[1] is inputs[2]:
            parts = linear(build.given(inputs[0]), packed, bias).chunk(3, dim=-1)
            return parts[0], parts[1], parts[2]
        weights = _thirds(packed)
    biases = (None, None, None) if bias is None else _thirds(bias)
    q, k, v = (linear(build.given(x), w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
    return q, k, v


def _thirds(value: Value) -> list[Value]:
    parts = value.chunk(3)
    return [parts[i] for i in range(3)]


def _mask(build: Builder, given: dict[str, Any], shape: tuple[Any, ...]) -> Value:
    """What is added to the scores, (batch or 1, heads or 1, queries or 1, keys); None for nothing."""
    batch, heads, tokens, keys = shape
    masks = []
    if given["attn_mask"] is not None:
        added = _added(build, given["attn_mask"])
        per_head = example_value(given["attn_mask"]).ndim == 3
        masks.append(added.reshape(batch, heads, tokens, keys) if per_head else added)
    if given["key_padding_mask"] is not None:
        masks.append(_added(build, given["key_padding_mask"]).reshape(batch, 1, 1, keys))
    return None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]


def _added(build: Builder, mask: fx.Node) -> Value:
    """A mask as numbers that are added: true stands for keys that are left out."""
    value = build.given(mask)
    if example_value(mask).dtype != torch.bool:
        return value
    zeros = torch.zeros_like(value, dtype=torch.float32)
    return zeros.masked_fill(value, float("-inf"))
