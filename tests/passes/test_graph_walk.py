"""The way of a value through a graph, and what is done along it."""

import pytest
import torch
import torch.nn.functional as F
from gws_compile.passes import rewrite
from gws_compile.passes.bodies import body_of, copy_with_bodies, graphs, nodes
from gws_compile.passes.gradient_modes import gradient_modes
from gws_compile.passes.graph_walk import samples, walk
from gws_compile.passes.operations import name_of
from support.graphs import Reader, rewritten_graph, show
from torch import nn
from torch.utils.checkpoint import checkpoint

import gws_compile
from gws_compile.config import Config

X, W = torch.ones(2, 4), torch.ones(4, 4)


def checkpointed(use):
    return lambda x, w: checkpoint(lambda y: use(y, w), x, use_reentrant=False)


class Nested(nn.Module):
    """Reads in the graph, in a checkpoint's body and in a body inside of that one."""

    def __init__(self):
        super().__init__()
        self.outside, self.inside, self.innermost = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x):
        def inner(y):
            return self.innermost(y).relu()

        def outer(y):
            return self.inside(checkpoint(inner, y.sin(), use_reentrant=False)).tanh()

        return self.outside(checkpoint(outer, x, use_reentrant=False)).cos()


def look(model, at, *args):
    """What a function says of the graph that Dynamo makes of a call, while it is traced."""
    said = []

    def backend(gm, example_inputs):
        said.append(at(gm))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(*args)
    (answer,) = said
    return answer


def weight_of(gm):
    (node,) = (n for n in gm.graph.find_nodes(op="placeholder") if n.target.endswith("_weight_"))
    return node


def ways(place):
    """The ways from a place to the last uses, one a text."""
    found = []
    for step in place.steps:
        here = f"{step.kind} {name_of(step.node)}"
        onward = [way for reached in step.places for way in ways(reached)]
        found += [f"{here} > {way}" for way in onward] or [here]
    return sorted(found)


BODY = "body tag_activation_checkpoint"


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (F.linear, ["read linear"]),
        (lambda x, w: x @ w.t().contiguous(), ["view t > view contiguous > read matmul"]),
        (lambda x, w: x @ w @ w, ["read matmul", "read matmul"]),
        (lambda x, w: x @ torch.cat([w, w.sin()]).t(), ["other sin", "view cat > view t > read matmul"]),
        (lambda x, w: [F.linear(x, p) for p in w.chunk(2)], ["view chunk > view getitem > read linear"] * 2),
        # by keyword
        (lambda x, w: F.linear(x, weight=w), ["read linear"]),
        (lambda x, w: torch.matmul(x, other=w.t()), ["view t > read matmul"]),
        (lambda x, w: torch.addmm(torch.zeros(4), mat1=x, mat2=w), ["read addmm"]),
        (lambda x, w: torch.addmm(input=w[0], mat1=x, mat2=w), ["read addmm", "view getitem > other addmm"]),
        (lambda x, w: x @ (2 * w), ["scaled mul > read matmul"]),
        # to what is no read
        (lambda x, w: (x @ w, w.t()), ["read matmul", "view t > output output"]),
        (lambda x, w: x.type_as(w) @ w, ["metadata type_as", "read matmul"]),
        (lambda x, w: x @ torch.zeros_like(w.t()), ["view t > metadata zeros_like"]),
        (lambda x, w: F.embedding(x.long(), w), ["embedding embedding"]),
        (lambda x, w: w.t().square(), ["view t > other square"]),
        # into bodies, which go on from what stands for the value there
        (checkpointed(F.linear), [f"{BODY} > read linear"]),
        (checkpointed(lambda x, w: x @ w.t() + w.sum()), [f"{BODY} > other sum", f"{BODY} > view t > read matmul"]),
        (lambda x, w: checkpointed(F.linear)(x, w.t()), [f"view t > {BODY} > read linear"]),
        (checkpointed(checkpointed(F.linear)), [f"{BODY} > {BODY} > read linear"]),
        (
            lambda x, w: checkpointed(F.linear)(x, w) + checkpointed(F.linear)(x.sin(), w),
            [f"{BODY} > read linear", f"{BODY} > read linear"],
        ),
    ],
)
def test_ways(use, expected):
    assert look(Reader(W, use), lambda gm: ways(walk(gm, weight_of(gm))), X) == expected


