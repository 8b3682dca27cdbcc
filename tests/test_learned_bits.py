"""Learned bit widths: the arithmetic against float64 and `quantize`, the gradient, and what a user does with them."""

import gc
import io
import math
import re
import warnings

import numpy as np
import pytest
import torch
from support.oracle import (
    assert_bits_equal,
    block_maximum_oracle,
    noise_oracle,
    random_floats,
    random_words,
)
from torch import nn
from torch._inductor.utils import run_and_get_code

import gws_compile
import gws_compile.lowering  # what torch.compile needs without the backend
from gws_compile import LearnedBits, learned
from gws_compile.keys import key_words
from gws_compile.primitives import TorchPrimitives
from gws_compile.sampling import OPERATOR_VERSION

P = TorchPrimitives()
RULE = learned.WidthRule.of(LearnedBits())
KEY = torch.tensor(key_words(0, "w"), dtype=torch.int32)


@pytest.fixture(autouse=True)
def _fresh():
    gc.collect()  # backends of earlier tests, which would follow the optimizers of this one
    torch._dynamo.reset()
    torch.manual_seed(0)


# --- Arithmetic ------------------------------------------------------------------------------------------------------


def test_amplitude():
    """``a * 2**(1 - b)`` to 4e-6 for every b, exact for whole b."""
    b = torch.cat([torch.linspace(2, 24, 100_001), torch.arange(2, 25).float()])
    amax = torch.rand(b.shape) + 0.5
    got = learned.amplitude(P, b, amax).double()
    exact = amax.double() * 2.0 ** (1 - b.double())
    assert ((got - exact).abs() / exact).max() < 4e-6
    assert torch.equal(got[-23:], exact[-23:])


def test_widths():
    """``target + b_i (init - target)`` within min and max, and back."""
    parameter = torch.tensor([1.0, 0.0, 0.5, -2.0, 5.0, 3.0])
    assert RULE.widths(parameter).tolist() == [6.0, 4.0, 5.0, 2.0, 10.0, 10.0]
    rule = learned.WidthRule.of(LearnedBits(init=5.3, target=7.7, max=12))
    widths = torch.linspace(2, 12, 1001)
    assert (rule.widths(rule.parameter(widths)) - widths).abs().max() < 4e-6
    assert learned.WidthRule.parse(rule.spec) == rule


@pytest.mark.parametrize(
    ("width", "fmt"),
    [(2.0, "fp4_e2m1"), (3.0, "fp4_e2m1"), (3.0005, "fp4_e2m1"), (3.01, "fp6_e3m2"), (4.5, "fp8_e4m3"),
     (5.0, "fp8_e4m3"), (5.1, "fp12_e4m7"), (9.0, "fp12_e4m7"), (9.1, "bf16"), (10.0, "bf16")],
)  # fmt: skip
def test_the_cheapest_format_that_reaches_a_width(width, fmt):
    assert RULE.formats[int(RULE.index(torch.tensor(width)))].name == fmt


def sample(
    w, parameter, rule, *, fmt="bf16", noise="none", clock=(0, 0, 0), block=(32, 32), scale="floor", batch_dims=0
):
    key = None if noise == "none" else KEY
    clock = None if noise == "none" else torch.tensor(clock, dtype=torch.int32)
    return torch.ops.gws.sample_weight(
        w, key, clock, batch_dims, gws_compile.FloatFormat.parse(fmt).spec, 0.0, noise, list(block), scale,
        parameter, rule.spec, [], [], None, True, OPERATOR_VERSION,
    )  # fmt: skip


