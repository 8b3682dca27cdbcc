# ruff: noqa: E501
"""The pass over AOTAutograd's graph: what it finds, what it writes."""

import re

import expecttest
import pytest
import torch
from gws_compile.passes.products import identity
from support.small_models import Net
from torch import nn

import gws_compile
from gws_compile import Operand


class TestJointGraphs(expecttest.TestCase):
    def setUp(self):
        torch._dynamo.reset()
        torch.manual_seed(0)

    def test_a_linear_layer(self):
        """Forward, then the two products of the backward; the activation of wgrad is rounded in the backward."""
        layer = nn.Sequential(nn.Linear(64, 32, bias=False))
        shown = graphs_of(layer, torch.randn(16, 64), recipe="nvfp4")
        self.assertExpectedInline(
            shown,
            """\
---
sample_weight = gws.sample_weight(primals_1, primals_3, primals_4, 0, e2m1, 3.0, none, [16, 16], nvfp4, None, , [], [], None, None, True, 0, e2m1 1x16 nvfp4 nearest 0 all; e2m1 1x16 nvfp4 stochastic 16 all; ; 0, 9)
t = aten.t(sample_weight)
round_operand_default = gws.round_operand(primals_2, None, None, 0, e2m1, [1, 16], nvfp4, nearest, 0, 0, 9)
mm = aten.mm(round_operand_default, t)
t_3 = aten.t(t)
---
hadamard_default = gws.hadamard(tangents_1, 16, 0, True, 9)
round_operand_default_1 = gws.round_operand(hadamard_default, primals_3, primals_4, 0, e2m1, [16, 1], nvfp4, stochastic, 3, 0, 9)
t_default = aten.t(round_operand_default_1)
hadamard_default_1 = gws.hadamard(primals_2, 16, 0, True, 9)
round_operand_default_2 = gws.round_operand(hadamard_default_1, None, None, 0, e2m1, [16, 1], nvfp4, nearest, 0, 0, 9)
mm_1 = aten.mm(t_default, round_operand_default_2)
t_2 = aten.t(mm_1)
round_operand_default_3 = gws.round_operand(tangents_1, primals_3, primals_4, 0, e2m1, [1, 16], nvfp4, stochastic, 2, 0, 9)
mm_2 = aten.mm(round_operand_default_3, t_3)
t_4 = aten.t(t_2)""",
        )

    def test_blocks_that_run_along_what_is_summed_over(self):
        """One-sided blocks of a weight are turned for dgrad, where its sample is made anew."""
        layer = nn.Sequential(nn.Linear(64, 32, bias=False))
        shown = graphs_of(layer, torch.randn(4, 64), recipe="mxfp8")
        self.assertExpectedInline(
            shown,
            """\
---
sample_weight = gws.sample_weight(primals_1, None, None, 0, e4m3, 5.0, none, [1, 32], floor, None, , [], [], None, None, True, 0, e4m3 1x32 floor nearest 0 all; e4m3 1x32 floor nearest 0 all; ; 0, 9)
t = aten.t(sample_weight)
round_operand_default = gws.round_operand(primals_2, None, None, 0, e4m3, [1, 32], floor, nearest, 0, 0, 9)
mm = aten.mm(round_operand_default, t)
---
round_operand_default_1 = gws.round_operand(tangents_1, None, None, 0, e4m3, [32, 1], floor, nearest, 0, 0, 9)
t_default = aten.t(round_operand_default_1)
round_operand_default_2 = gws.round_operand(primals_2, None, None, 0, e4m3, [32, 1], floor, nearest, 0, 0, 9)
mm_1 = aten.mm(t_default, round_operand_default_2)
t_2 = aten.t(mm_1)
round_operand_default_3 = gws.round_operand(tangents_1, None, None, 0, e4m3, [1, 32], floor, nearest, 0, 0, 9)
sample_weight_default = gws.sample_weight(primals_1, None, None, 0, e4m3, 5.0, none, [32, 1], floor, None, , [], [], None, None, True, 0, e4m3 1x32 floor nearest 0 all; e4m3 1x32 floor nearest 0 all; ; 0, 9)
t_default_1 = aten.t(sample_weight_default)
t_default_2 = aten.t(t_default_1)
mm_2 = aten.mm(round_operand_default_3, t_default_2)
t_4 = aten.t(t_2)""",
        )


