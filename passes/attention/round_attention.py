"""Round what attention multiplies: queries, keys, values and probabilities."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from gws_compile.passes import operations
from gws_compile.passes.autocast import dtype_in, with_regions
from gws_compile.passes.bodies import graphs
from gws_compile.passes.clocks import Clocks
from gws_compile.passes.operands import operands
from gws_compile.passes.parameter_constants import parameters_alone
from gws_compile.passes.rewrite_context import AttentionUse, Rewrite
from torch import fx

from gws_compile.settings.attention import AttentionOperands
from gws_compile.settings.operands import SWITCHES
from gws_compile.torch_internals.graphs import example_value
from gws_compile.torch_internals.stack_trace import source_of

from . import by_hand, multi_head
from .building import Builder
from .explicit import attend

_FUSED = "scaled_dot_product_attention"
_MULTI_HEAD = "multi_head_attention_forward"


def round_attention(rewrite: Rewrite, *, attention: AttentionOperands | None, scheduled: bool) -> None:
    """Round the operands of attention's two products; the gradient goes straight through.

    Fused attention, and torch's multi-head attention, are replaced by the two products that they stand for, with the
    softmax between them (`gws_compile.passes.attention.explicit.attend`): a fused kernel shows its probabilities to
    nobody. In attention that a model writes out the operands are rounded as they come::

        softmax(matmul(q, k.mT) * s)             softmax(matmul(round_operand(q), round_operand(k.mT)) * s)

    Requires the samples of `insert_samples`, by which products of weights are told from attention. Provides
    `Rewrite.attention`.

    Args:
        rewrite: the graph; changed in place, and its checkpoint bodies.
        attention: how; None to leave attention alone.
        scheduled: a schedule has it in high precision at times.
    """
    if attention is None:
        return
    regions = dict(with_regions(rewrite.module))
    dtypes = {node: dtype_in(region, node) for node, region in regions.items()}
    constants = parameters_alone(rewrite.module)
    clocks = Clocks(rewrite) if scheduled else None
    for module in graphs(rewrite.module):
        rounder = _Rounder(rewrite, module, attention, clocks, dtypes)
        for found in list(by_hand.written_out(module.graph, constants)):
            rounder.by_hand(found)
        for node in list(module.graph.nodes):
            name = operations.name_of(node)
            if name == _FUSED:
                rounder.fused(node)
            elif name == _MULTI_HEAD:
                rounder.multi_head(node)
            elif name.startswith("flex_attention"):
                rounder.left(node, "flex_attention is not taken apart")


@dataclass(frozen=True)
class _Rounder:
    rewrite: Rewrite
    module: fx.GraphModule
    settings: AttentionOperands
    clocks: Clocks | None
    dtypes: dict[fx.Node, torch.dtype | None]

    def left(self, node: fx.Node, reason: str) -> None:
        """Note attention that stays as it is."""
        self._note(node, "", reason)

    def _done(self, node: fx.Node) -> None:
        self._note(node, self.settings.text, "")

    def _note(self, node: fx.Node, rounded: str, reason: str) -> None:
        self.rewrite.attention.append(AttentionUse(operations.name_of(node), source_of(node).place, rounded, reason))

    def _builder(self, node: fx.Node, example: torch.Tensor) -> Builder:
        clock = None if self.clocks is None else self.clocks.in_front_of(self.module, node, example)
        switch = 0 if clock is None else SWITCHES["attention"]
        return Builder(node, self.settings, clock, switch, self.dtypes.get(node))

    def fused(self, node: fx.Node) -> None:
        """Take fused attention apart."""
        given = {one.name: one.value for one in operands(node)}
        names = ("query", "key", "value")
        examples = [example_value(given[name]) for name in names]
        if not all(isinstance(one, torch.Tensor) for one in examples):
            self.left(node, "the shapes of its operands are not known")
            return
        q, k, v = examples
        if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            self.left(node, f"operands of {q.dtype} are not rounded")
            return
        with node.graph.inserting_before(node):
            build = self._builder(node, q)
            mask = given.get("attn_mask")
            of_mask = example_value(mask) if isinstance(mask, fx.Node) else None
            out, _ = attend(
                build,
                *(build.value(given[name]) for name in names),
                shapes=(tuple(q.shape), tuple(k.shape), tuple(v.shape)),
                device_type=q.device.type,
                mask=build.given(mask),
                bool_mask=of_mask is not None and of_mask.dtype == torch.bool,
                dropout=given.get("dropout_p", 0.0),
                causal=bool(given.get("is_causal", False)),
                scale=given.get("scale"),
                grouped=bool(given.get("enable_gqa", False)),
            )
            build.finish()
        self._done(node)
        out.node.meta["example_value"] = example_value(node)
        node.replace_all_uses_with(out.node)
        self.module.graph.erase_node(node)

    def multi_head(self, node: fx.Node) -> None:
        """Take multi-head attention apart."""
        reason = multi_head.why_not(node)
        if reason or any(user.target is not operator.getitem for user in node.users):
            self.left(node, reason or "its results are not taken apart")
            return
        with node.graph.inserting_before(node):
            build = self._builder(node, example_value(multi_head.arguments_of(node)["query"]))
            results = multi_head.take_apart(build, node)
            build.finish()
        self._done(node)
        for user in list(node.users):
            result = results[user.args[1]]  # type: ignore[index]
            if result is not None:
                user.replace_all_uses_with(result.node)
            self.module.graph.erase_node(user)
        self.module.graph.erase_node(node)

    def by_hand(self, found: by_hand.Attention | fx.Node) -> None:
        """Round the operands of attention that is written out."""
        if isinstance(found, fx.Node):
            self.left(found, "the products on both sides of this softmax are of a form that is not known")
            return
        operands_of = {
            found.queries: self.settings.queries,
            found.keys: self.settings.keys,
            found.probabilities: self.settings.probabilities,
            found.values: self.settings.values,
        }
        for one, operand in operands_of.items():
            if operand is not None and one.flattened and operand.sides[0] not in (1, None):
                self.left(found.softmax, f"blocks of {operand.sides} do not fit an einsum whose rows are several dims")
                return
        for one, operand in operands_of.items():
            value = example_value(one.value)
            if operand is None or not isinstance(value, torch.Tensor):
                continue
            with one.node.graph.inserting_before(one.node):
                build = self._builder(one.node, value)
                rounded = build.round(operand, build.value(one.value), one.batch_dims, over_rows=one.over_rows)
                build.finish()
            one.node.replace_input_with(one.value, rounded.node)
        self._done(found.softmax)
