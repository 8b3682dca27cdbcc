"""Recipes beside torchao: codes and scales of every operand of a linear layer's three products."""

import pytest
import torch
from support.recipe_oracle import hadamard_matrix, rounded, transformed
from torch import nn

import gws_compile
from gws_compile import Operand

pytest.importorskip("torchao")

from torchao.prototype.moe_training.mxfp8_linear import mx_mm
from torchao.prototype.mx_formats.config import (
    MXFP8Dim0CastKernelChoice,
    MXFP8Dim1CastKernelChoice,
    ScaleCalculationMode,
)
from torchao.prototype.mx_formats.mx_tensor import MXTensor, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

TOKENS, INPUTS, OUTPUTS = 64, 96, 128


def operands_of_products(backend, layer, x, upstream):
    """What a compiled layer's three products multiply: the graphs of forward and backward are run node by node."""
    met = []

    def inner(graph, inputs):
        class Watched(torch.fx.Interpreter):
            def call_function(self, target, args, kwargs):
                if getattr(target, "overloadpacket", None) in (torch.ops.aten.mm, torch.ops.aten.addmm):
                    met.append([one.clone() for one in args if isinstance(one, torch.Tensor) and one.ndim == 2][-2:])
                return super().call_function(target, args, kwargs)

        return lambda *args: Watched(graph).run(*args)

    config = dict(backend)
    compiled = torch.compile(layer, backend=gws_compile.backend(inner=inner, exclude=(), **config))
    y = compiled(x)
    y.backward(upstream)
    return met, y


@pytest.fixture
def layer():
    torch._dynamo.reset()
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False))
    x = (torch.randn(TOKENS, INPUTS) * torch.logspace(-2, 1, INPUTS)).requires_grad_()
    return made, x, torch.randn(TOKENS, OUTPUTS) * torch.logspace(1, -3, OUTPUTS)


def in_order(met, x, w, g):
    """forward (x, w^T), wgrad and dgrad, by the shapes of what is multiplied."""
    forward = met[0]
    backward = {tuple(out for out in (a.shape[0], b.shape[1])): (a, b) for a, b in met[1:]}
    return forward, backward[TOKENS, INPUTS], backward[OUTPUTS, INPUTS]


@pytest.mark.parametrize(
    ("name", "dtype", "mode"),
    [
        ("mxfp8", torch.float8_e4m3fn, "FLOOR"),
        ("mxfp8", torch.float8_e4m3fn, "RCEIL"),
        ("mxfp4", torch.float4_e2m1fn_x2, "FLOOR"),  # of MXFP4 torchao rounds the scale up by another rule
    ],
)
def test_mx_operands(layer, name, dtype, mode):
    """Each operand is what torchao's MXTensor holds, along what is summed over: codes and scales, so values."""
    model, x, g = layer
    scale = {"FLOOR": "floor", "RCEIL": "ceil"}[mode]
    operand = Operand(name, scale=scale)
    settings = {
        "fmt": name, "block": (1, 32), "scale": scale, "noise": "none", "activations": operand, "gradients": operand,
    }  # fmt: skip
    met, _ = operands_of_products(settings, model, x, g)
    w = model[0].weight.detach()
    forward, dgrad, wgrad = in_order(met, x, w, g)

    def theirs(value):
        scales, codes = to_mx(value.detach().contiguous(), dtype, 32, ScaleCalculationMode[mode])
        made = MXTensor(
            codes, scales, dtype, 32, torch.float32, KernelPreference.EMULATED, None, False
        )  # fmt: skip
        return made.dequantize(torch.float32)

    assert torch.equal(forward[0], theirs(x)) and torch.equal(forward[1].t(), theirs(w))  # noqa: PT018
    assert torch.equal(dgrad[0], theirs(g)) and torch.equal(dgrad[1], theirs(w.t()).t())  # noqa: PT018
    assert torch.equal(wgrad[0], theirs(g.t())) and torch.equal(wgrad[1], theirs(x.t()).t())  # noqa: PT018