def graphs_of(model, x, **settings):
    """The operator's nodes and products of forward and backward, as text."""
    lines = []

    def inner(graph, inputs):
        lines.append("---")
        for node in graph.graph.nodes:
            name = str(node.target)
            if "gws" in name or node.target in (torch.ops.aten.mm.default, torch.ops.aten.t.default):
                arguments = ", ".join(str(a) for a in node.args)
                lines.append(f"{node.name} = {name.removesuffix('.default')}({arguments})")
        return graph.forward

    backend = gws_compile.backend(inner=inner, exclude=(), **settings)
    torch.compile(model, backend=backend)(x.requires_grad_()).sum().backward()
    return "\n".join(lines)


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp4"])
def test_only_gradients_are_rounded_stochastically(recipe):
    """In whole graphs: of every stochastic node the operand depends on what comes in from behind."""
    torch._dynamo.reset()
    met = []

    def inner(graph, inputs):
        for node in graph.graph.nodes:
            if node.target is torch.ops.gws.round_operand.default and "stochastic" in node.args:
                met.append(depends_on_tangent(node.args[0]))
        return graph.forward

    model = nn.Sequential(Net(72), Net(72))
    backend = gws_compile.backend(recipe=recipe, inner=inner, exclude=())
    torch.compile(model, backend=backend)(torch.randn(32, 40, requires_grad=True)).sum().backward()
    assert met == [True] * 8  # dgrad and wgrad of four layers


def depends_on_tangent(node):
    pending, seen = [node], set()
    while pending:
        one = pending.pop()
        if "tangents" in str(one.target):
            return True
        seen.add(one)
        pending += [given for given in one.all_input_nodes if given not in seen]
    return False


class Odd(nn.Module):
    """Products that are no layer's."""

    def __init__(self):
        super().__init__()
        self.w, self.u = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        y = x @ self.w.t()
        return (y @ y.t()).sum() + torch.mv(self.u, x[0]).sum()


def test_products_that_are_left_alone_are_listed():
    torch._dynamo.reset()
    backend = gws_compile.backend(recipe="mxfp8", inner="aot_eager", exclude=())
    torch.compile(Odd(), backend=backend)(torch.randn(4, 64)).backward()
    report = backend.report()
    left = {(p.op, p.reason) for p in report.unrounded}
    assert ("mv", "mv is not rounded") in left
    assert any("no operand is a sampled weight" in reason for _, reason in left)
    assert all(re.search(r"test_products\.py:\d+$", p.location) for p in report.products if p.kind == "forward")
    text = str(report)
    assert "products with operands left alone:" in text
    assert "mv at" in text


def test_float64_is_left_alone():
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(32, 32)).double(), torch.randn(4, 32, dtype=torch.float64)
    backend = gws_compile.backend(recipe="mxfp8", inner="aot_eager", exclude=())
    with pytest.warns(gws_compile.GwsWarning):
        y = torch.compile(model, backend=backend)(x)
    assert torch.equal(y, model(x))
    assert backend.report().skipped[0].reason == "float64 weights are not sampled"


def test_the_order_of_operands_does_not_matter():
    """A weight on the left of a product, with its blocks along its rows' elements: the transpose of the usual."""
    torch._dynamo.reset()

    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(48, 64))

        def forward(self, x):
            return self.w @ x

    model, x = Left(), torch.randn(64, 5, requires_grad=True)
    backend = gws_compile.backend(recipe="mxfp8", inner="aot_eager", exclude=())
    y = torch.compile(model, backend=backend)(x)
    upstream = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, [x, model.w], upstream)

    def rounded(value, block):
        return gws_compile.quantize(value.detach(), "fp8_e4m3", block, "floor")

    assert torch.equal(y, rounded(model.w, (1, 32)) @ rounded(x, (32, 1)))
    assert torch.equal(dx, rounded(model.w, (32, 1)).t() @ rounded(upstream, (32, 1)))
    assert torch.equal(dw, rounded(upstream, (1, 32)) @ rounded(x, (1, 32)).t())


