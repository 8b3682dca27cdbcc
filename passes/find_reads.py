"""Find the weight reads: parameters that reach a matrix product or a convolution as an operand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx

from gws_compile.numerics.shards import ShardRange
from gws_compile.source_names import is_parameter
from gws_compile.torch_internals.distributed import shard_range
from gws_compile.torch_internals.fake_tensors import shares_storage
from gws_compile.torch_internals.graphs import example_value, is_higher_order, placeholder_source, tensor_subclass
from gws_compile.torch_internals.stack_trace import source_of
from gws_compile.weight_names import qualified_name

from . import operations
from .gradient_modes import Modes, gradient_modes
from .graph_walk import GRADIENTS, End, Place, Step, walk
from .parameter_constants import parameters_alone, reader_of
from .rewrite_context import Rewrite
from .summed_sides import read_sums_over_rows
from .weights import Read, Use, Weight


def find_reads(rewrite: Rewrite, *, names: Mapping[str, tuple[str, ...]], is_table: Callable[[Weight], bool]) -> None:
    """List the graph's floating-point and complex parameters of two or more dims, each with its uses.

    Provides `Rewrite.weights`; the graph is not changed. A parameter is followed through views, transposes, splits,
    look-ups by index, casts, concatenations and products with one number, and into the bodies of activation
    checkpoints, to whatever computes with it. Of each read it is said whether gradients flow through it.

    Args:
        rewrite: the graph.
        names: those of the graph's weights by their sources, as the modules that hold them have them; one that is not
            there has what its source says.
        is_table: whether an earlier graph looks rows up in a weight.
    """
    modes = gradient_modes(rewrite.module, rewrite.gradients)
    rewrite.weights = _parameters(rewrite.module, names, modes)
    constants = parameters_alone(rewrite.module)
    for weight in rewrite.weights:
        _note_uses(weight, weight.place, constants)
        weight.embedded |= is_table(weight)


def _parameters(gm: fx.GraphModule, names: Mapping[str, tuple[str, ...]], modes: Modes) -> list[Weight]:
    weights = []
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = example_value(node)
        source = placeholder_source(node)
        if not isinstance(value, torch.Tensor) or value.ndim < 2:
            continue
        if not (value.is_floating_point() or value.is_complex()):  # indices and codes are no weights
            continue
        if source is None or not (source in names or is_parameter(source) or _typed_parameter(node)):
            continue
        reason, shard = None, None
        try:
            held = shard_range(value)
            shard = None if held is None else ShardRange(tuple(value.shape), *held)
        except ValueError as error:
            reason = f"a DTensor with {error}: only Shard and Replicate are sampled"
        if shard is None and reason is None:
            reason = _of_class(tensor_subclass(node))
        weights.append(
            Weight(
                place=walk(gm, node, modes),
                position=position,
                source=source,
                names=names.get(source) or (qualified_name(source),),
                shape=tuple(value.shape),
                dtype=value.dtype,
                device=value.device,
                trainable=value.requires_grad,
                shard=shard,
                reason=reason,
            )
        )
    return weights


def _of_class(kind: type | None) -> str | None:
    return None if kind is None else f"of class {kind.__name__}: of tensor subclasses only DTensor is sampled"


def _typed_parameter(node: fx.Node) -> bool:
    return isinstance(node.type, type) and issubclass(node.type, torch.nn.Parameter)


def _note_uses(weight: Weight, place: Place, constants: set[fx.Node]) -> None:
    for way in _ways(place, None, 0):
        step, node, module = way.step, way.step.node, way.place.module
        if step.kind == "read" and not _computes(module, node, constants):
            op = operations.name_of(node)
            dims = way.batch_dims if op in operations.CONVOLUTIONS else len(weight.shape) - 2
            gradients = not way.ends.isdisjoint(GRADIENTS)
            over_rows = read_sums_over_rows(example_value(weight.node), dims, node, way.place.node)
            weight.reads.append(Read(node, op, dims, source_of(node).place, gradients, sums_over_rows=over_rows))
        elif step.kind == "in_place" or operations.is_in_place(node, way.place.node):  # a product may write it too
            _note_written(weight, way, constants)
        elif step.kind == "embedding":
            weight.embedded = True
        elif step.kind == "output":
            weight.other_uses.append(Use("the graph's output", "", "plain"))
        elif step.kind in ("read", "other"):
            weight.other_uses.append(_other_use(module, node, way.place.node, constants))


@dataclass(frozen=True)
class _Way:
    """A way of a weight's value to a use.

    Attributes:
        place: where the value stands in front of the use.
        step: the use.
        ends: what the use is to the weight, by all that lies between.
        copy: the first place on the way that has memory of its own; None for the weight's own.
        batch_dims: leading dims of the value at ``place`` that belong to vmap.
    """

    place: Place
    step: Step
    ends: frozenset[End]
    copy: Place | None
    batch_dims: int


def _ways(place: Place, copy: Place | None, batch_dims: int) -> Iterator[_Way]:
    for step in place.steps:
        if not step.places:
            yield _Way(place, step, step.ends, copy, batch_dims)
        dims = batch_dims + (operations.name_of(step.node) == "_add_batch_dim")
        for onward in step.places:
            shared = step.kind == "body" or shares_storage(example_value(place.node), example_value(onward.node))
            for way in _ways(onward, copy if copy is not None or shared else onward, dims):
                yield replace(way, ends=frozenset(map(step.end_of, way.ends)))


def _note_written(weight: Weight, way: _Way, constants: set[fx.Node]) -> None:
    """Write down what is written: the weight, or what was copied of it, which may be read afterwards."""
    if way.copy is None:
        weight.written = True
        return
    node = way.step.node
    read = next((onward.step.node for onward in _ways(way.copy, None, 0) if onward.step.kind == "read"), None)
    reader = (
        operations.name_of(read) if read is not None else reader_of(way.place.module, node, constants, anywhere=True)
    )
    weight.other_uses.append(Use(operations.name_of(node), source_of(node).place, "plain", reader))


def _computes(module: fx.GraphModule, node: fx.Node, constants: set[fx.Node]) -> bool:
    """Whether a matrix product makes a weight of parameters alone, such as the product of two adapters."""
    is_product = operations.name_of(node) in operations.PRODUCTS and node in constants
    return is_product and bool(reader_of(module, node, constants, anywhere=False))


def _other_use(module: fx.GraphModule, node: fx.Node, value: fx.Node, constants: set[fx.Node]) -> Use:
    name = operations.name_of(node)
    if name in operations.READS:
        reader = reader_of(module, node, constants, anywhere=False)
        return Use(name, source_of(node).place, "plain", reader, operations.operand_name(node, value))
    if operations.is_number_of(node, value):
        return Use(name, source_of(node).place, "plain")
    kind: Literal["plain", "nested", "storage", "unknown"] = "unknown"
    if is_higher_order(node):
        kind = "nested"
    elif operations.is_storage(node, value):
        kind = "storage"
    elif operations.is_known(node):
        kind = "plain"
    # What it writes the weight into may be read under that node's own name.
    made = [node, *filter(None, (operations.written_by(node),))]
    readers = (reader_of(module, one, constants, anywhere=True) for one in made)
    return Use(name, source_of(node).place, kind, next(filter(None, readers), ""))
