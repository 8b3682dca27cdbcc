"""Attention that is rounded: in whatever form it is written."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.recipe_oracle import rounded
from torch import nn
from torch.utils.checkpoint import checkpoint

import gws_compile
from gws_compile import AttentionOperands, Operand, Schedule

LOSSLESS = Operand("e8m23", scale="none")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Fused(nn.Module):
    def forward(self, q, k, v, mask=None, causal=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class ByHand(nn.Module):
    """With a scale, a mask, a conversion and a dropout between the products."""

    def forward(self, q, k, v, mask=None, causal=False):
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return F.dropout(F.softmax(scores.float(), -1).to(v.dtype), 0.0) @ v


class Einsum(nn.Module):
    def forward(self, q, k, v, mask=None, causal=False):
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.size(-1))
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


class Batched(nn.Module):
    """`baddbmm` and `bmm`, as older models have it."""

    def forward(self, q, k, v, mask=None, causal=False):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        added = torch.zeros(1, 1, 1) if mask is None else mask
        if added.dtype == torch.bool:
            added = torch.zeros(added.shape).masked_fill(~added, -math.inf)
        scores = torch.baddbmm(added, q, k.transpose(1, 2), alpha=1 / math.sqrt(q.size(-1)))
        return torch.bmm(scores.softmax(-1), v).unflatten(0, (2, 3))


def values(dtype=torch.float32):
    return [torch.randn(2, 3, 40, 16, dtype=dtype, requires_grad=True) for _ in range(3)]


def run(call, inputs, *args):
    out = call(*inputs, *args)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]


MASKS = {"none": (), "bool": (torch.rand(40, 40) > 0.3,), "added": (torch.randn(40, 40),)}


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("make", [Fused, ByHand, Einsum, Batched])
def test_without_rounding_it_is_the_attention_of_the_model(make, mask, inner):
    inputs = values()
    backend = gws_compile.backend(attention=LOSSLESS, inner=inner)
    got, wanted = (run(call, inputs, *MASKS[mask]) for call in (torch.compile(make(), backend=backend), make()))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(got, wanted, strict=True))
    (use,) = backend.report().products
    assert (use.kind, use.rounded, use.reason) == ("attention", True, "")
    assert "test_round_attention.py:" in use.location


def test_causal_grouped_scaled_and_empty_rows():
    """What fused attention can be told; queries that no key is let through to get zeros, and no gradient of NaN."""
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 24)
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[3] = False
    for arguments in (
        {"is_causal": True, "enable_gqa": True},
        {"scale": 0.3, "enable_gqa": True},
        {"attn_mask": mask, "enable_gqa": True},
    ):
        torch._dynamo.reset()

        def attention(q, k, v, arguments=arguments):
            return F.scaled_dot_product_attention(q, k, v, **arguments)

        inputs = [x.requires_grad_() for x in (q, k, v)]
        backend = gws_compile.backend(attention=LOSSLESS, inner="eager")
        got, wanted = run(torch.compile(attention, backend=backend), inputs), run(attention, inputs)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(got, wanted, strict=True)), arguments


class MultiHead(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True, **settings)

    def forward(self, x, y, padding=None, mask=None, weights=False):
        return self.inner(x, y, y, need_weights=weights, key_padding_mask=padding, attn_mask=mask)


PADDING = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
CALLS = {
    "self": (torch.randn(2, 8, 32),) * 2,
    "cross": (torch.randn(2, 8, 32), torch.randn(2, 6, 32)),
    "masked": (torch.randn(2, 8, 32), torch.randn(2, 6, 32), PADDING, torch.rand(8, 6) > 0.8, True),
    "added": (torch.randn(2, 8, 32), torch.randn(2, 6, 32), None, torch.randn(8, 6), True),
}


@pytest.mark.parametrize("call", CALLS)
def test_multi_head_attention(call):
    """torch's own module, which Dynamo leaves as one operation: outputs, probabilities and all gradients."""
    model = MultiHead()
    backend = gws_compile.backend("e8m23", noise="none", attention=LOSSLESS, inner="aot_eager", exclude=())
    results = []
    for function in (torch.compile(model, backend=backend), model):
        out, weights = function(*CALLS[call])
        gradients = torch.autograd.grad(out.square().sum(), list(model.parameters()))
        results.append([out, *gradients, *([] if weights is None else [weights])])
    assert len(results[0]) == len(results[1])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True))
    assert [p.reason for p in backend.report().products] == [""]


