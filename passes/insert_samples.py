"""Put ``gws::sample_weight`` between a weight and its reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from gws_compile.config import Config
from gws_compile.numerics.blocks import block_argument, block_counts, clamped, matrix_shape
from gws_compile.numerics.shards import ShardRange, from_local_like
from gws_compile.numerics.spec import CLOCK_WORDS
from gws_compile.numerics.widths import parameter_shape
from gws_compile.ops.sample_arguments import MaximumArguments, SampleArguments
from gws_compile.torch_internals.distributed import local_example, maximum_over_ranks
from gws_compile.torch_internals.fake_tensors import fake_like
from gws_compile.torch_internals.graphs import add_placeholder, example_value, set_gradients

from . import operations
from .bodies import as_operand
from .gradient_modes import gradient_modes
from .graph_walk import GRADIENTS, READS, End, Place, Step
from .input_layout import InputLayout, LearnedInput
from .insert_levels import add_levels, insert_cast
from .rewrite_context import Rewrite, Sample
from .weight_maxima import maxima_of, spread_dims
from .weights import Weight

_LEFT_OUT = "the pass insert_samples is left out"


def insert_samples(rewrite: Rewrite, *, config: Config) -> None:
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
    checkpoint's body, which is computed again in backward and so keeps nothing. Frozen weights are cast without noise,
    and so is what the reads take through which no gradient flows: a weight with reads of both kinds has two samples,
    each inserted where its reads stand, as what is made under ``no_grad`` has no gradient. Other uses of the weight
    keep reading the weight itself.

    Where its blocks are as long as the weight, or its scales have a level for all of it, the maxima are those over the
    ranks, computed in front of the sample::

        weight_maximum = gws.weight_maximum(weight.to_local(), 0, ...)
        sample_weight = gws.sample_weight(..., maximum_over_ranks(weight_maximum, weight, dims), ...)

    With learned widths their parameters are inputs too, also of graphs without noise, whose cast depends on them. So
    are levels that are trained, of weights that are cast to them instead: `insert_levels`.

    Requires the weights of `find_reads`, with what `select_weights` says of them. Provides `Rewrite.layout` (keys,
    clock and widths are new inputs) and `Rewrite.samples`.

    Args:
        rewrite: the graph; changed in place, and its checkpoint bodies.
        config: ``backward`` becomes an argument of the operator, as format, noise, block and scale of a weight do.
    """
    keyed = [weight for weight in rewrite.selected if weight.keyed]
    learned = [weight for weight in rewrite.selected if weight.sampled_as.learned is not None and weight.trainable]
    inserter = _Inserter(rewrite, config)
    leveled = [weight for weight in rewrite.selected if weight.sampled_as.levels is not None and weight.trainable]
    keys, clocks = _add_keys(rewrite.module, keyed)
    learned_inputs = {weight.position: _add_widths(rewrite.module, weight, i) for i, weight in enumerate(learned)}
    learned_inputs |= {weight.position: add_levels(rewrite.module, weight, i) for i, weight in enumerate(leveled)}
    for weight in rewrite.selected:
        clock = clocks[weight.device] if weight.keyed else None
        inputs = _Inputs(keys.get(weight.position), clock, learned_inputs.get(weight.position), weight.noisy)
        inserter.insert(weight, weight.place, inputs)
    inserter.drop_unused()
    rewrite.layout = _layout(rewrite, keyed, [*learned, *leveled])


def without_samples(rewrite: Rewrite) -> None:
    """Have every weight stand as one that is left alone, where the pass is left out."""
    for weight in rewrite.selected:
        weight.reason = _LEFT_OUT
        for read in weight.reads:
            read.noisy = False


