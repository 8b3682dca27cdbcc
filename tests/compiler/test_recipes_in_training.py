"""Recipes in what training does beside a forward and a backward: gradients are those of the eager oracle, or of the
same run without it."""

import copy

import pytest
import torch
from support.recipe_oracle import RecipeOracle, transformed
from support.small_models import Net, TwoBlocks
from torch import nn
from torch.utils.checkpoint import checkpoint

import gws_compile
from gws_compile import GwsWarning, Operand, Schedule

pytestmark = pytest.mark.usefixtures("one_thread")


SMALL = {"exclude": (), "inner": "aot_eager", "seed": 5}
MX = {"recipe": "mxfp8", **SMALL}
STOCHASTIC = {  # as nvfp4, in a format whose transform is exact enough to compare bit for bit
    "fmt": "mxfp4", "noise": "none", "activations": "mxfp4", "gradients": Operand("mxfp4", rounding="stochastic"),
    **SMALL,
}  # fmt: skip


def gradients(call, model, x):
    """Loss and gradients by name, that of the input under ``""``."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    loss = call(x).square().mean()
    loss.backward()
    return {
        "loss": loss.detach(),
        "": x.grad,
        **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    }


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


def oracle(backend, model, x, step=0):
    with RecipeOracle.of(backend, model, step):
        return gradients(model, model, x)


class Checkpointed(TwoBlocks):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        for block in (self.first, self.second):
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.out(x)


def without_checkpoints(model):
    plain = TwoBlocks()
    plain.load_state_dict(model.state_dict())
    return plain


def test_a_checkpoint_inside_the_graph_changes_nothing():
    """What it computes again is rounded to the same values; nothing of it is kept."""
    model, x = Checkpointed(reentrant=False), torch.randn(6, 40)
    backend = gws_compile.backend(**STOCHASTIC)
    got = gradients(torch.compile(model, backend=backend, fullgraph=True), model, x)
    assert_equal(got, oracle(backend, without_checkpoints(model), x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_compiled_blocks_changes_nothing(reentrant):
    model, x = Checkpointed(reentrant), torch.randn(6, 40)
    backend = gws_compile.backend(**STOCHASTIC)
    plain = without_checkpoints(model)
    model.first.compile(backend=backend)
    model.second.compile(backend=backend)
    got = gradients(model, model, x)
    names = {p: n for n, p in plain.named_parameters() if n.endswith("weight")}
    with RecipeOracle(backend.config, names):
        wanted = gradients(lambda x: plain.out(plain.second(plain.first(x))), plain, x)
    assert_equal(got, wanted)


class Broken(TwoBlocks):
    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.parametrize("settings", [MX, STOCHASTIC], ids=["nearest", "stochastic"])
def test_graph_breaks(settings):
    model, x = Broken(), torch.randn(6, 40)
    backend = gws_compile.backend(**settings)
    got = gradients(torch.compile(model, backend=backend), model, x)
    assert len(backend.graphs) == 2
    assert_equal(got, oracle(backend, model, x))


def test_layers_that_share_a_graph_draw_words_of_their_own():
    model, x = TwoBlocks(), torch.randn(6, 40)
    backend = gws_compile.backend(**STOCHASTIC)
    for block in (model.first, model.second):
        block.compile(backend=backend)
    got = gradients(model, model, x)
    assert len(backend.graphs) == 1
    names = {p: n for n, p in model.named_parameters() if n.endswith("weight")}
    fresh = copy.deepcopy(model)
    with RecipeOracle(backend.config, {fresh.get_parameter(n): n for n in names.values()}):
        wanted = gradients(lambda x: Net.forward(fresh.second, Net.forward(fresh.first, x)), fresh, x)
    assert_equal(got, wanted)


def test_steps_draw_anew_and_accumulation_does_not():
    """Over an optimizer's steps, with two batches in each."""
    model, x = TwoBlocks(), torch.randn(2, 6, 40)
    backend = gws_compile.backend(**STOCHASTIC)
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        for batch in x:
            got = gradients(compiled, model, batch)
            assert_equal(got, oracle(backend, model, batch, step))
        optimizer.step()
    assert len(backend.graphs) == 1


def test_dynamic_shapes():
    """One graph for several numbers of tokens, stochastic rounding and a transform in it."""
    settings = {**SMALL, "recipe": "nvfp4"}
    model = TwoBlocks()
    dynamic = gws_compile.backend(**settings)
    compiled = torch.compile(model, backend=dynamic, dynamic=True)
    for tokens in (16, 48, 32):
        x = torch.randn(tokens, 40)
        torch.manual_seed(1)
        got = gradients(compiled, model, x)
        wanted = oracle(dynamic, model, x)
        for name in wanted:
            assert torch.allclose(got[name], wanted[name], rtol=1e-5, atol=1e-6), name
    assert len(dynamic.graphs) == 1