def test_a_value_that_is_written():
    def use(x, w):
        with torch.no_grad():
            w.mul_(0.5)
        return x @ w

    assert look(Reader(W, use), lambda gm: ways(walk(gm, weight_of(gm))), X) == ["in_place mul_", "read matmul"]


def test_a_sample_is_gone_through():
    def at(gm):
        module = rewrite(gm, Config.make("fp8_e4m3")).module
        return ways(walk(module, weight_of(module)))

    model = Reader(W, lambda x, w: x @ w.t() + w.sum())
    assert look(model, at, X) == ["other sum", "sample sample_weight > view t > read matmul"]


def test_each_place_stands_in_its_graph():
    def at(gm):
        place = walk(gm, weight_of(gm))
        (body,) = (step for step in place.steps if step.kind == "body")
        (inside,) = body.places
        assert (place.module, place.node) == (gm, weight_of(gm))
        assert inside.module is body_of(gm, body.node) is not gm
        assert (inside.node.op, inside.node.graph) == ("placeholder", inside.module.graph)
        assert body_of(gm, inside.steps[0].node) is None

    look(Reader(W, checkpointed(F.linear)), at, X)


def without_gradients(use):
    def under_no_grad(x, w):
        with torch.no_grad():
            return use(x, w)

    return under_no_grad


@pytest.mark.parametrize(
    ("use", "ends"),
    [
        (lambda x, w: x @ w.t(), {"recorded"}),
        (lambda x, w: (lambda v: x.type_as(v) @ v)(w.t()), {"recorded"}),
        (lambda x, w: (lambda v: (x @ v, v.sum()))(w.t()), {"recorded", "other"}),
        (lambda x, w: (lambda v: (x @ v.contiguous(), v))(w.t()), {"recorded", "other"}),
        (lambda x, w: w.t().sum() + x, {"other"}),
        (checkpointed(lambda x, w: x @ w + w.sum()), {"recorded", "other"}),
        (checkpointed(lambda x, w: x + w.sum(0)), {"other"}),
        # without gradients, all along the way or at one place of it
        (without_gradients(F.linear), {"unrecorded"}),
        (without_gradients(checkpointed(F.linear)), {"unrecorded"}),
        (lambda x, w: x @ w.detach().t(), {"unrecorded"}),
        (lambda x, w: x @ w.data, {"unrecorded"}),
        (lambda x, w: x @ without_gradients(lambda x, w: w.t())(x, w), {"unrecorded"}),
        (lambda x, w: (lambda v: x @ v + without_gradients(torch.matmul)(x, v))(w.t()), {"recorded", "unrecorded"}),
    ],
)
def test_where_a_use_leads(use, ends):
    def at(gm):
        (step,) = walk(gm, weight_of(gm), gradient_modes(gm, torch.is_grad_enabled())).steps
        return step.ends, step.leads_to_read

    assert look(Reader(W, use), at, X) == (frozenset(ends), bool(ends - {"other"}))


class Joined(nn.Module):
    """Two weights in one view, which a product reads and a penalty too; what ``deeper`` makes of it likewise."""

    def __init__(self, deeper):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.deeper = deeper

    def forward(self, x):
        joined = self.deeper(torch.cat([self.a, self.b]))
        return F.linear(x, joined), joined.square().sum()