def test_a_layer_is_torchaos_mxfp8_layer(layer):
    """Output and gradients of its emulated MXFP8 product, which multiplies what was rounded in float32."""
    model, x, g = layer
    backend = gws_compile.backend(recipe="mxfp8", inner="aot_eager", exclude=())
    y = torch.compile(model, backend=backend)(x)
    got = [y.detach(), *torch.autograd.grad(y, [x, model[0].weight], g)]
    y = mx_mm.apply(
        x, model[0].weight, torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e4m3fn, 32,
        KernelPreference.EMULATED, MXFP8Dim0CastKernelChoice.TORCH, MXFP8Dim1CastKernelChoice.TORCH,
        ScaleCalculationMode.FLOOR, False,
    )  # fmt: skip
    wanted = [y.detach(), *torch.autograd.grad(y, [x, model[0].weight], g)]
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max())


def exact_for_torchao(rows, cols):
    """Values for which torchao's order of operations rounds as the recipe's source does: see test_nvfp4_torchao."""
    values = torch.randn(rows, cols) ** 3
    values *= 2.0 ** -torch.randint(3, (rows, cols // 16)).repeat_interleave(16, 1)
    values = (values.bfloat16().float().clamp(-40, 40) * 2.0**5).round()
    values[:, ::16] = values[:, ::16].sign() * values[:, ::16].abs().clamp(min=64.0)  # no block of a small maximum
    values[3, 7] = -2688.0
    return values


def nvfp4_of_torchao(value):
    """What its quantizer's codes and scales stand for; and the spacing of each block's levels from 4 on, the widest."""
    of_tensor = per_tensor_amax_to_scale(value.abs().max())
    assert of_tensor == 1
    scales, packed = nvfp4_quantize(value, per_tensor_scale=of_tensor)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes]
    scale = (scales.float() * of_tensor).repeat_interleave(16, 1)
    return levels * scale, scale


def test_nvfp4_operands(layer):
    """Activations along their features, and transformed along the tokens; weights in squares, both ways the same."""
    model, _, g = layer
    x = exact_for_torchao(TOKENS, INPUTS)
    met, _ = operands_of_products({"recipe": "nvfp4"}, model, x.clone().requires_grad_(), g)
    w = model[0].weight.detach()
    forward, dgrad, _ = in_order(met, x, w, g)
    assert torch.equal(forward[0], nvfp4_of_torchao(x)[0])
    assert torch.equal(forward[0], rounded(x, Operand("nvfp4")))
    assert torch.equal(forward[1].t(), gws_compile.quantize(w, "nvfp4"))
    assert torch.equal(dgrad[1], forward[1].t())


def test_nvfp4_operands_of_wgrad(layer):
    """The rotation of the tokens is undone before, exactly, so that what is rounded has few bits again."""
    model, _, g = layer
    turned = exact_for_torchao(INPUTS, TOKENS)
    back = (turned.double().reshape(INPUTS, -1, 16) @ hadamard_matrix(16).t()).reshape(INPUTS, TOKENS)
    x = back.t().float().contiguous()
    assert torch.equal(transformed(x.t(), 16), turned)
    met, _ = operands_of_products({"recipe": "nvfp4"}, model, x.requires_grad_(), g)
    _, _, wgrad = in_order(met, x, model[0].weight.detach(), g)
    assert torch.equal(wgrad[1].t(), nvfp4_of_torchao(turned)[0])


def test_nvfp4_gradients(layer):
    """Their scales are torchao's, and each element is one of the two levels around it."""
    model, x, _ = layer
    g = exact_for_torchao(TOKENS, OUTPUTS)
    met, _ = operands_of_products({"recipe": "nvfp4"}, model, x, g)
    _, dgrad, _ = in_order(met, x, model[0].weight.detach(), g)
    nearest, scale = nvfp4_of_torchao(g)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    level = (dgrad[0] / scale).abs()
    assert torch.isin(level, grid).all()
    value = (g / scale).abs().clamp(max=6)
    above = torch.searchsorted(grid, value)
    neighbours = grid[(above - 1).clamp(min=0)], grid[above]
    on_grid = torch.isin(value, grid)
    assert ((level == neighbours[0]) | (level == neighbours[1]))[~on_grid].all()
    assert torch.equal(dgrad[0][on_grid], nearest[on_grid])
    assert 0.3 < (dgrad[0] == nearest)[~on_grid].float().mean() < 1