def test_dynamic_shapes_by_inductor():
    model = TwoBlocks()
    backend = gws_compile.backend(**{**STOCHASTIC, "inner": "inductor"})
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for tokens in (10, 37):
        x = torch.randn(tokens, 40)
        got, wanted = gradients(compiled, model, x), oracle(backend, model, x)
        for name in wanted:
            assert torch.allclose(got[name], wanted[name], rtol=1e-4, atol=1e-5), name
    assert len(backend.graphs) == 1


def test_autocast():
    """Operands are rounded in the dtype in which they are multiplied."""
    model, x = Net(), torch.randn(6, 40)
    backend = gws_compile.backend(**MX)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(model, backend=backend)(x)

    def rounded(value, fmt="mxfp8"):
        return gws_compile.quantize(value.detach(), fmt, (1, 32))

    def linear(value, layer):
        weight, bias = rounded(layer.weight).bfloat16(), layer.bias.bfloat16()
        return nn.functional.linear(rounded(value), weight, bias)

    assert torch.equal(y, x + linear(linear(x.bfloat16(), model.up).relu(), model.down))
    exact = torch.addmm(model.up.bias.bfloat16(), rounded(x.bfloat16()), rounded(model.up.weight).bfloat16().t()).relu()
    assert torch.equal(
        y, x + torch.addmm(model.down.bias.bfloat16(), rounded(exact), rounded(model.down.weight).bfloat16().t())
    )


def test_evaluation_rounds_the_forward():
    """A graph without gradients has its forward products alone, and no warning."""
    model, x = TwoBlocks(), torch.randn(6, 40)
    for inner in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        backend = gws_compile.backend(**{**MX, "inner": inner})
        with torch.no_grad():
            y = torch.compile(model, backend=backend)(x)
            with RecipeOracle.of(backend, model):
                wanted = model(x)
        assert torch.allclose(y, wanted, rtol=1e-6, atol=1e-6)
        assert {p.kind for p in backend.report().products} == {"forward"}


def test_a_compiler_of_ones_own_gets_the_rounded_graphs():
    """Forward and backward apart, in ATen's operations; and a forward alone."""
    model, x, met = TwoBlocks(), torch.randn(6, 40), []

    def inner(graph, inputs):
        met.append({node.target for node in graph.graph.nodes if "gws" in str(node.target)})
        return graph.forward

    backend = gws_compile.backend(**{**STOCHASTIC, "inner": inner})
    got = gradients(torch.compile(model, backend=backend), model, x)
    assert_equal(got, oracle(backend, model, x))
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    sample, rounding = torch.ops.gws.sample_weight.default, torch.ops.gws.round_operand.default
    assert met == [{sample, rounding}, {rounding}, {sample, rounding}]


def test_frozen_weights_have_rounded_products_too():
    """The gradient that goes through a frozen layer is rounded, with that layer's key; it has no wgrad."""
    model, x = TwoBlocks(), torch.randn(6, 40)
    model.second.requires_grad_(False)
    backend = gws_compile.backend(**STOCHASTIC)
    got = gradients(torch.compile(model, backend=backend), model, x)
    assert_equal(got, oracle(backend, model, x))
    kinds = {(p.weight, p.kind) for p in backend.report().products if p.weight.startswith("second")}
    assert kinds == {(f"second.{w}.weight", k) for w in ("up", "down") for k in ("forward", "dgrad")}