def _layout(rewrite: Rewrite, keyed: list[Weight], learned: list[Weight]) -> InputLayout:
    by_device = {device: [w for w in keyed if w.device == device] for device in dict.fromkeys(w.device for w in keyed)}
    trained = [w for w in rewrite.selected if w.gradients and w.sampled_as.trains_otherwise]
    return InputLayout(
        positions={device: tuple(w.position for w in weights) for device, weights in by_device.items()},
        names={device: tuple(w.name for w in weights) for device, weights in by_device.items()},
        trainable=tuple((w.position, w.name, w.trainable) for w in trained),
        drawing=frozenset(w.position for w in keyed if w.draws),
        training=rewrite.gradients and bool(keyed),
        learned=tuple(
            LearnedInput(
                w.position, w.name, w.reads[0].batch_dims, w.sampled_as.block, w.shard, levels=w.sampled_as.levels
            )
            for w in learned
        ),
    )


def _add_keys(gm: fx.GraphModule, keyed: list[Weight]) -> tuple[dict[int, fx.Node], dict[torch.device, fx.Node]]:
    """Inputs for the keys, by the weights' positions, and for the clock of each device, behind its keys."""
    keys: dict[int, fx.Node] = {}
    clocks: dict[torch.device, fx.Node] = {}
    devices = list(dict.fromkeys(weight.device for weight in keyed))
    for i, device in enumerate(devices):
        members = [weight for weight in keyed if weight.device == device]
        suffix = f"_{i}" if len(devices) > 1 else ""
        example = example_value(members[0].node)
        for weight in members:
            key = fake_like(torch.zeros(2, dtype=torch.int32, device=device), example)
            keys[weight.position] = add_placeholder(gm.graph, f"gws_key_{len(keys)}", key)
        clock = fake_like(torch.zeros(CLOCK_WORDS, dtype=torch.int32, device=device), example)
        clocks[device] = add_placeholder(gm.graph, f"gws_clock{suffix}", clock)
    return keys, clocks


def _add_widths(gm: fx.GraphModule, weight: Weight, number: int) -> fx.Node:
    """An input for the width parameter of a weight."""
    settings, dims = weight.sampled_as, weight.reads[0].batch_dims
    assert settings.learned is not None
    local = weight.shape if weight.shard is None else weight.shard.local
    # Of a block that is longer than the weight, that of the whole weight says so.
    sides = clamped(
        settings.block, *matrix_shape(weight.shape if weight.shard is None else weight.shard.whole, dims)[1:]
    )
    shape = parameter_shape(*matrix_shape(local, dims), sides, settings.learned.granularity)
    parameter = torch.ones(shape, dtype=torch.float32, device=weight.device, requires_grad=True)
    return add_placeholder(gm.graph, f"gws_bits_{number}", fake_like(parameter, example_value(weight.node)))


@dataclass(frozen=True)
class _Inputs:
    """The nodes of a weight's inputs, in the graph that is being rewritten."""

    key: fx.Node | None
    clock: fx.Node | None
    learned: fx.Node | None
    noisy: bool

    def without_noise(self) -> _Inputs:
        """Those of the cast alone."""
        return replace(self, noisy=False)

    def inside(self, body: fx.GraphModule, call: fx.Node) -> _Inputs:
        """Those inside of a checkpoint's body."""
        key, clock, learned = (as_operand(body, call, given) for given in (self.key, self.clock, self.learned))
        return _Inputs(key, clock, learned, self.noisy)


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


