"""Weights cast to levels that are trained: graphs against the unmodified model, whose weights numpy casts."""

import copy
import io
import sys

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from support.levels import cast_oracle, eager_step
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import gws_compile
from gws_compile import GwsWarning, Levels

TABLE = Levels.normal(3)

pytestmark = pytest.mark.usefixtures("fresh")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(40, 72), nn.Linear(72, 24, bias=False)

    def forward(self, x):
        return self.down(self.up(x).tanh())


def compiled(model, x, **settings):
    """The model, its backend and its levels by the weights' names."""
    pqt = gws_compile.backend(**{"fmt": TABLE, "inner": "eager", **settings})
    call = torch.compile(model, backend=pqt)
    pqt.prepare(model, x)
    return call, pqt


def levels_of(pqt):
    return {name.removesuffix(".levels"): parameter for name, parameter in pqt.named_parameters()}


def tables_of(levels, table=TABLE.table):
    return dict.fromkeys(levels, table)


def check(call, model, x, levels, block=(32, 32)):
    """One backward against the oracle: outputs and gradients of the model bit for bit."""
    out = call(x)
    out.square().sum().backward()
    loss, of_model, of_levels = eager_step(
        model, levels, tables_of(levels), lambda call: call(x).square().sum(), block=block
    )
    assert out.square().sum().item() == loss.item()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, of_model[name]), name
    for name, parameter in levels.items():
        # Both are sums in float64, in two orders, rounded once.
        torch.testing.assert_close(parameter.grad, of_levels[name].float(), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_step(inner):
    model, x = Net(), torch.randn(5, 40)
    call, pqt = compiled(model, x, inner=inner)
    levels = levels_of(pqt)
    assert {name: parameter.shape for name, parameter in levels.items()} == {"up.weight": (8,), "down.weight": (8,)}
    assert all(parameter.tolist() == list(TABLE.table) for parameter in levels.values())
    check(call, model, x, levels)
    with torch.no_grad():
        assert torch.equal(call(x), call(x))
        values = {n: cast_oracle(p, levels[n], TABLE.table) for n, p in model.named_parameters() if n in levels}
        assert torch.equal(call(x), functional_call(model, values, (x,)))
    assert [(r.fmt, r.noise, r.scale, r.bits) for r in pqt.report()] == [("levels8", "none", "amax", None)] * 2


@pytest.mark.parametrize("backward", ["save", "recompute"])
def test_inductor(backward):
    """Inductor compiles the cast, as plain operations, and has the same weights; products are its own."""
    model, x = Net(), torch.eye(40)
    call, pqt = compiled(model, x, inner="inductor", backward=backward)
    levels = levels_of(pqt)
    out = call(x)
    out.square().sum().backward()
    values = {n: cast_oracle(p, levels[n], TABLE.table) for n, p in model.named_parameters() if n in levels}
    torch.testing.assert_close(out, functional_call(model, values, (x,)))
    _, of_model, of_levels = eager_step(model, levels, tables_of(levels), lambda call: call(x).square().sum())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, of_model[name], rtol=1e-5, atol=1e-4)
    for name, parameter in levels.items():
        torch.testing.assert_close(parameter.grad, of_levels[name].float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 64), (24, 72)])
def test_inductor_has_the_eager_kernels_weight(shape):
    weight, levels = torch.randn(shape), torch.tensor(TABLE.table)

    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x):
            return x @ self.weight

    call, _ = compiled(Read(), torch.eye(shape[0]), inner="inductor")
    assert torch.equal(call(torch.eye(shape[0])).detach(), cast_oracle(weight, levels, TABLE.table))


@pytest.mark.parametrize("backward", ["save", "recompute"])
def test_what_is_kept_for_backward(backward):
    """The cast weight of the second layer, or nothing but the parameters: then backward casts it again."""
    kept = {}

    def keep(name):
        return lambda gm, inputs: (kept.update({name: gm}), make_boxed_func(gm.forward))[1]

    inner = aot_autograd(
        fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=min_cut_rematerialization_partition
    )
    model, x = Net(), torch.randn(5, 40)
    call, pqt = compiled(model, x, inner=inner, backward=backward)
    check(call, model, x, levels_of(pqt))
    casts = kept["backward"].graph.find_nodes(op="call_function", target=torch.ops.gws.cast_to_levels.default)
    assert len(casts) == (backward == "recompute")


@pytest.mark.parametrize("settings", [{"block": (1, None)}, {"block": (7, 16)}])
def test_blocks(settings):
    model, x = Net(), torch.randn(5, 40)
    call, pqt = compiled(model, x, **settings)
    check(call, model, x, levels_of(pqt), block=settings["block"])