FORMATS = ("fp4_e2m1", "fp6_e3m2", "fp6_e2m3", "fp8_e4m3", "fp8_e5m2", "fp12_e4m7", "e5m10", "e2m22", "bf16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["floor", "ceil", ""])
def test_a_block_is_cast_as_quantize_casts_it(scale, dtype):
    """Every format as an operand of the mixed cast: bit for bit, weights of all magnitudes, NaN and zero blocks."""
    ordinary = random_floats((100, 72), 1, (-30, 5))
    for exponents in ((-30, 5), (-120, -90), (60, 90)):
        w = torch.from_numpy(np.where(np.arange(72) % 7 == 0, ordinary, random_floats((100, 72), 2, exponents)))
        if dtype == torch.float16:
            w = w.clamp(-60000, 60000)
        w = w.to(dtype)
        w[40, 40], w[:32, 32:64] = float("nan"), 0
        for fmt in FORMATS:
            rule = learned.WidthRule.of(LearnedBits(formats=(fmt,)))
            expected = gws_compile.quantize(w, fmt, scale=scale or None)
            expected[32:64, 32:64] = float("nan")  # the block maximum is read even where the cast alone would not
            assert_bits_equal(sample(w, torch.ones(()), rule, scale=scale), expected)


def test_each_block_has_its_own_format():
    """Widths chosen block by block, compiled and eager, with experts and partial blocks."""
    for shape, dims in (((100, 72), 0), ((3, 40, 70), 1), ((20, 10, 3, 3), 0)):
        torch._dynamo.reset()
        w = torch.randn(shape)
        matrices, rows, cols = learned_shape = (shape[0], *shape[1:]) if dims else (1, shape[0], math.prod(shape[1:]))
        size = learned.parameter_shape(matrices, rows, cols, (32, 32), "block")
        five = [3.0, 4.0, 5.0, 9.0, 10.0]
        widths = torch.tensor(five)[torch.randint(5, size)]
        parameter = RULE.parameter(widths)
        expected = torch.empty(learned_shape)
        names = ["fp4_e2m1", "fp6_e3m2", "fp8_e4m3", "fp12_e4m7", "bf16"]
        casts = {b: gws_compile.quantize(w, f).view(learned_shape) for b, f in zip(five, names, strict=True)}
        by_matrix = widths.view(matrices, *size[-2:])
        for m in range(matrices):
            for i in range(size[-2]):
                for j in range(size[-1]):
                    at = (m, slice(32 * i, 32 * i + 32), slice(32 * j, 32 * j + 32))
                    expected[at] = casts[by_matrix[m, i, j].item()][at]
        assert_bits_equal(sample(w, parameter, RULE, batch_dims=dims), expected.view(shape))
        compiled = torch.compile(lambda w, b, dims=dims: sample(w, b, RULE, batch_dims=dims), fullgraph=True)
        assert_bits_equal(compiled(w, parameter), expected.view(shape))


@pytest.mark.parametrize("noise", ["rounded_normal", "uniform"])
def test_compiled_equals_eager(noise):
    """Noise at learned widths, bit for bit; switched off it is the cast of the widths' formats, frozen it is both."""
    w, parameter = torch.randn(100, 72), torch.rand(4, 3) * 4 - 1

    def run(w, b, clock):
        return torch.ops.gws.sample_weight(
            w,
            KEY,
            clock,
            0,
            "e8m7",
            0.0,
            noise,
            [32, 32],
            "floor",
            b,
            RULE.spec,
            [],
            [],
            None,
            True,
            OPERATOR_VERSION,
        )

    compiled = torch.compile(run, fullgraph=True)
    clocks = [torch.tensor(c, dtype=torch.int32) for c in ((3, -1, 0), (3, 0, 0), (3, -1, -1), (4, 0, -1))]
    drawn, plain, frozen, frozen_plain = (compiled(w, parameter, c) for c in clocks)
    for got, clock in zip((drawn, plain, frozen, frozen_plain), clocks, strict=True):
        assert_bits_equal(got, run(w, parameter, clock))
    assert_bits_equal(plain, sample(w, parameter, RULE))
    assert_bits_equal(frozen_plain, plain)
    # The noise is that of the equation, cast to bf16 while widths move and to each block's format when they are frozen.
    words = random_words(np.arange(w.numel()), key_words(0, "w"), 3)
    r = noise_oracle(words, noise).reshape(w.shape)
    amax = block_maximum_oracle(w.numpy()[None], (32, 32))[0].astype(np.float64)
    b = RULE.widths(parameter).double().numpy().repeat(32, 0)[:100].repeat(32, 1)[:, :72]
    exact = torch.from_numpy(w.numpy() + r * amax * 2 ** (1 - b))
    assert ((drawn - exact).abs() <= exact.abs() * 2.0**-8 + amax.max() * 1e-5).all()
    assert_bits_equal(frozen, sample(frozen, parameter, RULE))  # on the grid already


# --- Gradient --------------------------------------------------------------------------------------------------------


def gradient_oracle(grad, w, step, noise, rule, parameter, block, dims):
    """The equation in float64, block by block."""
    shape = (w.shape[0], w.shape[1], math.prod(w.shape[2:])) if dims else (1, w.shape[0], math.prod(w.shape[1:]))
    r = noise_oracle(random_words(np.arange(w.numel()), key_words(0, "w"), step), noise).reshape(shape)
    value, grad = w.float().numpy().reshape(shape), grad.double().numpy().reshape(shape)
    amax = block_maximum_oracle(value, block)
    size = (shape[0], -(-shape[1] // block[0]), -(-shape[2] // block[1]))
    total = np.zeros(size)
    b = np.clip(rule.target + parameter.double().numpy() * (rule.init - rule.target), rule.min, rule.max)
    b = np.broadcast_to(b.reshape(size) if parameter.ndim else b, size)
    for m, i, j in np.ndindex(size):
        at = (m, slice(block[0] * i, block[0] * (i + 1)), slice(block[1] * j, block[1] * (j + 1)))
        a = float(amax[at].flat[0])
        total[m, i, j] = -math.log(2) * 2.0 ** (1 - b[m, i, j]) * a * float((grad[at] * r[at]).sum())
    total = total * (rule.init - rule.target)
    return torch.from_numpy(np.array(total.sum()) if parameter.ndim == 0 else total.reshape(parameter.shape))


@pytest.mark.parametrize(
    ("noise", "granularity"),
    [
        ("rounded_normal", "block"),
        pytest.param("rounded_normal", "weight", marks=pytest.mark.slow),
        pytest.param("uniform", "block", marks=pytest.mark.slow),
        ("uniform", "weight"),
    ],
)
def test_gradient_is_the_equation(noise, granularity):
    """Against float64, on whole and partial blocks, experts, convolutions and bfloat16; eager and compiled."""
    cases = [
        ((64, 96), 0, (32, 32), torch.float32),
        ((70, 45), 0, (32, 32), torch.float32),
        ((5, 7), 0, (32, 32), torch.float32),
        ((33, 100), 0, (16, 48), torch.bfloat16),
        ((3, 40, 33), 1, (32, 32), torch.float32),
        ((20, 10, 3, 3), 0, (8, 24), torch.float32),
    ]
    rule = learned.WidthRule.of(LearnedBits(init=5.5, target=4.25))

    def run(weights, parameters):
        clock = torch.tensor([9, -1, 0], dtype=torch.int32)
        return [
            torch.ops.gws.sample_weight(
                w,
                KEY,
                clock,
                dims,
                "e8m7",
                0.0,
                noise,
                list(block),
                "floor",
                b,
                rule.spec,
                [],
                [],
                None,
                True,
                OPERATOR_VERSION,
            )
            for w, b, (_, dims, block, _) in zip(weights, parameters, cases, strict=True)
        ]

    weights = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape, _, _, dtype in cases]
    parameters = []
    for shape, dims, block, _ in cases:
        matrices = (shape[0], shape[1], math.prod(shape[2:])) if dims else (1, shape[0], math.prod(shape[1:]))
        size = learned.parameter_shape(*matrices, block, granularity)
        parameters.append(torch.rand(size).requires_grad_())
    upstream = [torch.randn(w.shape, dtype=w.dtype) for w in weights]
    expected = [
        gradient_oracle(g, w.detach(), 9, noise, rule, b.detach(), block, dims)
        for g, w, b, (_, dims, block, _) in zip(upstream, weights, parameters, cases, strict=True)
    ]
    for call in (run, torch.compile(run, fullgraph=True)):
        for tensor in (*weights, *parameters):
            tensor.grad = None
        torch.autograd.backward(call(weights, parameters), upstream)
        for w, b, g, want in zip(weights, parameters, upstream, expected, strict=True):
            assert torch.equal(w.grad, g)  # the identity, as with fixed widths
            # 1e-5 of the largest: the sum over a block of up to 2e4 terms of either sign, in float32
            torch.testing.assert_close(b.grad.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_gradient_is_that_of_the_expected_loss():
    """Finite differences of the mean loss over 24 draws, the same draws on both sides."""
    w, target = torch.randn(64, 64), torch.randn(64, 64)
    rule = learned.WidthRule.of(LearnedBits(formats=("fp4_e2m1", "e8m22")))

    def mean_loss(parameter):
        total = torch.zeros((), dtype=torch.float64)
        for step in range(24):
            used = sample(w, parameter, rule, fmt="e8m22", noise="rounded_normal", clock=(step, -1, 0))
            total = total + ((used - target) ** 2).double().sum() / 24
        return total

    parameter = torch.full((2, 2), 0.4).requires_grad_()
    mean_loss(parameter).backward()
    for at in ((0, 0), (1, 0)):
        shift = torch.zeros(2, 2)
        shift[at] = 2.0**-7
        difference = (mean_loss(parameter.detach() + shift) - mean_loss(parameter.detach() - shift)) / 2.0**-6
        assert parameter.grad[at].item() == pytest.approx(difference.item(), rel=2e-3)


def test_gradients_lead_back_into_the_range():
    """Beyond min or max only the gradient whose descent step goes back passes."""
    rule = learned.WidthRule.of(LearnedBits(init=6, target=4, min=3, max=8))
    parameter = torch.tensor([-1.0, -1.0, 3.0, 3.0, 1.0, 1.0])  # widths 2, 2, 10, 10, 6, 6
    gradient = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    got = learned.width_gradient(P, gradient, parameter, rule)
    assert got.tolist() == [0.0, -2.0, 2.0, 0.0, 2.0, -2.0]
    rising = learned.WidthRule.of(LearnedBits(init=4, target=6, min=3, max=8))  # b falls as b_i rises
    got = learned.width_gradient(P, gradient[:2], torch.tensor([2.0, 2.0]), rising)  # width 2
    assert got.tolist() == [0.0, 2.0]


# --- The backend -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.lm_head = nn.Linear(40, 72), nn.Linear(72, 40), nn.Linear(40, 8)

    def forward(self, x):
        return self.lm_head(x + self.down(self.up(x).relu()))


def make(**settings):
    inner = settings.pop("inner", "aot_eager")
    backward = settings.pop("backward", "save")
    return gws_compile.backend(bits=LearnedBits(**settings), inner=inner, backward=backward)


NAMES = ["up.weight.bits", "down.weight.bits"]


@pytest.mark.parametrize("backward", ["save", "recompute"])
def test_nothing_is_stored_for_the_gradient(backward):
    """Saved for backward: what a fixed width keeps, the weight (a parameter) and the widths; no R, no maximum."""
    x, model = torch.randn(8, 40, requires_grad=True), Net()
    saved = []
    backend = make(inner="inductor", backward=backward)
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t),
    ):
        out = torch.compile(model, backend=backend)(x)
    out.float().sum().backward()
    own = {p.data_ptr() for p in (*model.parameters(), *backend.parameters())}
    large = [t for t in saved if t.numel() == 40 * 72 and t.data_ptr() not in own]
    assert [t.dtype for t in large] == ([torch.bfloat16] * 2 if backward == "save" else [])
    blocks = [t for t in saved if tuple(t.shape) in ((3, 2), (2, 3)) and t.data_ptr() not in own]
    assert [t for t in blocks if t.is_floating_point()] == []
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backend.parameters())


