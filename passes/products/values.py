"""What a value in AOTAutograd's graph was before it was rearranged, converted, or scaled by a number."""

from __future__ import annotations

import torch
from torch import fx

from gws_compile.torch_internals.graphs import fake_value

from .matrix_products import name_of

VIEWS = frozenset(
    "view _unsafe_view reshape permute t transpose expand unsqueeze squeeze slice select getitem split "
    "split_with_sizes unsafe_split unbind alias detach clone _to_copy convert_element_type contiguous "
    "lift_fresh_copy view_as index index_select wait_tensor all_gather_into_tensor "
    "all_gather_into_tensor_coalesced apply_mask".split()
)
"""What a value goes through as it is, rearranged, in part, or in another dtype: it is the first argument."""

JOINS = frozenset(("cat", "stack"))
"""What several values go through; they are the first argument."""


def handed_on(node: fx.Node) -> fx.Node | None:
    """The value that an operation hands on, in another form or scaled by one number; None where it makes a new one."""
    name, args = name_of(node), node.args
    if name in VIEWS:
        return args[0] if args and isinstance(args[0], fx.Node) else None
    if name not in ("mul", "div") or len(args) != 2:
        return None
    first, other = args
    if name == "mul" and _is_number(first):
        first, other = other, first
    return first if isinstance(first, fx.Node) and _is_number(other) and not _is_number(first) else None


def _is_number(value: object) -> bool:
    if isinstance(value, fx.Node):
        fake = fake_value(value)
        return isinstance(fake, torch.Tensor) and all(isinstance(n, int) and n == 1 for n in fake.shape)
    return isinstance(value, (int, float))
