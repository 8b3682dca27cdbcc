"""Noise is for reads that gradients flow through; every other read of a graph takes the cast alone."""

import pytest
import torch
import torch.nn.functional as F
from gws_compile.passes.bodies import nodes
from gws_compile.passes.gradient_modes import gradient_modes
from gws_compile.passes.operations import name_of
from support.graphs import rewritten_graph, show
from torch import nn
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import gws_compile

FMT = "fp4_e2m1"
X = torch.linspace(-1, 1, 32).view(4, 8)


pytestmark = pytest.mark.usefixtures("reset")


class Reader(nn.Module):
    """Weights that a given function reads."""

    def __init__(self, use):
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
        self.use = use

    def forward(self, x):
        return self.use(x, self.w, self.v)


class Used:
    """What an oracle reads of a weight: ``noisy``, a leaf, and ``cast``, which has no gradient."""

    def __init__(self, name, weight, **settings):
        value = weight.detach()
        self.noisy = gws_compile.sample(value, FMT, name=name, **settings).requires_grad_()
        self.cast = gws_compile.quantize(value, FMT)


@torch.no_grad()
def decorated(x, w):
    return x @ w


def region(mode):
    """A function with a read in such a region, and one behind it."""

    def use(x, w, v):
        with mode():
            a = x @ w
        return x @ w, a

    return use


def broken(mode):
    def use(x, w, v):
        with mode():
            torch._dynamo.graph_break()
            a = x @ w
        return x @ w, a

    return use


def both(x, w, v):
    return x @ w.noisy, x @ w.cast


def nested(x, w, v):
    with torch.no_grad():
        a = x @ w
        with torch.enable_grad():
            b = x @ w
        c = x @ w
    return a, b, c, x @ w


def switched(x, w, v):
    torch.set_grad_enabled(False)
    a = x @ w
    torch.set_grad_enabled(True)
    return x @ w, a


def switched_and_broken(x, w, v):
    torch.set_grad_enabled(False)
    torch._dynamo.graph_break()
    a = x @ w
    torch.set_grad_enabled(True)
    return x @ w, a


def inside_inference(x, w, v):
    with torch.inference_mode():
        a = x @ w
        with torch.inference_mode(False):  # which enables gradients, whatever is around it
            b = x @ w
    return b, a


def view_of_both(x, w, v):
    t = w.t()
    with torch.no_grad():
        a = x @ t
    return x @ t, a


def view_without(x, w, v):
    with torch.no_grad():
        t = w.t()
    return F.linear(x, w), x @ t


def detached(x, w, v):
    return x @ w, x @ w.detach(), x @ w.data, x @ w.t().detach().t()


def joined(x, w, v):
    rows = torch.cat([w.detach(), v])
    with torch.no_grad():
        a = F.linear(x, rows)
    return F.linear(x, rows), a


def joined_of_both(x, w, v):
    rows = torch.cat([w, v])
    with torch.no_grad():
        a = F.linear(x, rows)
    return F.linear(x, rows), a, rows.sum()


def in_body(x, w, v):
    def body(y):
        with torch.no_grad():
            a = y @ w
        return y @ w + a

    return checkpoint(body, x, use_reentrant=False)


def body_without(x, w, v):
    with torch.no_grad():
        a = checkpoint(lambda y: y @ w, x, use_reentrant=False)
    return x @ w, a


def view_in_body(x, w, v):
    t = w.t()

    def body(y):
        with torch.no_grad():
            a = y @ t
        return y @ t + a + t.sum()

    return checkpoint(body, x, use_reentrant=False)


def scaled(x, w, v):
    t = w * 3
    with torch.no_grad():
        a = x @ t
    return x @ t, a


