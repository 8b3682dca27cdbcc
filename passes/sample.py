"""Put ``gws::sample_weight`` between a weight and its reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gws_compile import torch_internals
from gws_compile.config import Config
from gws_compile.learned import WidthRule, parameter_shape
from gws_compile.sampling import OPERATOR_VERSION, matrix_shape
from gws_compile.sharding import ShardRange, from_local_like

from . import operations
from .computed import operand_placeholders
from .weights import Weight, weights_of

_LAYOUT = "gws_layout"


@dataclass(frozen=True)
class InputLayout:
    """The inputs that the rewritten graph takes behind its own.

    For each device: an int32 (2,) key of each weight and an int32 (3,) clock, in this order. Then the parameters of
    learned widths.

    Attributes:
        positions: per device, the input positions of the weights that the keys are of.
        names: per device, those weights' qualified names.
        trainable: input position, name and ``requires_grad`` of each rewritten weight, where noise depends on it.
        learned: the weights whose widths are inputs, in this order.
    """

    positions: dict[torch.device, tuple[int, ...]]
    names: dict[torch.device, tuple[str, ...]]
    trainable: tuple[tuple[int, str, bool], ...]
    learned: tuple[LearnedInput, ...]


@dataclass(frozen=True)
class LearnedInput:
    """A weight whose bit widths the graph takes as an input.

    Attributes:
        position: input position of the weight.
        name: its qualified name.
        batch_dims: see `gws_compile.sampling.matrix_shape`.
        shard: the part that this rank holds, where the weight is a DTensor.
    """

    position: int
    name: str
    batch_dims: int
    shard: ShardRange | None


def input_layout(gm: fx.GraphModule) -> InputLayout:
    """The added inputs of a graph that `sample_weights` has rewritten."""
    layout: InputLayout = gm.meta[_LAYOUT]
    return layout


def sample_weights(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Config) -> fx.GraphModule:
    """Rewrite every selected weight.

    Before::

        linear(x, weight, bias)

    After::

        sample_weight = gws.sample_weight(weight, gws_key_0, gws_clock, 0, ...)
        linear(x, sample_weight, bias)

    A weight of which each rank holds a part (DTensor) is sampled part by part, at its place in the whole weight::

        sample_weight = gws.sample_weight(weight.to_local(), gws_key_0, gws_clock, 0, ..., whole, offset, ...)
        linear(x, from_local_like(sample_weight, weight), bias)

    One sample serves all reads of a weight in a graph; a read inside an activation checkpoint is sampled in the
    checkpoint's body, which is computed again in backward and so keeps nothing. Frozen weights, and all weights while
    gradients are disabled, are cast without noise. Other uses of the weight keep reading the weight itself.

    With learned widths their parameters are inputs too, also of graphs without noise, whose cast depends on them.

    Requires `weights_of(gm)` with the reasons set. Provides `input_layout(gm)`: keys, clock and widths are new inputs.

    Args:
        gm: a copy of Dynamo's graph; changed in place, checkpoint bodies are copied first.
        example_inputs: unused.
        config: format, noise, block and scale become the operator's arguments.
    """
    chosen = [w for w in weights_of(gm) if w.reason is None]
    noisy = [w for w in chosen if is_noisy(w, config)]
    devices = list(dict.fromkeys(w.device for w in noisy))
    keys: dict[int, fx.Node] = {}
    clocks: dict[torch.device, fx.Node] = {}
    positions, names = {}, {}
    for i, device in enumerate(devices):
        members = [w for w in noisy if w.device == device]
        positions[device] = tuple(w.position for w in members)
        names[device] = tuple(w.name for w in members)
        suffix = f"_{i}" if len(devices) > 1 else ""
        example = torch_internals.example_value(members[0].node)
        for weight in members:
            key = torch_internals.fake_like(torch.zeros(2, dtype=torch.int32, device=device), example)
            keys[weight.position] = torch_internals.add_placeholder(gm.graph, f"gws_key_{len(keys)}", key)
        clock = torch_internals.fake_like(torch.zeros(3, dtype=torch.int32, device=device), example)
        clocks[device] = torch_internals.add_placeholder(gm.graph, f"gws_clock{suffix}", clock)
    learned = [w for w in chosen if config.learned is not None and w.trainable]
    bits = {w.position: _add_widths(gm, w, i, config) for i, w in enumerate(learned)}
    transforms = _Transforms()
    for weight in chosen:
        key = keys.get(weight.position)
        clock_node = None if key is None else clocks[weight.device]
        inputs = _Inputs(key, clock_node, bits.get(weight.position))
        _Rewriter(weight, config, transforms).rewrite(gm, weight.node, inputs)
    for module in [gm, *gm.children()]:
        if isinstance(module, fx.GraphModule):
            module.graph.lint()
            module.recompile()
    training = config.noise != "none" and torch.is_grad_enabled()
    trainable = tuple((w.position, w.name, w.trainable) for w in chosen) if training else ()
    widths = tuple(LearnedInput(w.position, w.name, w.reads[0].batch_dims, w.shard) for w in learned)
    gm.meta[_LAYOUT] = InputLayout(positions, names, trainable, widths)
    return gm


def _add_widths(gm: fx.GraphModule, weight: Weight, number: int, config: Config) -> fx.Node:
    assert config.learned is not None
    local = weight.shape if weight.shard is None else weight.shard.local
    shape = parameter_shape(*matrix_shape(local, weight.reads[0].batch_dims), config.block, config.learned.granularity)
    parameter = torch.ones(shape, device=weight.device, requires_grad=True)
    example = torch_internals.example_value(weight.node)
    return torch_internals.add_placeholder(
        gm.graph, f"gws_bits_{number}", torch_internals.fake_like(parameter, example)
    )


def is_noisy(weight: Weight, config: Config) -> bool:
    """Whether a rewritten weight gets noise in this graph, not the cast alone."""
    return config.noise != "none" and weight.trainable and torch.is_grad_enabled()


@dataclass(frozen=True)
class _Inputs:
    """The nodes of a weight's inputs, in the graph that is being rewritten."""

    key: fx.Node | None
    clock: fx.Node | None
    bits: fx.Node | None