def grads_of(model, x, upstream, **settings):
    """Output, gradient of the input and of all parameters."""
    torch._dynamo.reset()
    backend = gws_compile.backend(recipe="mxfp8", inner="aot_eager", exclude=(), **settings)
    y = torch.compile(model, backend=backend)(x)
    return y, *torch.autograd.grad(y, [x, *model.parameters()], upstream), backend.report()


def rounded(value, *, rows=False):
    return gws_compile.quantize(value.detach(), "fp8_e4m3", (32, 1) if rows else (1, 32), "floor")


class Joined(nn.Module):
    """Three weights that are joined before they are read."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(32, 64)) for _ in range(3))

    def forward(self, x):
        return nn.functional.linear(x, torch.cat([self.q, self.k, self.v]))


def test_joined_weights_are_turned_alike():
    model, x, g = Joined(), torch.randn(8, 64, requires_grad=True), torch.randn(8, 96)
    y, dx, dq, _, dv, report = grads_of(model, x, g)
    assert torch.equal(y, rounded(x) @ torch.cat([rounded(w) for w in model.parameters()]).t())
    assert torch.equal(dx, rounded(g) @ torch.cat([rounded(w, rows=True) for w in model.parameters()]))
    dw = rounded(g, rows=True).t() @ rounded(x, rows=True)
    assert torch.equal(torch.cat([dq, dv]), torch.cat([dw[:32], dw[64:]]))
    assert report.unrounded == ()


class Scaled(nn.Module):
    """A weight that is multiplied by a learned number."""

    def __init__(self):
        super().__init__()
        self.w, self.gain = nn.Parameter(torch.randn(32, 64)), nn.Parameter(torch.tensor([1.5]))

    def forward(self, x):
        return x @ (self.w * self.gain).t()


def test_a_weight_that_is_scaled_is_a_weight():
    model, x, g = Scaled(), torch.randn(8, 64, requires_grad=True), torch.randn(8, 32)
    y, dx, dw, _, report = grads_of(model, x, g)
    gain = model.gain.detach()
    assert torch.equal(y, rounded(x) @ (rounded(model.w) * gain).t())
    assert torch.equal(dx, rounded(g) @ (rounded(model.w, rows=True) * gain))
    assert torch.equal(dw, rounded(g, rows=True).t() @ rounded(x, rows=True) * gain)
    assert {p.kind for p in report.products if not p.reason} == {"forward", "dgrad", "wgrad"}


class Folded(nn.Module):
    """A product that sums over heads, one dim of two that a weight's rows were parted into."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4 * 16, 32))

    def forward(self, x):
        return torch.einsum("thi,hdi->td", x, self.w.view(4, 16, 32))


def test_a_side_that_cannot_be_told_is_said():
    model, x, g = Folded(), torch.randn(8, 4, 32, requires_grad=True), torch.randn(8, 16)
    y, *_, report = grads_of(model, x, g)
    plain = model(x)
    assert (y - plain).abs().max() < 0.1 * plain.abs().max()
    for product in report.products:
        if product.kind in ("forward", "dgrad"):
            assert product.reason in (
                "",
                "it cannot be told which side of its weight it sums over: the weight's blocks are as they were",
            )


def test_operands_can_be_kept_to_some_products():
    """Activations in wgrad alone, as the scaling law was fitted; gradients in dgrad alone."""
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(64, 32, bias=False)), torch.randn(8, 64, requires_grad=True)
    activations = Operand("e3m2", block=(1, None), scale="amax", products=("wgrad",))
    gradients = Operand("e3m2", block=(1, None), scale="amax", products="dgrad")
    backend = gws_compile.backend(
        "e3m2", block=(1, None), scale="amax", noise="none", activations=activations, gradients=gradients,
        inner="aot_eager", exclude=(),
    )  # fmt: skip
    y = torch.compile(model, backend=backend)(x)
    g = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, [x, model[0].weight], g)

    def rounded(value, block):
        return gws_compile.quantize(value.detach(), "e3m2", block, "amax")

    w = model[0].weight
    assert torch.equal(y, x @ rounded(w, (1, None)).t())
    assert torch.equal(dx, rounded(g, (1, None)) @ rounded(w, (None, 1)))
    assert torch.equal(dw, g.t() @ rounded(x, (None, 1)))


def test_its_identity_is_that_of_its_sources():
    assert len(identity()) == 32
    assert identity() is identity()


if __name__ == "__main__":
    expecttest.main()