class Siblings(nn.Module):
    """Three products of one input, the third of a weight that is left alone, and one weight in two products."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x):
        return self.q(x) * self.k(x) + self.v(x) + self.q(self.k(x))


def test_products_of_one_input_are_told_apart():
    """The gradient of the weight that is left alone is not rounded; that of each other one is its own."""
    model, x = Siblings(), torch.randn(6, 64)
    backend = gws_compile.backend(**{**STOCHASTIC, "exclude": "v.*"})
    got = gradients(torch.compile(model, backend=backend), model, x)
    products = backend.report().products
    assert sum(p.kind == "wgrad" for p in products) == 4
    assert [p.op for p in products if not p.weight] == ["mm"] * 3
    names = {model.get_parameter(f"{n}.weight"): f"{n}.weight" for n in ("q", "k")}
    with RecipeOracle(backend.config, names) as counted:
        wanted = gradients(model, model, x)
    assert counted.calls == {"q.weight": 2, "k.weight": 2}
    # Which of a weight's two products comes first in the backward is autograd's; two of the four orders are alike.
    for name in ("loss", "v.weight"):
        assert torch.equal(got[name], wanted[name])
    for name in ("q.weight", "k.weight", ""):
        assert torch.nn.functional.cosine_similarity(got[name].flatten(), wanted[name].flatten(), dim=0) > 0.9


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_schedule_switches_products_and_compiles_nothing_again(inner):
    """The forward in high precision from draw 2 on, wgrad before draw 1, weights included; evaluation follows."""
    model, x = TwoBlocks(), torch.randn(8, 40)
    schedule = Schedule(forward=(0, 2), wgrad=(1, None))
    backend = gws_compile.backend(**{**MX, "inner": inner}, schedule=schedule)
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    evaluated = []
    for step in range(4):
        got = gradients(compiled, model, x)
        off = ["wgrad"] if step < 1 else [] if step < 2 else ["forward"]
        wanted = scheduled_oracle(backend, model, x, off)
        for name in wanted:
            assert torch.allclose(got[name], wanted[name], rtol=1e-4, atol=1e-6), (step, name)
        with torch.no_grad():
            evaluated.append((compiled(x).square().mean() - wanted["loss"]).abs() < 1e-6)
        optimizer.step()
    assert all(evaluated)
    assert len(backend.graphs) == 2  # with gradients and without


def scheduled_oracle(backend, model, x, off):
    class Switched(RecipeOracle):
        def activation(self, x, kind, size=None):
            return x if kind in off else super().activation(x, kind, size)

        def gradient(self, g, name, kind, number, size=None):
            return g if kind in off else super().gradient(g, name, kind, number, size)

        def weight(self, name, w, *, over_rows):
            switched = ("dgrad" if over_rows else "forward") in off
            return w.detach() if switched else super().weight(name, w, over_rows=over_rows)

    with Switched.of(backend, model):
        return gradients(model, model, x)


def test_a_resumed_run_continues_bit_for_bit():
    def train(model, backend, steps):
        compiled = torch.compile(model, backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            compiled(torch.ones(4, 40)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return backend.state_dict()

    whole = TwoBlocks()
    split = copy.deepcopy(whole)
    train(whole, gws_compile.backend(**STOCHASTIC), 4)
    state = train(split, gws_compile.backend(**STOCHASTIC), 2)
    torch._dynamo.reset()
    resumed = gws_compile.backend(**STOCHASTIC)
    resumed.load_state_dict(state)
    train(split, resumed, 2)
    assert_equal(dict(split.named_parameters()), dict(whole.named_parameters()))
    assert state["operands"][1].endswith("stochastic 0 all")
    other = gws_compile.backend(**{**STOCHASTIC, "gradients": "mxfp4"})
    with pytest.raises(
        ValueError, match=r"the state was saved with gradients='e2m1 1x32 floor stochastic 0 all', this"
    ):
        other.load_state_dict(state)


def test_operands_of_weights_with_noise():
    """`activations` and `gradients` beside noise on the weights, whose blocks are squares: one sample for all."""
    model, x = Net(), torch.randn(6, 40)
    backend = gws_compile.backend("mxfp8", activations="mxfp8", gradients="mxfp8", **SMALL)
    got = gradients(torch.compile(model, backend=backend), model, x)

    class Noisy(RecipeOracle):
        def weight(self, name, w, *, over_rows):
            return gws_compile.sample(w.detach(), "mxfp8", name=name, seed=5)

    with Noisy.of(backend, model):
        assert_equal(got, gradients(model, model, x))


def test_learned_widths_beside_operands():
    """The widths get their gradient from the rounded products."""
    model, x = Net(), torch.randn(6, 40)
    backend = gws_compile.backend(bits=gws_compile.LearnedBits(), activations="mxfp8", gradients="mxfp8", **SMALL)
    torch.compile(model, backend=backend)(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backend.parameters())
    assert {p.kind for p in backend.report().products if p.weight} == {"forward", "dgrad", "wgrad"}


def test_errors():
    with pytest.raises(ValueError, match=r"inner='eager' has no graph of the products in which activations could be"):
        gws_compile.backend(activations="mxfp8", inner="eager")
    model = TwoBlocks()
    backend = gws_compile.backend(recipe="nvfp4", **SMALL)
    place = (
        r"hadamard=16 does not divide the 10 tokens that wgrad of second.down.weight \(mm at .*small_models.py:\d+\)"
    )
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=place):
        torch.compile(model, backend=backend)(torch.randn(10, 40)).sum().backward()
    with pytest.warns(GwsWarning, match=r"hadamard=16 transforms the activations of wgrad too, and activations=None"):
        gws_compile.backend(gradients=Operand("nvfp4", hadamard=16))


def test_a_transform_of_the_forward():
    """Said of activations: weight and activation are rotated along the features, and the product stays what it is."""
    model, x = nn.Sequential(nn.Linear(64, 48, bias=False)), torch.randn(8, 64)
    lossless = Operand("e8m23", scale="none", hadamard=32)
    backend = gws_compile.backend("e8m23", noise="none", activations=lossless, **SMALL)
    y = torch.compile(model, backend=backend)(x)
    assert torch.allclose(y, model(x), atol=1e-5)
    assert not torch.equal(y, model(x))
    torch._dynamo.reset()
    coarse = gws_compile.backend("mxfp4", noise="none", activations=Operand("mxfp4", hadamard=32), **SMALL)
    got = torch.compile(model, backend=coarse)(x)
    turned = transformed(x, 32), transformed(model[0].weight.detach(), 32)
    left = gws_compile.quantize(turned[0], "fp4_e2m1", (1, 32))
    right = gws_compile.quantize(turned[1], "mxfp4", (32, 32))
    assert torch.isclose(got, left @ right.t(), atol=1e-4).float().mean() > 0.95