CASES = {
    "no_grad": (region(torch.no_grad), both),
    "inference_mode": (region(torch.inference_mode), both),
    "set_grad_enabled as a region": (region(lambda: torch.set_grad_enabled(False)), both),
    "a decorator": (lambda x, w, v: (x @ w, decorated(x, w)), both),
    "set_grad_enabled as a call": (switched, both),
    "nested": (nested, lambda x, w, v: (x @ w.cast, x @ w.noisy, x @ w.cast, x @ w.noisy)),
    "inference_mode inside": (inside_inference, both),
    "a graph break in no_grad": (broken(torch.no_grad), both),
    "a graph break in inference_mode": (broken(torch.inference_mode), both),
    "a graph break behind set_grad_enabled": (switched_and_broken, both),
    "a view that both read": (view_of_both, lambda x, w, v: (x @ w.noisy.t(), x @ w.cast.t())),
    "a view without gradients": (view_without, lambda x, w, v: (F.linear(x, w.noisy), x @ w.cast.t())),
    "detached": (detached, lambda x, w, v: (x @ w.noisy, x @ w.cast, x @ w.cast, x @ w.cast)),
    "joined, one detached": (
        joined,
        lambda x, w, v: (F.linear(x, torch.cat([w.cast, v.noisy])), F.linear(x, torch.cat([w.cast, v.cast]))),
    ),
    "a body": (in_body, lambda x, w, v: x @ w.noisy + x @ w.cast),
    "a body in no_grad": (body_without, both),
    "scaled": (scaled, lambda x, w, v: (x @ (w.noisy * 3), x @ (w.cast * 3))),
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(("use", "oracle"), CASES.values(), ids=CASES)
def test_reads_with_and_without_gradients(use, oracle, inner):
    model, x = Reader(use), X.clone()
    outputs = torch.compile(model, backend=gws_compile.backend(FMT, inner=inner))(x)
    w, v = Used("w", model.w), Used("v", model.v)
    expected = oracle(x, w, v)
    outputs, expected = (one if isinstance(one, tuple) else (one,) for one in (outputs, expected))
    for output, right in zip(outputs, expected, strict=True):
        assert torch.equal(output, right)
        assert output.requires_grad == right.requires_grad
    for total in (outputs, expected):
        sum(one.square().sum() for one in total if one.requires_grad).backward()
    for parameter, used in ((model.w, w), (model.v, v)):
        assert (parameter.grad is None) == (used.noisy.grad is None)
        assert parameter.grad is None or torch.equal(parameter.grad, used.noisy.grad)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_other_uses_keep_the_weight_beside_two_samples(inner):
    """Of a view, of a view of two weights, and of one that a checkpoint's body uses."""
    for use, oracle in (
        (
            joined_of_both,
            lambda x, w, v, m: (
                F.linear(x, torch.cat([w.noisy, v.noisy])),
                F.linear(x, torch.cat([w.cast, v.cast])),
                torch.cat([m.w, m.v]).sum(),
            ),
        ),
        (view_in_body, lambda x, w, v, m: (x @ w.noisy.t() + x @ w.cast.t() + m.w.sum(),)),
    ):
        torch._dynamo.reset()
        model = Reader(use)
        outputs = torch.compile(model, backend=gws_compile.backend(FMT, inner=inner), fullgraph=True)(X)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        expected = oracle(X, Used("w", model.w), Used("v", model.v), model)
        for output, right in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_enable_grad_in_a_graph_that_is_entered_without(inner):
    """Noise, and a new draw behind each optimizer step: the graph trains."""

    def use(x, w, v):
        a = x @ w
        with torch.enable_grad():
            return x @ w, a

    model = Reader(use)
    compiled = torch.compile(model, backend=gws_compile.backend(FMT, inner=inner))
    optimizer = torch.optim.SGD([model.w], lr=0.1)
    for step in range(2):
        w = Used("w", model.w, step=step)
        with torch.no_grad():
            output, cast = compiled(X)
        assert torch.equal(output, X @ w.noisy)
        assert torch.equal(cast, X @ w.cast)
        optimizer.zero_grad()
        output.square().sum().backward()
        (X @ w.noisy).square().sum().backward()
        assert torch.equal(model.w.grad, w.noisy.grad)
        optimizer.step()


def test_a_graph_whose_reads_have_no_gradients_is_no_training_forward():
    """As evaluation: draws do not advance, and requires_grad of what it reads does not matter."""

    def use(x, w, v):
        with torch.no_grad():
            a = x @ w
        return a + x @ v.square()

    backend = gws_compile.backend(FMT, inner="eager")
    model = Reader(use)
    assert torch.equal(torch.compile(model, backend=backend)(X), X @ Used("w", model.w).cast + X @ model.v.square())
    assert {r.name: r.noise for r in backend.report()} == {"w": "none", "v": ""}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_without_noise_gradients_flow_all_the_same(inner):
    """A sample that was made under no_grad would have none."""

    def use(x, w, v):
        with torch.no_grad():
            a = x @ w
        return x @ w + a

    model = Reader(use)
    torch.compile(model, backend=gws_compile.backend(FMT, noise="none", inner=inner))(X).sum().backward()
    assert torch.equal(model.w.grad, X.t() @ torch.ones(4, 8))


def test_a_frozen_weight_is_sampled_once():
    model = Reader(view_of_both)
    model.w.requires_grad_(False)
    graph = show(rewritten_graph(model, X, fmt=FMT))
    assert graph.count("sample_weight(") == 1
    assert graph.count(" t(") == 1


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_learned_widths_serve_both_samples(inner):
    """The cast takes them as that of a graph without gradients does, and gets no gradient for them."""
    settings = {"bits": gws_compile.LearnedBits(init=3.0), "inner": inner}
    model = Reader(region(torch.no_grad))
    backend = gws_compile.backend(FMT, **settings)
    noisy, cast = torch.compile(model, backend=backend)(X)
    noisy.square().sum().backward()
    (width,) = backend.parameters()
    torch._dynamo.reset()
    alone = Reader(lambda x, w, v: x @ w)
    alone.load_state_dict(model.state_dict())
    other = gws_compile.backend(FMT, **settings)
    compiled = torch.compile(alone, backend=other)
    output = compiled(X)
    output.square().sum().backward()
    (expected,) = other.parameters()
    assert torch.equal(noisy, output)
    assert torch.equal(width.grad, expected.grad)
    with torch.no_grad():
        assert torch.equal(cast, compiled(X))


def test_the_modes_of_nodes():
    """Those of bodies begin in the mode of their call."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8, bias=False) for _ in range(4))

        def forward(self, x):
            with torch.no_grad():
                y = checkpoint(lambda z: self.a(z), x, use_reentrant=False)
                with torch.inference_mode(), torch.enable_grad():
                    y = self.b(x)
                with torch.enable_grad():
                    y = self.c(x) + y
            return self.d(x) + y

    def backend(gm, inputs):
        modes = gradient_modes(gm, torch.is_grad_enabled())
        found.extend(modes[node].enabled for _, node in nodes(gm) if name_of(node) == "linear")
        return gm.forward

    found = []
    torch.compile(Net(), backend=backend, fullgraph=True)(X)
    assert found == [False, False, True, True]


# --- Inside transforms of torch.func ----------------------------------------------------------------------------------


def by_input(x, w, v):
    return grad(lambda y: (y @ w).pow(3).sum())(x)


def by_weight(x, w, v):
    return grad(lambda weight: (x @ weight).pow(3).sum() + weight.square().sum())(w)


def mapped(x, w, v):
    return vmap(lambda row: row @ w)(x)


def under(mode, use):
    def inside(x, w, v):
        with mode():
            return use(x, w, v)

    return inside


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("use", "part"),
    [
        (by_input, "noisy"),
        (by_weight, "noisy"),
        (mapped, "noisy"),
        (under(torch.no_grad, by_input), "cast"),
        (under(torch.no_grad, mapped), "cast"),
        # what the transform differentiates by is trained, whatever is around it
        (under(torch.no_grad, by_weight), "noisy"),
    ],
)
def test_transforms(use, part, inner):
    """Everything inside sees the one sample."""
    model = Reader(use)
    output = torch.compile(model, backend=gws_compile.backend(FMT, inner=inner), fullgraph=True)(X)
    w = getattr(Used("w", model.w), part)
    expected = use(X, w, model.v)
    assert torch.equal(output, expected)
    assert output.requires_grad == expected.requires_grad
    if output.requires_grad:
        output.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(model.w.grad, w.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_that_vmap_enables(inner):
    """The sample is taken in front of the transform, which stands under no_grad, and has its gradient all the same."""

    def use(x, w, v):
        def row(one):
            with torch.enable_grad():
                return one @ w

        with torch.no_grad():
            return vmap(row)(x)

    model = Reader(use)
    output = torch.compile(model, backend=gws_compile.backend(FMT, inner=inner), fullgraph=True)(X)
    w = Used("w", model.w)
    expected = use(X, w.noisy, model.v)
    assert torch.equal(output, expected)
    assert output.requires_grad
    output.sum().backward()
    expected.sum().backward()
    assert torch.equal(model.w.grad, w.noisy.grad)