def test_gradients_of_save_and_recompute_are_bit_identical():
    x, model, results = torch.randn(8, 40), Net(), []
    for backward in ("save", "recompute"):
        torch._dynamo.reset()
        model.zero_grad()
        backend = make(inner="inductor", backward=backward)
        torch.compile(model, backend=backend)(x).square().sum().backward()
        results.append([p.grad.clone() for p in (*model.parameters(), *backend.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_fused_reduction():
    """Backward draws R again and reduces it and the block maximum in one kernel beside the gradient's own."""
    w, b = torch.randn(256, 256, requires_grad=True), torch.ones(8, 8, requires_grad=True)

    def run(w, b):
        return sample(w, b, RULE, noise="rounded_normal", clock=(1, -1, 0)).square()

    _, codes = run_and_get_code(lambda: torch.compile(run, fullgraph=True)(w, b).sum().backward())
    backward = codes[-1]
    assert "torch.ops.gws" not in "".join(codes)
    assert len(re.findall(r"^cpp_fused\w+ = async_compile", backward, re.M)) == 1
    # The columns' part of the element index, the block maxima and the sums; the gradient of w takes the place of the
    # sample. Nothing holds R.
    assert re.findall(r"= empty_strided_cpu\(\(([^)]*)\)", backward) == ["256, ", "1, 8, 8", "1, 8, 8"]


def test_prepare_computes_nothing_and_names_the_parameters():
    model, backend = Net(), make()
    generator = torch.get_rng_state()
    backend.prepare(model, torch.randn(8, 40))
    assert [(n, tuple(p.shape)) for n, p in backend.named_parameters()] == [
        ("up.weight.bits", (3, 2)), ("down.weight.bits", (2, 3))
    ]  # fmt: skip
    assert backend.graphs == []
    assert all(p.grad is None for p in model.parameters())
    first = list(backend.parameters())
    assert [p.dtype for p in first] == [torch.float32] * 2
    torch.compile(model, backend=backend)(torch.randn(8, 40)).sum().backward()
    assert all(a is b for a, b in zip(first, backend.parameters(), strict=True))
    assert all(p.grad is not None for p in first)
    assert backend.average_bits() == 6.0
    assert {n: b.unique().tolist() for n, b in backend.bits().items()} == {"up.weight": [6.0], "down.weight": [6.0]}
    torch.set_rng_state(generator)


def test_models_of_the_same_names_have_widths_of_their_own():
    one, two, three, backend = Net(), Net(), Net(), make(inner="eager")
    x = torch.randn(2, 40)
    backend.prepare(one, x)
    backend.prepare(two, x)
    backend.prepare(one, x)  # a second time changes nothing
    assert [n for n, _ in backend.named_parameters()] == [
        "up.weight.bits", "down.weight.bits", "up.weight#1.bits", "down.weight#1.bits"
    ]  # fmt: skip
    torch.compile(three, backend=backend)(x).sum().backward()  # not prepared, and the first to be used
    torch.compile(two, backend=backend)(x).sum().backward()
    parameters = dict(backend.named_parameters())
    used = {n for n, p in parameters.items() if p.grad is not None}
    assert used == {"up.weight#1.bits", "down.weight#1.bits", "up.weight#2.bits", "down.weight#2.bits"}
    backend.prepare(three, x)
    assert len(list(backend.parameters())) == 6


@pytest.mark.parametrize("how", ["compiled", "Module.compile", "blocks"])
def test_prepare_looks_into_wrappers(how):
    model, backend = nn.Sequential(Net(), nn.Linear(8, 8)), make()
    wrapped = model
    if how == "compiled":
        wrapped = torch.compile(model, backend=backend)
    elif how == "Module.compile":
        model[0].compile(backend=backend)
    elif how == "blocks":
        model[0].up.compile(backend=backend)
        model[0].down.compile(backend=backend)
    backend.prepare(wrapped, torch.randn(8, 40))
    names = [f"0.{n}" for n in NAMES]
    assert [n for n, _ in backend.named_parameters()][:2] == names
    before = dict(backend.named_parameters())
    wrapped(torch.randn(8, 40)).sum().backward()
    if how != "blocks":  # a Linear is a frame of torch's own, which torch does not compile
        assert before["0.up.weight.bits"].grad is not None


def train(model, backend, steps, *, lr=0.02, coefficient=None, seed=0):
    compiled = torch.compile(model, backend=backend)
    backend.prepare(model, torch.randn(16, 40))
    optimizer = torch.optim.Adam(
        [{"params": list(model.parameters()), "lr": 1e-3}, {"params": list(backend.parameters()), "lr": lr}]
    )
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(40, 8, generator=generator)
    for _ in range(steps):
        x = torch.randn(16, 40, generator=generator)
        loss = (compiled(x) - x @ teacher).square().mean()
        if coefficient is not None:
            loss = loss + coefficient * backend.bit_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return compiled


def test_bit_loss():
    model, backend = Net(), make(target=4.0)
    with pytest.raises(RuntimeError, match=r"no weight with learned bits is known yet.*Backend.prepare"):
        backend.bit_loss()
    backend.prepare(model, torch.randn(2, 40))
    up, down = backend.parameters()
    with torch.no_grad():
        up.copy_(torch.tensor([[1.0, 0.5], [0.0, -0.5], [2.0, 9.0]]))  # widths 6, 5, 4, 3, 8, 10 (clamped)
        down.fill_(0.25)  # 4.5
    assert backend.bit_loss().item() == pytest.approx(((2 + 1 + 0 + 1 + 4 + 6) / 6 + 0.5) / 2)
    backend.bit_loss().backward()
    assert torch.allclose(up.grad * 12, torch.tensor([[2.0, 2.0], [0.0, -2.0], [2.0, 2.0]]))
    assert torch.allclose(down.grad, torch.full((2, 3), 2 / 12))
    # both weights have 2,880 elements: by size is alike
    assert backend.bit_loss(weighting="size").item() == pytest.approx(backend.bit_loss().item())
    # blocks are 32 or 8 rows by 32 or 8 columns, and only the average counts elements
    elements = torch.tensor([[1024.0, 256.0], [1024.0, 256.0], [256.0, 64.0]])
    mean = ((elements * torch.tensor([[6.0, 5.0], [4.0, 3.0], [8.0, 10.0]])).sum() + 2880 * 4.5) / 5760
    assert backend.average_bits() == pytest.approx(mean.item())
    with pytest.raises(ValueError, match="weighting must be 'weight' or 'size', got 'blocks'"):
        backend.bit_loss(weighting="blocks")


def test_the_coefficient_pulls_to_the_target():
    backend = make(target=4.0)
    train(Net(), backend, 150, coefficient=1.0)
    assert abs(backend.average_bits() - 4.0) < 0.1


@pytest.mark.parametrize(
    ("average", "lr", "granularity"), [(5.0, 0.02, "block"), (3.2, 0.005, "block"), (8.0, 0.02, "weight")]
)
def test_the_average_is_met(average, lr, granularity):
    """With the term as it is, in one graph."""
    backend = make(average=average, granularity=granularity)
    model = Net()
    train(model, backend, 600, lr=lr, coefficient=1)
    assert abs(backend.average_bits() - average) < 0.05
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("granularity", ["block", "weight"])
def test_report_and_picture(granularity, tmp_path):
    """Average, shares and bytes of each weight and of all; a picture of the widths and their history."""
    pytest.importorskip("matplotlib")
    model, backend = Net(), make(granularity=granularity, inner="eager")
    with pytest.raises(ValueError, match="there are no learned bit widths to draw yet"):
        backend.plot_bits(tmp_path / "bits.png")
    assert backend.report().bits is None
    train(model, backend, 5, coefficient=1.0)
    up, down = backend.parameters()
    with torch.no_grad():
        up.fill_(-0.5)  # 3 bits: fp4_e2m1
        down.fill_(0.5)  # 5 bits: fp8_e4m3
    summary = backend.report().bits
    assert summary.average == pytest.approx(4.0)
    assert summary.share == {"fp4_e2m1": 0.5, "fp6_e3m2": 0.0, "fp8_e4m3": 0.5, "fp12_e4m7": 0.0, "bf16": 0.0}
    # half a byte and a byte per element, and a byte for the scale of each of the 6 blocks
    assert summary.by_weight["up.weight"].stored_bytes == 2880 // 2 + 6
    assert summary.by_weight["down.weight"].stored_bytes == 2880 + 6
    assert summary.stored_bytes == 2880 * 3 // 2 + 12
    text = str(backend.report())
    assert "learned bit widths" in text
    assert "up.weight                  3.00     100.0 %" in text
    backend.plot_bits(tmp_path / "bits.png")
    assert (tmp_path / "bits.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(RuntimeError, match=r"plot_bits\(\) needs bits=LearnedBits"):
        gws_compile.backend().plot_bits(tmp_path / "bits.png")


def test_history_keeps_few_snapshots():
    from gws_compile.bit_history import MOST, BitHistory

    history = BitHistory(2.0, 10.0)
    for step in range(1, 1001):
        if history.due():
            history.record(torch.full((4,), 2.0 + 8.0 * step / 1000), torch.full((4,), 0.25))
    assert len(history.steps) <= MOST
    assert history.steps[-1] > 980
    shares = history.histograms()
    assert torch.equal(shares.sum(1), torch.ones(len(history.steps)))
    places = shares.argmax(1)
    assert (places[1:] >= places[:-1]).all()


def test_frozen_bits():
    model, backend = Net(), make()
    compiled = train(model, backend, 30, coefficient=1.0)
    before = backend.bits()
    backend.freeze_bits()
    rule = backend._bits.rule
    for name, widths in backend.bits().items():
        assert torch.equal(widths, rule.rounded(before[name]))
        assert torch.equal(rule.index(widths), rule.index(before[name]))
    x = torch.randn(4, 40)
    with torch.no_grad():
        cast = compiled(x)
    with backend.noise(False):
        assert torch.equal(compiled(x).detach(), cast)
    graphs = len(backend.graphs)
    loss = compiled(x).sum()
    loss.backward()
    assert all(p.grad is None for p in backend.parameters())
    assert model.up.weight.grad is not None
    assert len(backend.graphs) == graphs
    with pytest.raises(RuntimeError, match=r"freeze_bits\(\) needs bits=LearnedBits"):
        gws_compile.backend().freeze_bits()


def test_frozen_bits_of_one_format_per_weight():
    model, backend = Net(), make()
    backend.prepare(model, torch.randn(2, 40))
    with torch.no_grad():
        for parameter in backend.parameters():
            parameter.copy_(torch.rand(parameter.shape) * 2 - 0.5)
    means = {n: e.elements.mul(backend.bits()[n]).sum() / e.elements.sum() for n, e in backend._bits.entries.items()}
    backend.freeze_bits(per_weight=True)
    for name, widths in backend.bits().items():
        assert len(widths.unique()) == 1
        assert widths.flatten()[0] >= means[name] - 1e-3


def test_evaluation_uses_the_formats_of_the_widths():
    model, backend = Net(), make()
    compiled = torch.compile(model, backend=backend)
    backend.prepare(model, torch.randn(2, 40))
    with torch.no_grad():
        for parameter, width in zip(backend.parameters(), (3.0, 5.0), strict=True):
            parameter.copy_(backend._bits.rule.parameter(torch.full(parameter.shape, width)))
        x = torch.randn(4, 40)
        got = compiled(x)
        up, down = (
            gws_compile.quantize(model.up.weight, "fp4_e2m1"),
            gws_compile.quantize(model.down.weight, "fp8_e4m3"),
        )
        hidden = nn.functional.linear(x, up, model.up.bias).relu()
        expected = model.lm_head(x + nn.functional.linear(hidden, down, model.down.bias))
    assert torch.equal(got, expected)


def test_a_width_that_no_optimizer_holds_is_said():
    model, backend = Net(), make()
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        compiled(torch.randn(2, 40)).sum().backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error", gws_compile.GwsWarning)
        for _ in range(9):
            step()
    with pytest.warns(gws_compile.GwsWarning, match="no optimizer has the bit widths, which do get gradients"):
        step()


def test_state():
    one, two = make(average=5.0), make(average=5.0)
    model = Net()
    train(model, one, 20, coefficient=1)
    state = one.state_dict()
    assert set(state) == {"seed", "fmt", "step", "weights", "bits", "frozen", "steering"}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    two.load_state_dict(torch.load(buffer, weights_only=True))
    two.prepare(model, torch.randn(2, 40))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert two.state_dict()["steering"] == state["steering"]
    other = make(average=5.0, granularity="weight")
    other.prepare(model, torch.randn(2, 40))
    with pytest.raises(ValueError, match=r"shape \(3, 2\) for up.weight, this backend has \(\)"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="steering missing"):
        two.load_state_dict({k: v for k, v in state.items() if k != "steering"})
    with pytest.raises(ValueError, match=r"no bit widths for up.weight.*Backend.prepare\(model, ...\) before a state"):
        make(average=5.0).load_state_dict({**state, "bits": {}})
    with pytest.raises(ValueError, match="not a state of gws_compile: bits, frozen missing"):
        make().load_state_dict(gws_compile.backend("bf16").state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": 1}, "LearnedBits.init must be a number from 2 to 24, got 1"),
        ({"min": 8, "max": 4}, "LearnedBits.min must be below max, got min=8, max=4"),
        ({"init": 11}, "LearnedBits.init must lie within min=2 and max=10, got 11"),
        ({"average": 1.5}, "LearnedBits.average must be a number from 2 to 24, got 1.5"),
        ({"init": 4}, "LearnedBits.init and target must differ, got 4 for both"),
        ({"granularity": "row"}, "LearnedBits.granularity must be 'block' or 'weight', got 'row'"),
        ({"formats": "fp8_e4m3"}, "LearnedBits.formats must be a list of formats, got 'fp8_e4m3'"),
        ({"formats": ("fp8_e4m3", "fp4_e2m1")}, r"must be different and ascend in mantissa bits.*fp8_e4m3 \(3\), fp4"),
        ({"formats": ("fp8_e4m4",)}, "'fp8_e4m4' says 8 bits"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LearnedBits(**settings)


def test_bad_backends():
    with pytest.raises(ValueError, match="learns from the noise: noise must not be 'none'"):
        gws_compile.backend(bits=LearnedBits(), noise="none")
    with pytest.raises(ValueError, match="fmt has at most 22 mantissa bits, got fp32_e8m23"):
        gws_compile.backend("e8m23", bits=LearnedBits())
    assert gws_compile.backend(bits=LearnedBits()).config.fmt.name == "bf16"
    assert gws_compile.backend("fp8_e4m3", bits=LearnedBits()).config.fmt.name == "fp8_e4m3"
    assert gws_compile.backend().config.fmt.name == "fp8_e4m3"
