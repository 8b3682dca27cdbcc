"""The operators' arguments by name: they are the schemas', and go to and from a graph's nodes unchanged."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from support.operator import CLOCK, KEY, arguments
from torch import fx

import gws_compile.ops.sample_weight  # noqa: F401  registers the operators
from gws_compile import LearnedBits
from gws_compile.numerics.formats import FloatFormat
from gws_compile.ops.sample_arguments import (
    OPERATOR_VERSION,
    BitsGradientArguments,
    HadamardArguments,
    MaximumArguments,
    RoundArguments,
    SampleArguments,
)

RULE = LearnedBits().rule


def names(table):
    return [one.name for one in fields(table)]


@pytest.fixture
def node():
    """A call of the operator in a graph, as `insert_samples` writes it."""
    graph = fx.Graph()
    w, key, clock = map(graph.placeholder, ("w", "key", "clock"))
    given = SampleArguments(w, key, clock, *arguments(None)[3:])
    return graph.call_function(torch.ops.gws.sample_weight.default, given.call())


@pytest.mark.parametrize(
    ("table", "operator"),
    [
        (SampleArguments, torch.ops.gws.sample_weight.default),
        (RoundArguments, torch.ops.gws.round_operand.default),
        (HadamardArguments, torch.ops.gws.hadamard.default),
        (BitsGradientArguments, torch.ops.gws.bits_gradient.default),
        (MaximumArguments, torch.ops.gws.weight_maximum.default),
    ],
)
def test_the_tables_are_the_schemas(table, operator):
    assert names(table) == [one.name for one in operator._schema.arguments]


def test_a_call_has_the_version_of_the_arithmetic():
    given = SampleArguments(*arguments(torch.ones(2, 2))[:-1])
    assert given.version == OPERATOR_VERSION
    given.check_version()
    with pytest.raises(RuntimeError, match=rf"is at version {OPERATOR_VERSION}, the graph was made for 0$"):
        replace(given, version=0).check_version()


def test_of_and_call_are_inverse(node):
    given = SampleArguments.of(node)
    assert given.call() == node.args
    assert (given.w.name, given.fmt, given.bits, given.out_dtype, given.keep) == ("w", "e4m3", 5.0, None, True)


def test_of_takes_arguments_by_keyword(node):
    expected = SampleArguments.of(node)
    node.args, node.kwargs = node.args[:4], dict(zip(names(SampleArguments)[4:], node.args[4:], strict=True))
    assert SampleArguments.of(node) == expected


def test_write_changes_what_it_is_told_and_nothing_else(node):
    given = SampleArguments.of(node)
    node.args, node.kwargs = node.args[:-1], {"version": OPERATOR_VERSION}
    SampleArguments.of(node).write(node, out_dtype=torch.bfloat16, keep=False)
    assert not node.kwargs
    assert SampleArguments.of(node) == replace(given, out_dtype=torch.bfloat16, keep=False)
    assert {user for one in (given.w, given.key, given.clock) for user in one.users} == {node}
    node.graph.output(node)
    node.graph.lint()


def test_a_written_call_is_the_operators():
    """The arguments of a table, by position, are taken by the operator itself."""
    w = torch.randn(40, 50)
    given = SampleArguments(*arguments(w))
    by_name = torch.ops.gws.sample_weight.default(**dict(zip(names(SampleArguments), given.call(), strict=True)))
    assert torch.equal(torch.ops.gws.sample_weight.default(*given.call()), by_name)
    converted = torch.ops.gws.sample_weight.default(*replace(given, out_dtype=torch.bfloat16).call())
    assert torch.equal(converted, by_name.bfloat16())


def test_gradients_stand_where_their_arguments_do():
    of_w, of_learned = torch.ones(2), torch.zeros(3)
    gradients = SampleArguments.gradients(w=of_w, learned=of_learned)
    placed = dict(zip(names(SampleArguments), gradients, strict=True))
    assert placed.pop("w") is of_w
    assert placed.pop("learned") is of_learned
    assert set(placed.values()) == {None}


@pytest.mark.parametrize("name", names(SampleArguments))
def test_needs_gradient_asks_for_the_named_one(name):
    ctx = SimpleNamespace(needs_input_grad=tuple(one == name for one in names(SampleArguments)))
    assert [one for one in names(SampleArguments) if SampleArguments.needs_gradient(ctx, one)] == [name]


def test_the_gradient_of_learned_widths_has_the_samples_arguments():
    w, grad, learned = torch.ones(4, 4), torch.zeros(4, 4), torch.ones(1, 1)
    sampled = SampleArguments(*arguments(w, noise="uniform", block=(2, 4), learned=learned, rule=RULE.spec))
    sampled = replace(sampled, whole=[8, 4], offset=[4, 0])
    behind = BitsGradientArguments.behind(sampled, grad)
    assert behind.grad is grad
    assert all(getattr(behind, name) is getattr(sampled, name) for name in names(BitsGradientArguments)[1:])
    assert (behind.w is w, behind.key is KEY, behind.clock is CLOCK, behind.learned is learned) == (True,) * 4
    assert (behind.spec.noise, behind.spec.rule) == ("uniform", RULE)


def test_what_the_arguments_say_of_the_sample():
    fixed = SampleArguments(*arguments(torch.ones(2, 2), fmt="e3m2", bits=4.0, noise="uniform", scale=""))
    spec = fixed.spec(torch.bfloat16)
    assert (spec.fmt, spec.noise, spec.bits, spec.dtype) == (FloatFormat.parse("e3m2"), "uniform", 4.0, torch.bfloat16)
    assert (spec.scale, spec.rule, fixed.part) == (None, None, ([], []))
    learned = replace(fixed, scale="ceil", learned=torch.ones(1, 1), rule=RULE.spec).spec(torch.float32)
    assert (learned.scale, learned.rule) == ("ceil", RULE)
