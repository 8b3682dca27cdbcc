"""What the passes hand to one another: `Rewrite`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import fx

from .bodies import copy_with_bodies
from .graph_walk import Step
from .input_layout import InputLayout
from .weights import Weight


@dataclass(frozen=True)
class Sample:
    """A sample of a weight that a graph, or a checkpoint's body, takes.

    Attributes:
        weight: what is sampled.
        module: the graph, or body, that it stands in.
        node: the operator's node.
        steps: the uses of the sample.
        masks: what `insert_masks` has put in front of the node, and behind it; nothing for a dense weight.
    """

    weight: Weight
    module: fx.GraphModule
    node: fx.Node
    steps: tuple[Step, ...]
    masks: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class PassRun:
    """One pass that has run on a graph.

    Attributes:
        name: of the pass.
        seconds: how long it took.
        nodes: how many more there are behind it, bodies of checkpoints included.
        left_out: it was left out, by `gws_compile.passes.SKIP_VARIABLE`.
    """

    name: str
    seconds: float
    nodes: int
    left_out: bool = False

    def __str__(self) -> str:
        if self.left_out:
            return f"pass {self.name}: left out"
        return f"pass {self.name}: {1000 * self.seconds:.2f} ms, {self.nodes:+d} nodes"


@dataclass(frozen=True)
class AttentionUse:
    """Attention in a graph, or in a checkpoint's body.

    Attributes:
        op: the operation; ``"softmax"`` for what a model writes out.
        location: ``file:line`` of the user's code.
        rounded: how its operands are rounded, in words; empty where they are not.
        reason: why they are not.
    """

    op: str
    location: str
    rounded: str
    reason: str


@dataclass
class Rewrite:
    """A graph on its way through the passes, with what they have found and done.

    Attributes:
        module: a copy of Dynamo's graph, bodies of checkpoints included, which the passes change in place.
        gradients: whether it was traced with gradients enabled.
        weights: of `find_reads`.
        layout: the inputs that `insert_samples` has added.
        samples: those that it has inserted.
        attention: what `round_attention` has found.
        runs: the passes so far.
    """

    module: fx.GraphModule
    gradients: bool
    weights: list[Weight] = field(default_factory=list)
    layout: InputLayout = field(default_factory=InputLayout)
    samples: list[Sample] = field(default_factory=list)
    attention: list[AttentionUse] = field(default_factory=list)
    runs: list[PassRun] = field(default_factory=list)

    def add_clock(self, device: torch.device) -> None:
        """Note a clock that is the last input but the widths."""
        layout = self.layout
        self.layout = replace(
            layout,
            positions={**layout.positions, device: ()},
            names={**layout.names, device: ()},
            training=layout.training or self.gradients,
        )

    @staticmethod
    def of(gm: fx.GraphModule) -> Rewrite:
        """Begin with a copy of a graph that is being traced; the graph stays as it is."""
        return Rewrite(copy_with_bodies(gm), torch.is_grad_enabled())

    @property
    def selected(self) -> list[Weight]:
        """The weights that are to be rewritten."""
        return [weight for weight in self.weights if weight.reason is None]