class _Inserter:
    """Inserts the samples of weights, in a graph and in the checkpoint bodies that the graph hands them to."""

    def __init__(self, rewrite: Rewrite, config: Config) -> None:
        self._rewrite = rewrite
        self._config = config
        self._transforms = _Transforms()
        self._modes = gradient_modes(rewrite.module, rewrite.gradients)
        # Views that serve uses of several kinds -> for each kind of reads the copy that serves it; a view may hold
        # several weights.
        self._copies: dict[tuple[fx.Node, End], fx.Node] = {}

    def insert(self, weight: Weight, place: Place, inputs: _Inputs) -> None:
        """Sample the weight at a place where it stands, for all of its reads there."""
        for step in place.steps:
            if step.kind == "body" and step.leads_to_read:
                self._insert_in_body(weight, place, step, inputs)
        if not weight.trainable:  # nothing gets a gradient: one sample is as good as another
            self._insert_for(weight, place, READS, inputs)
            return
        self._insert_for(weight, place, GRADIENTS, inputs)
        self._insert_for(weight, place, READS - GRADIENTS, inputs.without_noise())

    def drop_unused(self) -> None:
        """Take out the views that have been copied for all of their uses."""
        for view in sorted({view for view, _ in self._copies}, reverse=True):
            if not view.users:
                view.graph.erase_node(view)

    def _insert_in_body(self, weight: Weight, place: Place, step: Step, inputs: _Inputs) -> None:
        if step.ends.isdisjoint(GRADIENTS):
            inputs = inputs.without_noise()
        body = step.places[0].module
        inside = inputs.inside(body, step.node)
        for onward in step.places:
            self.insert(weight, onward, inside)

    def _insert_for(self, weight: Weight, place: Place, wanted: frozenset[End], inputs: _Inputs) -> None:
        steps = [step for step in place.steps if step.kind != "body" and not step.ends.isdisjoint(wanted)]
        if not steps:
            return
        recorded = weight.trainable and any("recorded" in step.ends & wanted for step in steps)
        first = min(step.node for step in steps)
        sampled, used = self._sample(weight, place, first, inputs, recorded=recorded)
        served = tuple(one for step in steps for one in self._redirect(place.module, step, place.node, used, wanted))
        self._rewrite.samples.append(Sample(weight, place.module, sampled, served))

    def _sample(
        self, weight: Weight, place: Place, first: fx.Node, inputs: _Inputs, *, recorded: bool
    ) -> tuple[fx.Node, fx.Node]:
        """The sample's node, in front of ``first``, and the node that its reads take: another one for a DTensor."""
        node, graph, shard = place.node, place.module.graph, weight.shard
        where = self._transforms.outside(graph, first)
        # Reads that vmap runs with gradients, itself standing under no_grad.
        switched = recorded and not self._modes[where].enabled
        with graph.inserting_before(where):
            if switched:
                set_gradients(graph, True)
            held = node if shard is None else graph.call_method("to_local", (node,))
            maxima = None if shard is None else self._maxima(weight, shard, place, held)
            if weight.sampled_as.levels is None:
                sampled = graph.create_node(
                    "call_function",
                    torch.ops.gws.sample_weight.default,
                    self._arguments(weight, held, maxima, inputs).call(),
                    name="sample_weight",
                )
            else:
                sampled = insert_cast(graph, weight, held, inputs.learned, self._config)
            used = sampled if shard is None else graph.call_function(from_local_like, (sampled, node))
            if switched:
                set_gradients(graph, False)
        value = example_value(node)
        local = value if shard is None else local_example(value)
        for made, example in ((held, local), (sampled, local), (used, value)):
            if made is not node:
                made.meta.update({k: v for k, v in first.meta.items() if k in ("stack_trace", "nn_module_stack")})
                made.meta["example_value"] = example
        return sampled, used

    def _maxima(self, weight: Weight, shard: ShardRange, place: Place, held: fx.Node) -> fx.Node | None:
        """The maxima over the ranks that the sample of a shard needs; None where its own are enough.

        The ranks of a weight agree on whether there are any, as all of them have to compute them together.
        """
        settings, dims = weight.sampled_as, weight.reads[0].batch_dims
        block, finite = maxima_of(settings)
        spread = spread_dims(shard, dims, settings)
        if not spread:
            return None
        graph = place.module.graph
        given = MaximumArguments(held, dims, block_argument(block), finite)
        own = graph.create_node(
            "call_function", torch.ops.gws.weight_maximum.default, given.call(), name="weight_maximum"
        )
        found = graph.call_function(maximum_over_ranks, (own, place.node, spread))
        local = local_example(example_value(place.node))
        matrices, rows, cols = matrix_shape(shard.local, dims)
        example = local.new_zeros([matrices, *block_counts(block, rows, cols)], dtype=torch.int32)
        for made in (own, found):
            made.meta["example_value"] = example
        return found

    def _arguments(self, weight: Weight, held: fx.Node, maxima: fx.Node | None, inputs: _Inputs) -> SampleArguments:
        settings, shard, products = weight.sampled_as, weight.shard, weight.products
        learned = settings.learned if inputs.learned is not None else None
        keyed = inputs.noisy or (weight.trains and products.draws)
        return SampleArguments(
            w=held,
            key=inputs.key if keyed else None,
            clock=inputs.clock if keyed or products.scheduled else None,
            batch_dims=weight.reads[0].batch_dims,
            fmt=settings.fmt.spec,
            bits=None if settings.scheduled and inputs.noisy else settings.bits,
            noise=settings.noise if inputs.noisy else "none",
            block=block_argument(settings.block),
            scale=settings.scale or "",
            learned=inputs.learned,
            rule=learned.rule.spec if learned is not None else "",
            whole=[] if shard is None else list(shard.whole),
            offset=[] if shard is None else list(shard.offset),
            maxima=maxima,
            out_dtype=None,
            keep=self._config.backward == "save",
            switch=products.switch("forward"),
            products=replace(products, number=len(self._rewrite.samples)).spec,
        )

    def _redirect(
        self, module: fx.GraphModule, step: Step, old: fx.Node, new: fx.Node, wanted: frozenset[End]
    ) -> list[Step]:
        """Have a use take ``new`` for ``old`` as far as it ends as is wanted; where it also serves others, a copy does.

        Returns:
            The uses of ``new``.
        """
        copied = any((step.node, end) in self._copies for end in READS)
        # What a transform differentiates by is one value: everything inside is to see the same.
        whole = step.ends <= wanted or operations.is_differentiated_by(step.node)
        if not step.places or (whole and not copied):
            step.node.replace_input_with(old, new)
            return [step]
        if step.kind == "body":
            return [self._redirect_in_body(step, new, wanted)]
        (view,) = step.places
        return [self._redirect_copy(module, step, view, old, new, end) for end in sorted(step.ends & wanted)]

    def _redirect_copy(
        self, module: fx.GraphModule, step: Step, view: Place, old: fx.Node, new: fx.Node, end: End
    ) -> Step:
        copied = self._copies.get((step.node, end))
        if copied is not None:  # made for another weight in the same view
            copied.replace_input_with(old, new)
        else:
            with module.graph.inserting_after(step.node):
                copied = module.graph.node_copy(step.node, lambda node: new if node is old else node)
            self._copies[step.node, end] = copied
        served = self._redirect_further(step, view, copied, frozenset((end,)))
        return Step(copied, step.kind, (Place(module, copied, served),), step.mode)

    def _redirect_in_body(self, step: Step, new: fx.Node, wanted: frozenset[End]) -> Step:
        """Hand ``new`` to a checkpoint's body, as a further operand, for some of the uses inside."""
        places = []
        for place in step.places:
            inside = as_operand(place.module, step.node, new)
            assert inside is not None
            places.append(Place(place.module, inside, self._redirect_further(step, place, inside, wanted)))
        return Step(step.node, "body", tuple(places), step.mode)

    def _redirect_further(self, step: Step, place: Place, new: fx.Node, wanted: frozenset[End]) -> tuple[Step, ...]:
        """The same for the uses of what a use has made, as far as they end as is wanted of this one."""
        served: list[Step] = []
        for onward in place.steps:
            ends = frozenset(end for end in onward.ends if step.end_of(end) in wanted)
            if ends:
                served += self._redirect(place.module, onward, place.node, new, ends)
        return tuple(served)
