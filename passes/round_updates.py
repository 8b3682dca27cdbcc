"""Compute an optimizer's update in float32 where its tensors are stored in 16 bits, and round what it writes by chance.

``torch.compile(optimizer.step)`` is a graph that reads gradients, and reads and writes parameters and the optimizer's
state. In bfloat16 each of its operations rounds, and an update below half a step of a value is lost.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from gws_compile.numerics.formats import FloatFormat
from gws_compile.numerics.keys import key_words
from gws_compile.numerics.shards import from_local_like
from gws_compile.numerics.spec import CLOCK_WORDS
from gws_compile.ops.sample_arguments import RoundArguments
from gws_compile.torch_internals.distributed import is_sharded, local_example, shard_range
from gws_compile.torch_internals.fake_tensors import fake_like
from gws_compile.torch_internals.graphs import add_placeholder, example_value, placeholder_source

from .bodies import copy_with_bodies

GRIDS = {
    torch.bfloat16: FloatFormat.make(8, 7).spec,
    torch.float16: FloatFormat.make(5, 10, max=65504.0).spec,
}
"""What 16-bit dtypes hold, as element formats."""

_OF_OPTIMIZERS = "param_groups"


@dataclass(frozen=True)
class RoundedUpdate:
    """An optimizer's graph, rewritten.

    Attributes:
        module: the graph.
        written: how many tensors of 16 bits it writes.
        devices: for each of them a key and a clock are further inputs, in this order.
    """

    module: fx.GraphModule
    written: int
    devices: tuple[torch.device, ...]


def parameters_of_update(gm: fx.GraphModule) -> list[torch.Tensor]:
    """The parameters that a graph takes from an optimizer; none for any graph but that of an optimizer's step.

    Args:
        gm: Dynamo's graph, in which an optimizer's tensors are attributes.
    """
    nodes = (node for node in gm.graph.find_nodes(op="get_attr") if _OF_OPTIMIZERS in str(node.target))
    values = (_attribute(gm, node) for node in nodes)
    return [value for value in values if isinstance(value, torch.nn.Parameter)]


def round_updates(gm: fx.GraphModule) -> RoundedUpdate:
    """Rewrite the graph of an optimizer's step.

    Before::

        p = self.param_groups_0_params_0                   # bfloat16
        p.mul_(0.9999)
        p.addcdiv_(exp_avg, denominator, value=-0.001)

    After::

        p = self.param_groups_0_params_0
        wide = p.to(torch.float32)
        wide.mul_(0.9999)
        wide.addcdiv_(exp_avg_wide, denominator, value=-0.001)
        p.copy_(gws.round_operand(wide, key, clock, ..., 'e8m7', ..., 'stochastic', ...))

    Everything of 16 bits that comes in is widened, gradients and state too, so that each operation's operands are of
    one dtype; state that a step makes anew goes out rounded. What a step leaves as it was is written back as it was.

    Args:
        gm: Dynamo's graph; it stays as it is.
    """
    module = copy_with_bodies(gm)
    writer = _Writer(module)
    output = module.graph.output_node()
    narrow = [node for node in list(_inputs(module)) if _grid_of(node) is not None]
    for node in narrow:
        wide = _widened(module.graph, node)
        if not _is_gradient(node):
            with module.graph.inserting_before(output):
                module.graph.call_method("copy_", (node, writer.rounded(wide, node, _label(node))))
    for position, node in enumerate(dict.fromkeys(output.all_input_nodes)):
        if _grid_of(node) is not None and node not in narrow:
            with module.graph.inserting_before(output):
                narrowed = writer.rounded(node, node, f"output {position}")
                narrowed = module.graph.call_method("to", (narrowed, example_value(node).dtype))
            output.replace_input_with(node, narrowed)
    module.graph.lint()
    module.recompile()
    return RoundedUpdate(module, writer.written, writer.devices)


def _inputs(module: fx.GraphModule) -> Iterator[fx.Node]:
    first: dict[object, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op == "placeholder":
            yield node
        elif node.op == "get_attr" and isinstance(_attribute(module, node), torch.Tensor):
            if first.setdefault(node.target, node) is node:
                yield node
            else:  # one tensor, of which all uses see the same widened copy
                node.replace_all_uses_with(first[node.target])
                module.graph.erase_node(node)


def _attribute(module: fx.GraphModule, node: fx.Node) -> object:
    return operator.attrgetter(str(node.target))(module)


def _grid_of(node: fx.Node) -> str | None:
    value = example_value(node)
    return GRIDS.get(value.dtype) if isinstance(value, torch.Tensor) and value.numel() else None


def _is_gradient(node: fx.Node) -> bool:
    source = placeholder_source(node) if node.op == "placeholder" else None
    return source is not None and source.endswith(".grad")


def _label(node: fx.Node) -> str:
    return (placeholder_source(node) if node.op == "placeholder" else None) or str(node.target)


def _widened(graph: fx.Graph, node: fx.Node) -> fx.Node:
    users = list(node.users)
    with graph.inserting_after(node):
        wide = graph.call_method("to", (node, torch.float32))
    for user in users:
        user.replace_input_with(node, wide)
    return wide


class _Writer:
    """Rounds values of a graph, each with words of its own."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._graph = module.graph
        self._inputs: dict[torch.device, tuple[fx.Node, fx.Node]] = {}
        self.written = 0

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Those of a key and a clock each, which are inputs in this order."""
        return tuple(self._inputs)

    def rounded(self, value: fx.Node, like: fx.Node, label: str) -> fx.Node:
        """A float32 value rounded by chance to what the dtype of ``like`` holds: float32 on that grid.

        Of a DTensor each rank rounds its part, with words of the part's place in the whole.
        """
        example, graph, part = example_value(like), self._graph, None
        if is_sharded(example):
            part = shard_range(example)
            example, value = local_example(example), graph.call_method("to_local", (value,))
            label += "" if part is None else f" from {part[1]}"
        key, clock = self._inputs_on(example)
        self.written += 1
        row = graph.call_method("reshape", (value, 1, -1))
        given = RoundArguments(
            row,
            key,
            clock,
            batch_dims=0,
            fmt=GRIDS[example.dtype],
            block=[0, 0],
            scale="",
            rounding="stochastic",
            place=key_words(0, label)[0] & 0x3FFFFFFF,
            switch=0,
        )
        flat = graph.call_function(torch.ops.gws.round_operand.default, given.call())
        rounded = graph.call_method("reshape", (flat, tuple(example.shape)))
        return rounded if part is None else graph.call_function(from_local_like, (rounded, like))

    def _inputs_on(self, example: torch.Tensor) -> tuple[fx.Node, fx.Node]:
        if example.device not in self._inputs:
            number = len(self._inputs)
            self._inputs[example.device] = (
                self._input(f"gws_key_{number}", 2, example),
                self._input(f"gws_clock_{number}", CLOCK_WORDS, example),
            )
        return self._inputs[example.device]

    def _input(self, name: str, words: int, example: torch.Tensor) -> fx.Node:
        value = fake_like(torch.zeros(words, dtype=torch.int32, device=example.device), example)
        return add_placeholder(self._graph, name, value)
