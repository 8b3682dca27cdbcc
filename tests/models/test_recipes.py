"""Whole models under a recipe: loss and gradients are those of an eager oracle."""

import pytest
import torch
from support.models import gpt2, llama, loss_and_gradients
from support.recipe_oracle import RecipeOracle
from torch import nn

import gws_compile

transformers = pytest.importorskip("transformers")

RECIPES = gws_compile.RECIPES
LOSSLESS = gws_compile.Operand("e8m23", scale="none")


pytestmark = pytest.mark.usefixtures("one_thread")


def backend_of(recipe, **settings):
    return gws_compile.backend("e3m2" if recipe == "exmy" else None, recipe=recipe, seed=3, **settings)


def largest_difference(got, wanted):
    """Of gradients, relative to the largest of each."""
    assert got.keys() == wanted.keys()
    return max(((got[name] - wanted[name]).abs().max() / wanted[name].abs().max()).item() for name in wanted)


@pytest.mark.parametrize(
    ("make", "recipe"),
    [
        *((llama, name) for name in RECIPES),
        *((gpt2, name) for name in ("mxfp8", "nvfp4")),
        *(pytest.param(gpt2, name, marks=pytest.mark.slow) for name in RECIPES if name not in ("mxfp8", "nvfp4")),
    ],
)
def test_language_models(make, recipe):
    """Every operand of every product, in every recipe, stochastic ones with their words: exact but for the order in
    which a transform adds."""
    model, tokens = make(layers=1), torch.randint(0, 96, (2, 32))
    backend = backend_of(recipe, inner="aot_eager")
    got = loss_and_gradients(torch.compile(model, backend=backend), model, tokens)
    with RecipeOracle.of(backend, model):
        wanted = loss_and_gradients(model, model, tokens)
    assert torch.equal(got[0], wanted[0])
    assert largest_difference(got[1], wanted[1]) < (1e-6 if recipe == "nvfp4" else 1e-12)
    layers = 4 if make is gpt2 else 7
    products = backend.report().products
    kinds = [p.kind for p in products if p.kind and not p.reason]
    assert (kinds.count("forward"), kinds.count("dgrad"), kinds.count("wgrad")) == (layers, layers, layers)
    assert all(p.operands[role] for p in products if p.kind for role in p.operands)


@pytest.mark.parametrize("recipe", ["mxfp8", pytest.param("nvfp4", marks=pytest.mark.slow)])
def test_language_models_by_inductor(recipe):
    """The same, where the operands are computed in fused loops, whose last bits differ."""
    model, tokens = llama(layers=1), torch.randint(0, 96, (2, 32))
    backend = backend_of(recipe)
    got = loss_and_gradients(torch.compile(model, backend=backend), model, tokens)
    with RecipeOracle.of(backend, model):
        wanted = loss_and_gradients(model, model, tokens)
    assert torch.allclose(got[0], wanted[0], rtol=1e-6)
    assert largest_difference(got[1], wanted[1]) < 1e-5


class ConvNet(nn.Module):
    """Convolutions with a stride, in groups, depthwise, of one place; batch norm between them."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(32, 64, 3, padding=1)
        self.norm = nn.BatchNorm2d(64)
        self.grouped = nn.Conv2d(64, 64, 3, stride=2, groups=2, bias=False)
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64)
        self.point = nn.Conv2d(64, 32, 1)
        self.out = nn.Linear(32, 10)

    def forward(self, x):
        x = self.grouped(self.norm(self.wide(x)).relu()).relu()
        return self.out(self.point(self.depthwise(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("recipe", ["mxfp8", "fp8_tensor", "exmy", pytest.param("fp8_block", marks=pytest.mark.slow)])
def test_convolutions(recipe):
    model, x = ConvNet(), torch.randn(4, 32, 12, 12, requires_grad=True)
    names = [name for name, _ in model.named_parameters() if name != "wide.bias"]  # a bias in front of batch norm
    parameters = [x, *map(model.get_parameter, names)]
    backend = backend_of(recipe, inner="aot_eager")
    got = torch.autograd.grad(torch.compile(model, backend=backend)(x).square().sum(), parameters)
    with RecipeOracle.of(backend, model):
        wanted = torch.autograd.grad(model(x).square().sum(), parameters)
    # The gradient of a convolution's two operands is taken in two calls, whose sums have other orders.
    assert largest_difference(dict(enumerate(got)), dict(enumerate(wanted))) < 1e-5
    left = {product.weight: product.reason for product in backend.report().unrounded}
    assert left == {"depthwise.weight": "a depthwise convolution sums over its window alone"}


def test_a_transposed_convolution_sums_over_the_rows_of_its_weight():
    """Its weight is (in, out, ...): its blocks run over the rows, and over the columns in dgrad."""
    layer = nn.ConvTranspose2d(32, 48, 3, bias=False)
    backend = gws_compile.backend(recipe="mxfp8", inner="aot_eager")
    x = torch.randn(2, 32, 5, 5, requires_grad=True)
    y = torch.compile(nn.Sequential(layer), backend=backend)(x)
    rounded_x = gws_compile.quantize(x.detach().movedim(1, -1), "mxfp8", (1, 32)).movedim(-1, 1)
    rounded_w = gws_compile.quantize(layer.weight.detach(), "fp8_e4m3", (32, 1))
    wanted = nn.functional.conv_transpose2d(rounded_x, rounded_w)
    assert torch.equal(y, wanted)
    y.sum().backward()
    products = {p.kind: p.operands["weight"] for p in backend.report().products if "weight" in p.operands}
    assert products == {"forward": "fp8_e4m3, 32 x 1, floor", "dgrad": "fp8_e4m3, 1 x 32, floor"}


class Experts(nn.Module):
    """A mixture whose experts are one product of torch's."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 64, 96) / 8)
        self.down = nn.Parameter(torch.randn(3, 96, 64) / 8)

    def forward(self, x, ends):
        hidden = nn.functional.grouped_mm(x, self.up.bfloat16(), offs=ends).relu()
        return nn.functional.grouped_mm(hidden, self.down.bfloat16(), offs=ends)