def test_training():
    """Steps of SGD on weights and levels, whose order may change on the way: a loop without a compiler."""
    model, x = Net(), torch.randn(5, 40)
    expected = copy.deepcopy(model)
    call, pqt = compiled(model, x)
    levels = levels_of(pqt)
    call_levels = {name: parameter.detach().clone().requires_grad_() for name, parameter in levels.items()}
    other = torch.optim.SGD([*expected.parameters(), *call_levels.values()], lr=0.01)
    optimizer = torch.optim.SGD([*model.parameters(), *pqt.parameters()], lr=0.01)
    for _ in range(4):
        loss = call(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        value, of_model, _ = eager_step(expected, call_levels, tables_of(levels), lambda c: c(x).square().mean())
        assert loss.item() == value.item()
        for name, parameter in expected.named_parameters():
            parameter.grad = of_model[name]
        for name, one in levels.items():  # their gradient is held to float64 by the first test
            call_levels[name].grad = one.grad.clone()
        optimizer.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert all(not torch.equal(one, torch.tensor(TABLE.table)) for one in levels.values())


def test_tied_weights():
    """One parameter, whose gradient is that of both reads."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).tanh())

    model, x = Tied(), torch.randn(5, 40)
    call, pqt = compiled(model, x)
    levels = levels_of(pqt)
    assert list(levels) == ["first.weight"]
    check(call, model, x, levels)


def test_layers_that_share_a_graph():
    """Each has levels of its own, whatever graph serves it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(40, 40)

        def forward(self, x):
            return self.fc(x).tanh()

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model, x = Stack(), torch.randn(5, 40, requires_grad=True)
    pqt = gws_compile.backend(TABLE, inner="aot_eager")
    for block in model.blocks:
        block.compile(backend=pqt)
    pqt.prepare(model, x)
    levels = levels_of(pqt)
    assert list(levels) == [f"blocks.{i}.fc.weight" for i in range(3)]
    with torch.no_grad():
        for i, one in enumerate(levels.values()):
            one.mul_(1 + 0.1 * i)
    out = model(x)
    out.square().sum().backward()
    plain = copy_without_compile(model)
    loss, of_model, of_levels = eager_step(plain, levels, tables_of(levels), lambda call: call(x).square().sum())
    assert out.square().sum().item() == loss.item()
    assert len(pqt.graphs) == 1
    for name, parameter in levels.items():
        torch.testing.assert_close(parameter.grad, of_levels[name].float(), rtol=2e-7, atol=1e-9)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, of_model[name]), name


def copy_without_compile(model):
    plain = type(model)()
    plain.load_state_dict(model.state_dict())
    return plain


def test_checkpoints_and_reads_without_gradients():
    """Inside a checkpoint's body, and under ``no_grad`` beside a read that is trained: the same levels."""

    class Both(Net):
        def forward(self, x):
            with torch.no_grad():
                before = self.up(x)
            return checkpoint(super().forward, x, use_reentrant=False) + before.sum()

    model, x = Both(), torch.randn(5, 40)
    call, pqt = compiled(model, x, inner="aot_eager")
    levels = levels_of(pqt)
    with torch.no_grad():
        levels["up.weight"].mul_(1.1)
    out = call(x)
    out.square().sum().backward()

    # A checkpoint's second run would find the model's own weights again.
    class Plain(Net):
        def forward(self, x):
            with torch.no_grad():
                before = self.up(x)
            return super().forward(x) + before.sum()

    plain = Plain()
    plain.load_state_dict(model.state_dict())
    loss, of_model, of_levels = eager_step(plain, levels, tables_of(levels), lambda call: call(x).square().sum())
    assert out.square().sum().item() == loss.item()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, of_model[name]), name
    for name, parameter in levels.items():
        torch.testing.assert_close(parameter.grad, of_levels[name].float(), rtol=2e-7, atol=1e-9)


def test_autocast():
    """The cast is computed in float32 and comes out in bfloat16, with no conversion behind it."""
    model, x = Net(), torch.randn(5, 40)
    call, pqt = compiled(model, x, inner="aot_eager")
    levels = levels_of(pqt)
    values = {n: cast_oracle(p, levels[n], TABLE.table) for n, p in model.named_parameters() if n in levels}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(x), functional_call(model, values, (x,)))
    (node,) = pqt.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.gws.cast_to_levels.default)[:1]
    assert torch.bfloat16 in node.args


def test_frozen_weights_have_the_levels_of_their_settings():
    model, x = Net(), torch.randn(5, 40)
    model.up.weight.requires_grad_(False)
    call, pqt = compiled(model, x)
    levels = levels_of(pqt)
    assert list(levels) == ["down.weight"]
    tables = {**levels, "up.weight": torch.tensor(TABLE.table)}
    values = {n: cast_oracle(p, tables[n], TABLE.table) for n, p in model.named_parameters() if n in tables}
    assert torch.equal(call(x), functional_call(model, values, (x,)))