def test_forms_that_are_left_alone_are_listed():
    backend = gws_compile.backend("e8m23", noise="none", attention=LOSSLESS, inner="aot_eager", exclude=())
    model = MultiHead(add_bias_kv=True)
    x = torch.randn(2, 8, 32)
    out, _ = torch.compile(model, backend=backend)(x, x)
    assert torch.allclose(out, model(x, x)[0], atol=1e-6)
    (use,) = backend.report().unrounded
    assert use.reason == "multi-head attention with bias_k, bias_v is not taken apart"


def explicit(q, k, v, operands):
    """Attention with rounded operands: what kernels of this kind compute, from its definition."""

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, operand, over_rows):
            flat = x.detach().flatten(0, -3)
            each = [rounded(m.t() if over_rows else m, operand) for m in flat]
            return torch.stack([m.t() if over_rows else m for m in each]).view_as(x)

        @staticmethod
        def backward(ctx, g):
            return g, None, None

    def through(x, operand, *, over_rows=False):
        return x if operand is None else Straight.apply(x, operand, over_rows)

    q, k = through(q, operands.queries), through(k, operands.keys)
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]))
    p = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    out = through(p, operands.probabilities) @ through(v, operands.values, over_rows=True)
    return out / p.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "attention",
    ["fp8_tiles", "mxfp8", AttentionOperands(values="nvfp4"), Operand("int8", block=(1, None))],
    ids=["fp8 tiles", "mxfp8", "values", "int8"],
)
def test_fused_attention_against_an_oracle(attention):
    """Queries and keys in tiles, values by channels, probabilities with a fixed scale (FPSAttention): output and
    gradients, which take the rounded operands."""
    inputs = [torch.randn(2, 3, 128, 32, requires_grad=True) for _ in range(3)]
    backend = gws_compile.backend(attention=attention, inner="aot_eager")
    got = run(torch.compile(Fused(), backend=backend), inputs)
    wanted = run(lambda *x: explicit(*x, backend.config.attention), inputs)
    assert torch.equal(got[0], wanted[0])
    for a, b in zip(got[1:], wanted[1:], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    plain = Fused()(*inputs)
    assert 1e-4 < (got[0] - plain).abs().max() < 0.2


def test_tiles_are_what_they_are_called():
    tiles = gws_compile.backend(attention="fp8_tiles").config.attention
    assert tiles.queries == tiles.keys == Operand("fp8_e4m3", block=(64, None), scale="amax")
    assert tiles.values.sides == (1, None)
    assert tiles.probabilities.rule == "unit"


def test_low_precision_inputs_and_autocast():
    """The operands are rounded in the dtype in which fused attention takes them, the softmax is float32."""
    inputs = values(torch.bfloat16)
    backend = gws_compile.backend(attention=LOSSLESS, inner="aot_eager")
    got = run(torch.compile(Fused(), backend=backend), inputs)
    wanted = run(Fused(), [x.detach().float().requires_grad_() for x in inputs])
    assert got[0].dtype == torch.bfloat16
    for a, b in zip(got, wanted, strict=True):  # once rounded to bfloat16
        assert torch.allclose(a.float(), b, rtol=2**-7, atol=1e-3)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(Fused(), backend=backend)(*values())
    assert out.dtype == torch.bfloat16


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def block(self, x):
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


@pytest.mark.parametrize("model", [Blocks(), Fused()], ids=["checkpoint", "no weights"])
def test_a_schedule_reaches_attention(model):
    """In a checkpoint's body too, and in a graph without weights: rounded up to a draw, then not; nothing is compiled
    again."""
    schedule = Schedule(attention=(0, 2))
    backend = gws_compile.backend(
        "e8m23", noise="none", attention="fp8_tiles", schedule=schedule, inner="aot_eager", exclude=()
    )
    compiled = torch.compile(model, backend=backend)
    inputs = [torch.randn(2, 8, 32)] if isinstance(model, Blocks) else values()
    seen = []
    for _ in range(4):
        compiled(*inputs).sum().backward()
        seen.append(torch.allclose(compiled(*inputs), model(*inputs), atol=1e-5))
        backend.step()
    assert seen == [False, False, True, True]
    assert len(backend.graphs) == 1