def experts_by_hand(model, x, ends):
    """The same, expert by expert, each product rounded by the public reference."""

    def rounded(value, *, rows=False):
        return gws_compile.quantize(value.detach(), "fp8_e4m3", (32, 1) if rows else (1, 32), "floor")

    layers = [[rounded(expert, rows=True).bfloat16() for expert in weight] for weight in (model.up, model.down)]
    starts = [0, *ends.tolist()[:-1]]
    outs, hiddens = [], []
    for i, (start, end) in enumerate(zip(starts, ends.tolist(), strict=True)):
        hidden = (rounded(x[start:end]) @ layers[0][i]).relu()
        hiddens.append(hidden)
        outs.append(rounded(hidden) @ layers[1][i])
    return torch.cat(outs), torch.cat(hiddens)


def test_experts_of_a_grouped_product():
    """Forward and all gradients, expert by expert; tokens of several experts share blocks in wgrad."""
    model, ends = Experts(), torch.tensor([32, 32, 64], dtype=torch.int32)
    x = torch.randn(64, 64).bfloat16().requires_grad_()
    backend = gws_compile.backend(recipe="mxfp8", inner="aot_eager")
    y = torch.compile(model, backend=backend)(x, ends)
    upstream = torch.randn_like(y)
    grads = dict(zip(("x", "up", "down"), torch.autograd.grad(y, [x, model.up, model.down], upstream), strict=True))
    wanted, hidden = experts_by_hand(model, x.detach(), ends)
    assert torch.equal(y, wanted)

    def rounded(value, *, rows=False):
        return gws_compile.quantize(value.detach(), "fp8_e4m3", (32, 1) if rows else (1, 32), "floor")

    down, up = ([rounded(expert).bfloat16() for expert in weight] for weight in (model.down, model.up))
    spans = list(zip([0, *ends.tolist()[:-1]], ends.tolist(), strict=True))
    dhidden = torch.cat([rounded(upstream[a:b]) @ down[i].t() for i, (a, b) in enumerate(spans)])
    dhidden = dhidden * (hidden > 0)
    dx = torch.cat([rounded(dhidden[a:b]) @ up[i].t() for i, (a, b) in enumerate(spans)])
    assert torch.equal(grads["x"], dx)
    for name, left, right in (("down", hidden, upstream), ("up", x, dhidden)):
        left, right = rounded(left, rows=True), rounded(right, rows=True)
        each = torch.stack([left[a:b].t() @ right[a:b] for a, b in spans])
        assert torch.equal(grads[name], each.float())


@pytest.mark.parametrize("experts", ["grouped_mm", pytest.param("batched_mm", marks=pytest.mark.slow)])
def test_a_mixture_of_experts_of_transformers(experts):
    """Every product of attention's projections and of the experts is rounded; those of router and head are not."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=96, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(experts)
    tokens = torch.randint(0, 96, (2, 32))
    plain, of_plain = loss_and_gradients(model, model, tokens)
    # A format with as many bits as there are: two products in one operation are taken apart, and nothing else changes.
    lossless = gws_compile.backend("e8m23", noise="none", activations=LOSSLESS, gradients=LOSSLESS, inner="aot_eager")
    loss, gradients = loss_and_gradients(torch.compile(model, backend=lossless), model, tokens)
    assert torch.equal(loss, plain)
    assert largest_difference(gradients, of_plain) < 1e-5
    torch._dynamo.reset()
    backend = gws_compile.backend(recipe="nvfp4", inner="aot_eager")
    loss, _ = loss_and_gradients(torch.compile(model, backend=backend), model, tokens)
    assert 0 < (loss - plain).abs() < 0.05
    products = backend.report().products
    kinds = {(p.weight.rpartition(".")[2], p.kind) for p in products if "experts" in p.weight}
    assert kinds == {(w, k) for w in ("gate_up_proj", "down_proj") for k in ("forward", "dgrad", "wgrad")}
    assert not any(p.rounded for p in products if not p.weight)
    reasons = {p.reason for p in products if "experts" in p.weight and p.kind == "wgrad"}
    assert reasons == (
        {"not transformed: it sums over the tokens of each expert apart"} if experts == "grouped_mm" else {""}
    )
