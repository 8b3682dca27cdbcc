"""What only a CUDA device can show; `test_triton_code.py` holds the same kernels through Triton's interpreter.

`GPU_TESTS_DEVICE=cpu` rehearses them: all that does not ask the device for what it alone has runs on the CPU.
"""

import os

import pytest
import torch
from support.oracle import assert_bits_equal, sample_oracle
from torch import nn
from torch._inductor.utils import run_and_get_code

import gws_compile
from gws_compile.numerics.keys import key_words

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
CUDA = DEVICE == "cuda"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # the identity matrix must return the weight itself
    yield
    torch.set_float32_matmul_precision(precision)


def oracle(weight, step, fmt, noise):
    fmt = gws_compile.FloatFormat.parse(fmt)
    value = weight.detach().float().cpu().numpy()
    return torch.from_numpy(sample_oracle(value, key_words(0, "0.weight"), step, fmt, fmt.noise_bits, noise))


@pytest.mark.parametrize("noise", ["rounded_normal", "uniform"])
@pytest.mark.parametrize("fmt", ["fp8_e4m3", "fp4_e2m1", "fp8_e5m2", "bf16"])
def test_the_weight_that_a_linear_uses(fmt, noise):
    model = nn.Sequential(nn.Linear(200, 136, bias=False)).to(DEVICE)
    backend = gws_compile.backend(fmt, noise=noise)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    eye = torch.eye(200, device=DEVICE)
    for step in range(2):
        out = compiled(eye)
        assert torch.equal(out.detach().t().cpu(), oracle(model[0].weight, step, fmt, noise))
        out.sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(compiled(eye).t(), gws_compile.quantize(model[0].weight, fmt))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eager_kernel_equals_the_cpu(dtype):
    w = torch.randn(300, 200, dtype=dtype)
    w[5, 5], w[64:96, :32] = float("nan"), 0
    for fmt in ("fp8_e4m3", "fp4_e2m1", "e7m23", "bf16"):
        assert_bits_equal(gws_compile.quantize(w.to(DEVICE), fmt).cpu(), gws_compile.quantize(w, fmt))


def test_kernels_of_one_linear():
    """One kernel samples the weight: block maximum, noise, cast and bf16 conversion."""
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False)).to(DEVICE)
    compiled = torch.compile(model, backend=gws_compile.backend(), fullgraph=True)
    x = torch.randn(64, 1024, device=DEVICE, dtype=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        _, code = run_and_get_code(lambda: compiled(x).sum().backward())
    assert code[0].count("@triton.jit") == (1 if CUDA else 0)
    assert "torch.ops.gws" not in "".join(code)


@pytest.mark.parametrize("backward", ["save", "recompute"])
def test_lossless_format_without_noise_is_plain_inductor(backward):
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(DEVICE)
    x = torch.randn(64, 256, device=DEVICE)
    results = []
    for settings in ({}, {"backend": gws_compile.backend("e8m23", noise="none", backward=backward)}):
        torch._dynamo.reset()
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            out = torch.compile(model, fullgraph=True, **settings)(x)
        out.float().square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_steps_do_not_synchronize():
    model = nn.Sequential(nn.Linear(256, 256)).to(DEVICE)
    compiled = torch.compile(model, backend=gws_compile.backend(), fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(8, 256, device=DEVICE)
    for step in range(4):
        if step == 1 and CUDA:
            torch.cuda.set_sync_debug_mode("error")
        compiled(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if CUDA:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graphs():
    """``mode="reduce-overhead"``: each replay sees the draw of its step; gradients are those of the default mode."""
    results = []
    for mode in (None, "reduce-overhead"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(200, 136, bias=False)).to(DEVICE)
        compiled = torch.compile(model, backend=gws_compile.backend("fp6_e3m2"), fullgraph=True, mode=mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        eye, used = torch.eye(200, device=DEVICE), []
        for step in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            out = compiled(eye)
            used.append(out.detach().clone())
            assert torch.equal(out.detach().t().cpu(), oracle(model[0].weight, step, "fp6_e3m2", "rounded_normal"))
            out.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(used)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
