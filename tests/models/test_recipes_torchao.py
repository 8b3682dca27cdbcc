"""Recipes beside torchao: codes and scales of every operand of a linear layer's three products."""

import pytest
import torch
from support.recipe_oracle import rounded, transformed
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


@pytest.mark.parametrize("mode", ["FLOOR", "RCEIL"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float4_e2m1fn_x2])
def test_mx_operands(layer, mode, dtype):
    """Each operand is what torchao's MXTensor holds, along what is summed over: codes and scales, so values."""
    model, x, g = layer
    name = "mxfp8" if dtype == torch.float8_e4m3fn else "mxfp4"
    if mode == "RCEIL" and name == "mxfp4":
        pytest.skip("torchao rounds the scale of MXFP4 up by another rule")
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


def test_nvfp4_operands(layer):
    """Activations along their features, and transformed along the tokens: what torchao's reference quantizes.

    torchao divides where the recipe's source multiplies by a reciprocal: values are those of its codes and scales but
    for a share of blocks whose scale rounds the other way.
    """
    model, x, g = layer
    met, _ = operands_of_products({"recipe": "nvfp4"}, model, x, g)
    w = model[0].weight.detach()
    forward, dgrad, wgrad = in_order(met, x, w, g)

    def theirs(value):
        value = value.detach().contiguous()
        of_tensor = per_tensor_amax_to_scale(value.abs().max())
        scales, packed = nvfp4_quantize(value, per_tensor_scale=of_tensor)
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()
        levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes]
        return levels * (scales.float() * of_tensor).repeat_interleave(16, 1)

    for ours, value in ((forward[0], x), (wgrad[1].t(), transformed(x.detach().t(), 16))):
        close = torch.isclose(ours, theirs(value), rtol=1e-5, atol=1e-7)
        assert close.float().mean() > 0.98
    assert torch.equal(forward[0], rounded(x.detach(), Operand("nvfp4")))
    assert torch.equal(forward[1].t(), gws_compile.quantize(w, "nvfp4"))
    assert torch.equal(dgrad[1], forward[1].t())  # squares: the same values both ways
    # Gradients are rounded up or down, to the grid that nearest rounding has.
    scale = gws_compile.quantize(g, "fp4_e2m1", (1, 16), "nvfp4")
    assert (dgrad[0] - g).abs().max() <= 2 * (scale - g).abs().max() + g.abs().max() / 3
