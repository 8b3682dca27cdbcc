"""Learned bit widths as a user has them: parameters, loss terms, freezing, state, pictures."""

import io
import warnings

import pytest
import torch
from torch import nn

import gws_compile
import gws_compile.codegen.lowering  # what torch.compile needs without the backend
from gws_compile import LearnedBits

pytestmark = pytest.mark.usefixtures("fresh")

RULE = LearnedBits().rule


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
    ("average", "lr", "granularity"),
    [
        (5.0, 0.02, "block"),
        pytest.param(3.2, 0.005, "block", marks=pytest.mark.slow),
        pytest.param(8.0, 0.02, "weight", marks=pytest.mark.slow),
    ],
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


def test_frozen_bits():
    model, backend = Net(), make()
    compiled = train(model, backend, 30, coefficient=1.0)
    before = backend.bits()
    backend.freeze_bits()
    rule = backend.config.learned.rule
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
    means = {name: summary.average for name, summary in backend.report().bits.by_weight.items()}
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
            parameter.copy_(backend.config.learned.rule.parameter(torch.full(parameter.shape, width)))
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
    with pytest.warns(
        gws_compile.GwsWarning,
        match=r"no optimizer has the bit widths of up.weight, down.weight, which do get gradients",
    ):
        step()


def test_state():
    one, two = make(average=5.0), make(average=5.0)
    model = Net()
    train(model, one, 20, coefficient=1)
    state = one.state_dict()
    of_any = {"seed", "fmt", "step", "weights", "settings", "rules", "operands", "master", "updates"}
    assert set(state) == of_any | {"bits", "frozen", "steering"}
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
