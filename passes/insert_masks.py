"""Have what a sparse weight does not keep be zero: in front of its samples, and behind them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from gws_compile.ops.masks import VERSION, WeightMask
from gws_compile.ops.sample_arguments import SampleArguments
from gws_compile.torch_internals.graphs import example_value

from .clocks import Clocks
from .rewrite_context import Rewrite, Sample

_CARRIED = ("stack_trace", "nn_module_stack")


def insert_masks(rewrite: Rewrite) -> None:
    """Mask the samples of sparse weights.

    Before::

        sample_weight = gws.sample_weight(weight, gws_key_0, gws_clock, ...)
        linear(x, sample_weight, bias)

    After::

        detach = weight.detach()
        weight_mask = gws.element_mask(detach, 0, False, 2, 4, ...)
        kept_weight = gws.apply_mask(detach, weight_mask, None, ...)
        sample_weight = gws.sample_weight(kept_weight, gws_key_0, gws_clock, ...)
        kept_sample = gws.apply_mask(sample_weight, weight_mask, weight, ...)
        linear(x, kept_sample, bias)

    So maxima and scales are those of what is kept, what is not kept is exactly zero whatever its noise, and the
    gradient of the sample goes to the whole weight, as that of a dense one does. All samples of a weight in one graph,
    or in a checkpoint's body, share the mask. Whole rows or columns have a ``group_mask``, which takes the clock where
    their share changes over draws.

    Of a weight of which each rank holds a part (DTensor) the part is masked; `select_weights` has seen to it that no
    group lies on several ranks.

    Requires the samples of `insert_samples`, with the dtypes of `fold_casts`.

    Args:
        rewrite: the graph; changed in place, and its checkpoint bodies. `Sample.masks` are the new nodes.
    """
    inserter = _Inserter(rewrite)
    rewrite.samples = [
        sample if sample.weight.mask is None else inserter.masked(sample, sample.weight.mask)
        for sample in rewrite.samples
    ]


class _Inserter:
    """Puts the nodes of the masks into a graph, and into the bodies of its checkpoints."""

    def __init__(self, rewrite: Rewrite) -> None:
        self._clocks = Clocks(rewrite)
        self._made: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def masked(self, sample: Sample, mask: WeightMask) -> Sample:
        """Mask one sample."""
        graph, node = sample.module.graph, sample.node
        given = SampleArguments.of(node)
        in_front = self._in_front(sample, mask, given.w)
        *_, mask_node, kept = in_front
        with graph.inserting_after(node):
            behind = _call(graph, node, _APPLY, (node, mask_node, given.w, VERSION), "kept_sample")
        behind.meta["example_value"] = example_value(node)
        node.replace_all_uses_with(behind, delete_user_cb=lambda user: user is not behind)
        given.write(node, w=kept)
        return replace(sample, masks=(*in_front, behind))

    def _in_front(self, sample: Sample, mask: WeightMask, held: fx.Node) -> tuple[fx.Node, ...]:
        """The weight without its gradient, its mask, and what is kept of it: one for all samples in a graph."""
        graph, node, value = sample.module.graph, sample.node, example_value(held)
        known = self._made.get(held)
        if known is not None and known[-1] < node:
            return known
        clock = self._clocks.in_front_of(sample.module, node, value) if mask.gradual else None
        with graph.inserting_before(node), torch.no_grad():
            detached = _carrying(graph.call_method("detach", (held,)), node)
            target, args = mask.call(detached, clock)
            found = _call(graph, node, target, args, "weight_mask")
            kept = _call(graph, node, _APPLY, (detached, found, None, VERSION), "kept_weight")
            detached.meta["example_value"] = kept.meta["example_value"] = value.detach()
            found.meta["example_value"] = mask.example(value)
        self._made[held] = (detached, found, kept)
        return self._made[held]


_APPLY = torch.ops.gws.apply_mask.default


def _call(graph: fx.Graph, like: fx.Node, target: Any, args: tuple[Any, ...], name: str) -> fx.Node:
    return _carrying(graph.create_node("call_function", target, args, name=name), like)


def _carrying(node: fx.Node, like: fx.Node) -> fx.Node:
    """A node with the place in the code of another."""
    node.meta.update({key: value for key, value in like.meta.items() if key in _CARRIED})
    return node