def test_rules():
    """Levels for some weights, each with a table of its own; noise for the others."""
    model, x = Net(), torch.randn(5, 40)
    call, pqt = compiled(model, x, fmt="fp4_e2m1", rules=[("up.*", Levels.uniform(2))])
    values = {
        "up.weight": cast_oracle(model.up.weight, torch.tensor(Levels.uniform(2).table), Levels.uniform(2).table),
        "down.weight": gws_compile.sample(model.down.weight.detach(), "fp4_e2m1", name="down.weight"),
    }
    assert torch.equal(call(x), functional_call(model, values, (x,)))
    assert {r.name: (r.fmt, r.noise) for r in pqt.report()} == {
        "up.weight": ("levels4", "none"),
        "down.weight": ("fp4_e2m1", "rounded_normal"),
    }


def test_levels_beside_learned_widths():
    model, x = Net(), torch.randn(5, 40)
    call, pqt = compiled(
        model, x, fmt=None, bits=gws_compile.LearnedBits(), rules=[("up.*", Levels.uniform(2))], inner="aot_eager"
    )
    assert [name for name, _ in pqt.named_parameters()] == ["down.weight.bits", "up.weight.levels"]
    call(x).sum().backward()
    assert all(parameter.grad is not None for parameter in pqt.parameters())


def test_without_prepare():
    """Levels are made at the first forward, of evaluation too, and the training that follows takes them over."""
    model, x = Net(), torch.randn(5, 40)
    pqt = gws_compile.backend(TABLE, inner="eager")
    call = torch.compile(model, backend=pqt)
    with torch.no_grad():
        before = call(x)
    evaluated = levels_of(pqt)
    assert torch.equal(call(x), before)
    assert {name: id(one) for name, one in levels_of(pqt).items()} == {name: id(o) for name, o in evaluated.items()}


def test_a_copy_has_the_levels_of_its_original():
    model, x = Net(), torch.randn(5, 40)
    call, pqt = compiled(model, x)
    call(x).sum().backward()
    with torch.no_grad():
        for one in pqt.parameters():
            one.mul_(1.3)
        average = copy.deepcopy(model)
        assert torch.equal(torch.compile(average, backend=pqt)(x), call(x))
    assert len(list(pqt.parameters())) == 2


# --- State ------------------------------------------------------------------------------------------------------------


def run(steps, state=None):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 40)
    call, pqt = compiled(model, x)
    optimizer = torch.optim.Adam([*model.parameters(), *pqt.parameters()], lr=0.01)
    if state is not None:
        state = torch.load(io.BytesIO(state))
        model.load_state_dict(state["model"])
        pqt.load_state_dict(state["pqt"])
        optimizer.load_state_dict(state["optimizer"])
    losses = []
    for _ in range(steps):
        loss = call(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.zero_grad()  # the optimizers of later runs do not hold these levels
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "pqt": pqt.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    return losses, saved.getvalue(), pqt


def test_a_resumed_run_continues_bit_for_bit():
    whole, _, expected = run(5)
    first, saved, _ = run(2)
    rest, _, pqt = run(3, saved)
    assert whole == first + rest
    assert all(torch.equal(a, b) for a, b in zip(pqt.parameters(), expected.parameters(), strict=True))


def test_a_state_that_comes_before_its_weights():
    _, saved, expected = run(2)
    state = torch.load(io.BytesIO(saved))["pqt"]
    model, x = Net(), torch.randn(8, 40)
    pqt = gws_compile.backend(TABLE, inner="eager")
    pqt.load_state_dict(state)
    torch.compile(model, backend=pqt)(x)
    for (name, one), (same, other) in zip(pqt.named_parameters(), expected.named_parameters(), strict=True):
        assert name == same
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fmt": "levels(0, 1)"}, "the state was saved with fmt='levels"),
        ({"levels": None}, "the state's levels must be a mapping of weight names to float32 tensors, got None"),
        ({"levels": {}}, "the state has no levels for up.weight, down.weight: call Backend.prepare"),
        (
            {"levels": {"up.weight": torch.zeros(4), "down.weight": torch.zeros(8)}},
            r"saved with levels of shape \(4,\) for up.weight, this backend has \(8,\)",
        ),
        (
            {"levels": {"up.weight": torch.full((8,), torch.nan), "down.weight": torch.zeros(8)}},
            r"levels\['up.weight'\] must be of finite numbers",
        ),
    ],
)
def test_bad_states(change, message):
    model, x = Net(), torch.randn(8, 40)
    call, pqt = compiled(model, x)
    call(x)
    before = pqt.state_dict()
    with pytest.raises(ValueError, match=message):
        pqt.load_state_dict({**before, **change})
    assert all(
        torch.equal(a, b) for a, b in zip(pqt.state_dict()["levels"].values(), before["levels"].values(), strict=True)
    )
    state = dict(before)
    del state["levels"]
    with pytest.raises(ValueError, match="levels missing"):
        pqt.load_state_dict(state)