class _Transforms:
    """Where transforms of torch.func (vmap, grad) are at work in the graphs that are rewritten.

    What is sampled inside belongs to the transform, which then refuses to map over it or to differentiate by it.
    """

    def __init__(self) -> None:
        self._spans: dict[fx.Graph, list[tuple[fx.Node, fx.Node]]] = {}

    def outside(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """The node, or the begin of the outermost transform that it stands in."""
        if graph not in self._spans:
            self._spans[graph] = list(_outermost_transforms(graph))
        return next((begin for begin, end in self._spans[graph] if begin < node < end), node)


def _outermost_transforms(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    begins: list[fx.Node] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = operations.name_of(node)
        if name in operations.TRANSFORM_BEGINS:
            begins.append(node)
        elif name in operations.TRANSFORM_ENDS:
            begin = begins.pop()
            if not begins:
                yield begin, node


class _Rewriter:
    """Rewrites one weight in a graph and in the checkpoint bodies that the graph hands it to."""

    def __init__(self, weight: Weight, config: Config, transforms: _Transforms) -> None:
        self._transforms = transforms
        self._weight = weight
        self._config = config

    def rewrite(self, gm: fx.GraphModule, node: fx.Node, inputs: _Inputs) -> None:
        """Sample the value in ``node``, the weight in ``gm``, for all of its reads there."""
        readers = [user for user in node.users if self._leads_to_read(gm, user, node)]
        bodies = [user for user in readers if torch_internals.checkpoint_body(user) is not None]
        for user in bodies:
            self._rewrite_body(gm, user, node, inputs)
        readers = [user for user in readers if user not in bodies]
        if not readers:
            return
        read = self._weight.reads[0]
        config = self._config
        shard = self._weight.shard
        with gm.graph.inserting_before(self._transforms.outside(gm.graph, min(readers))):
            held = node if shard is None else gm.graph.call_method("to_local", (node,))
            sampled = gm.graph.create_node(
                "call_function",
                torch.ops.gws.sample_weight.default,
                (
                    held,
                    inputs.key,
                    inputs.clock,
                    read.batch_dims,
                    config.fmt.spec,
                    config.bits,
                    config.noise if inputs.key is not None else "none",
                    list(config.block),
                    config.scale or "",
                    inputs.bits,
                    WidthRule.of(config.learned).spec if inputs.bits is not None and config.learned else "",
                    [] if shard is None else list(shard.whole),
                    [] if shard is None else list(shard.offset),
                    None,
                    config.backward == "save",
                    OPERATOR_VERSION,
                ),
                name="sample_weight",
            )
            used = sampled
            if shard is not None:
                used = gm.graph.call_function(from_local_like, (sampled, node))
        value = torch_internals.example_value(node)
        local = value if shard is None else torch_internals.local_example(value)
        for made, example in ((held, local), (sampled, local), (used, value)):
            if made is not node:
                made.meta.update(
                    {k: v for k, v in min(readers).meta.items() if k in ("stack_trace", "nn_module_stack")}
                )
                made.meta["example_value"] = example
        sampled.meta["gws_weight"] = self._weight
        for user in readers:
            self._redirect(gm, user, node, used)

    def _redirect(self, gm: fx.GraphModule, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Have ``user`` take ``new`` for ``old``; where it also serves other uses, a copy of it does."""
        if operations.is_read(user, old) or self._leads_only_to_reads(gm, user, old):
            user.replace_input_with(old, new)
            return
        with gm.graph.inserting_after(user):
            copied = gm.graph.node_copy(user, lambda n: new if n is old else n)
        for further in list(user.users):
            if self._leads_to_read(gm, further, user):
                self._redirect(gm, further, user, copied)

    def _leads_to_read(self, gm: fx.GraphModule, node: fx.Node, operand: fx.Node) -> bool:
        body = torch_internals.checkpoint_body(node)
        if body is not None:
            inner = getattr(gm, str(body.target))
            return any(
                self._leads_to_read(inner, user, placeholder)
                for placeholder in operand_placeholders(inner, node, operand)
                for user in placeholder.users
            )
        if operations.is_read(node, operand):
            return True
        return operations.is_transparent(node, operand) and any(
            self._leads_to_read(gm, user, node) for user in node.users
        )

    def _leads_only_to_reads(self, gm: fx.GraphModule, node: fx.Node, operand: fx.Node) -> bool:
        if operations.is_read(node, operand) or operations.is_metadata(node, operand):
            return True
        if torch_internals.checkpoint_body(node) is not None:
            return True  # a view made outside: the body gets the sampled value whatever it does with it
        return operations.is_transparent(node, operand) and all(
            self._leads_only_to_reads(gm, user, node) for user in node.users
        )

    def _rewrite_body(self, gm: fx.GraphModule, node: fx.Node, operand: fx.Node, inputs: _Inputs) -> None:
        body = torch_internals.checkpoint_body(node)
        assert body is not None
        inner = getattr(gm, str(body.target))
        if not inner.meta.get("gws_copied"):
            inner = torch_internals.copy_graph_module(inner)
            inner.meta["gws_copied"] = True
            setattr(gm, str(body.target), inner)
        inside = _Inputs(*(_as_operand(inner, node, extra) for extra in (inputs.key, inputs.clock, inputs.bits)))
        for placeholder in operand_placeholders(inner, node, operand):
            self.rewrite(inner, placeholder, inside)


def _as_operand(inner: fx.GraphModule, node: fx.Node, extra: fx.Node | None) -> fx.Node | None:
    """The placeholder inside a body for an outer node, which becomes an operand of the checkpoint if it is none yet."""
    if extra is None:
        return None
    known = operand_placeholders(inner, node, extra)
    if known:
        return known[0]
    node.args = (*node.args, extra)
    return torch_internals.add_placeholder(inner.graph, extra.name, torch_internals.example_value(extra))