@pytest.mark.parametrize("deeper", [lambda w: w, lambda w: w.view(8, 4), lambda w: w.clone().view(8, 4)])
def test_a_view_of_two_weights_that_is_also_used_elsewhere(deeper):
    """Its reads take both samples, the other use both weights; each view has one copy, not one for each weight."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Joined(deeper), torch.randn(2, 4)
    backend = gws_compile.backend("fp4_e2m1", inner="eager")
    product, penalty = torch.compile(model, backend=backend, fullgraph=True)(x)
    a, b = (gws_compile.sample(getattr(model, name), "fp4_e2m1", name=name) for name in ("a", "b"))
    assert not torch.equal(a, model.a)
    assert not torch.equal(b, model.b)
    assert torch.equal(product, F.linear(x, torch.cat([a, b])))
    assert torch.equal(penalty, torch.cat([model.a, model.b]).square().sum())
    (graph,) = backend.graphs
    assert len(samples(graph)) == 2
    views = [name_of(node) for node in graph.graph.nodes if name_of(node) in ("cat", "clone", "view")]
    assert all(views.count(name) == 2 for name in views)


def test_a_view_of_two_weights_that_only_a_product_reads():
    """The view itself takes both samples."""
    torch._dynamo.reset()
    model = Joined(lambda w: w)
    model.forward = lambda x: F.linear(x, torch.cat([model.a, model.b]))
    assert [line.split(" = ")[1].split("(")[0] for line in show(rewritten_graph(model, X)).splitlines()[:-1]] == [
        "sample_weight",
        "sample_weight",
        "cat",
        "linear",
    ]


def computing(found):
    return [name_of(node) for _, node in found if node.op in ("call_function", "call_method")]


def test_nodes_come_as_they_run_and_graphs_once():
    """A body's stand behind the node that calls it."""

    def at(gm):
        inside = list(nodes(gm))
        outer, middle, inner = graphs(gm)
        assert outer is gm
        assert all(node.graph is module.graph for module, node in inside)
        assert len(inside) == sum(len(module.graph.nodes) for module in (outer, middle, inner))
        return computing(inside)

    call = "tag_activation_checkpoint"
    inner = ["linear", "relu"]
    middle = ["sin", call, *inner, "getitem", "linear", "tanh"]
    assert look(Nested(), at, X) == [call, *middle, "getitem", "linear", "cos"]


def test_samples_are_found_in_bodies_too():
    torch._dynamo.reset()
    graph = rewritten_graph(Nested(), X)
    assert {node.graph for node in samples(graph)} == {module.graph for module in graphs(graph)}
    assert len(samples(graph)) == 3


def test_a_copy_may_be_changed_with_its_bodies():
    def at(gm):
        before, code = show(gm), [module.code for module in graphs(gm)]
        copied = copy_with_bodies(gm)
        assert show(copied) == before
        assert not set(graphs(copied)) & set(graphs(gm))
        for module in graphs(copied):
            for node in module.graph.find_nodes(op="call_function", target=torch._C._nn.linear):
                with module.graph.inserting_after(node):
                    node.replace_all_uses_with(module.graph.call_method("neg", (node,)), lambda u: u.target != "neg")
            module.graph.lint()
            module.recompile()
        assert show(copied).count("neg(") == 3
        assert show(gm) == before
        assert [module.code for module in graphs(gm)] == code
        return copied(*(node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")))

    (result,) = look(Nested(), at, X)
    assert result.shape == X.shape


def test_rewriting_leaves_dynamos_graph_and_bodies_as_they_are():
    def at(gm):
        before = show(gm)
        metas = [dict(node.meta) for _, node in nodes(gm)]
        rewritten = rewrite(gm, Config.make("fp8_e4m3", backward="recompute"))
        assert show(rewritten.module).count("sample_weight(") == 3
        assert show(gm) == before
        assert [node.meta.keys() for _, node in nodes(gm)] == [meta.keys() for meta in metas]
        assert not samples(gm)

    look(Nested(), at, X)