# --- What is said -----------------------------------------------------------------------------------------------------


def test_levels_that_no_optimizer_holds():
    model, x = Net(), torch.randn(8, 40)
    call, _ = compiled(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train():
        for _ in range(10):
            call(x).sum().backward()
            optimizer.step()

    with pytest.warns(
        GwsWarning, match="10 optimizer steps, and no optimizer has the levels of up.weight, down.weight"
    ):
        train()


def test_levels_that_are_not_to_be_trained():
    model, x = Net(), torch.randn(8, 40)
    call, pqt = compiled(model, x, inner="aot_eager")
    for one in pqt.parameters():
        one.requires_grad_(False)
    check_of_weights = call(x).square().sum()
    check_of_weights.backward()
    assert all(one.grad is None for one in pqt.parameters())
    levels = levels_of(pqt)
    loss, of_model, _ = eager_step(model, levels, tables_of(levels), lambda c: c(x).square().sum())
    assert check_of_weights.item() == loss.item()
    assert all(torch.equal(p.grad, of_model[n]) for n, p in model.named_parameters())


def test_metrics_and_page(tmp_path):
    model, x = Net(), torch.randn(5, 40)
    call, pqt = compiled(model, x)
    levels = levels_of(pqt)
    with torch.no_grad():
        levels["up.weight"].mul_(0.5)
    call(x).sum().backward()
    w = model.up.weight.detach()
    cast = cast_oracle(w, levels["up.weight"], TABLE.table).double()
    found = pqt.metrics()["up.weight"]
    assert (found.fmt, found.bits, found.sqnr_noise) == ("levels8", None, None)
    sqnr = 10 * torch.log10(w.double().square().sum() / (w - cast).square().sum())
    assert found.sqnr == pytest.approx(sqnr.item(), rel=1e-12)
    assert found.flushed == ((cast == 0) & (w != 0)).double().mean().item()
    assert found.saturated > 0.3  # the levels reach half of a block's maximum
    pqt.report().to_html(tmp_path / "page.html")
    assert "cast to 8 levels" in (tmp_path / "page.html").read_text()


def test_export(tmp_path):
    """Dense, bit for bit what ``no_grad`` calls use; packed formats are refused."""
    model, x = Net(), torch.randn(5, 40)
    call, pqt = compiled(model, x)
    with torch.no_grad():
        for one in pqt.parameters():
            one.add_(0.01)
    call(x).sum().backward()
    pqt.export(call, tmp_path / "dense", "dense")
    state = gws_compile.load_export(tmp_path / "dense")
    with torch.no_grad():
        assert torch.equal(functional_call(model, state, (x,)), call(x))
    with pytest.raises(
        ValueError, match=r"up.weight, trained in levels8 32 x 32.*no file that engines load.*\"dense\""
    ):
        pqt.export(call, tmp_path / "packed", "int4")
    with pytest.warns(GwsWarning, match="no file that engines load has a codebook"):
        pqt.export(call, tmp_path / "chosen")
    assert torch.equal(gws_compile.load_export(tmp_path / "chosen")["up.weight"], state["up.weight"])


# --- What training the levels brings ----------------------------------------------------------------------------------


def deployed_loss(seed, *, trained):
    """Of a network that has learned what a wider one in full precision computes; and how far its levels have moved."""
    torch._dynamo.reset()
    torch.manual_seed(seed)
    wanted = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 16))
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16))
    held_out = torch.randn(2048, 32)
    table = Levels.uniform(2)
    pqt = gws_compile.backend(table, inner="eager")
    pqt.prepare(model, held_out)
    for one in pqt.parameters():
        one.requires_grad_(trained)
    call = torch.compile(model, backend=pqt)
    optimizer = torch.optim.Adam([*model.parameters(), *(pqt.parameters() if trained else ())], lr=3e-3)
    for _ in range(300):
        x = torch.randn(128, 32)
        (call(x) - wanted(x).detach()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        loss = (call(held_out) - wanted(held_out)).square().mean()
    moved = max((one.detach() - torch.tensor(table.table)).abs().max().item() for one in pqt.parameters())
    return loss.item(), moved


@pytest.mark.slow
def test_trained_levels_reach_a_lower_loss():
    """Than those that stay as they begin, with every seed; docs/levels.md has these figures."""
    for seed in range(3):
        (fixed, still), (trained, moved) = (deployed_loss(seed, trained=trained) for trained in (False, True))
        sys.stdout.write(f"seed {seed}: fixed {fixed:.5f}, trained {trained:.5f}, way of a level {moved:.3f}\n")
        assert still == 0
        assert moved > 0.05
        assert trained < fixed
