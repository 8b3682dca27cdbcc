"""Sparse weights in training and evaluation: against eager code that masks with numpy, and samples with the reference.

Gradients go straight through: those of the oracle's used weights, all of them, are the weights' own.
"""

import pytest
import torch
from support.mask_oracle import mask_of
from support.models import gpt2, llama, loss_and_gradients
from support.small_models import Net, OneLayer
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import gws_compile
from gws_compile import GwsWarning, PrunedGroups

pytestmark = pytest.mark.usefixtures("fresh")

GROUPS = {"rows:0.5": PrunedGroups(0.5), "columns:0.25": PrunedGroups(0.25, "columns")}


def setting(sparsity):
    return GROUPS.get(sparsity, sparsity)


def used_weight(w, name, sparsity, *, over_rows=False, step=0, noisy=True, fmt="fp6_e3m2", **settings):
    """What a sparse weight is multiplied as."""
    matrix = w.detach().reshape(w.shape[0], -1)
    mask = mask_of(matrix, sparsity, over_rows=over_rows).reshape(w.shape)
    kept = torch.where(mask, w.detach(), 0)
    settings |= {} if noisy else {"noise": "none"}
    return torch.where(mask, gws_compile.sample(kept, fmt, name=name, step=step, **settings), 0)


def reference(model, call, sparsity, sampled, *, over_rows=(), **settings):
    """Loss and gradients of the plain model with used weights in the places of its own."""
    values = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name in sampled:
            value = used_weight(parameter, name, sparsity, over_rows=name in over_rows, **settings)
        values[name] = value.clone().requires_grad_()
    loss = call(lambda *args: functional_call(model, values, args))
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in values.items()}


def assert_as_reference(model, call, backend, sparsity, sampled, **settings):
    """Two steps of training, and evaluation, bit for bit."""
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        expected, gradients = reference(model, call, sparsity, sampled, step=step, **settings)
        optimizer.zero_grad()
        loss = call(compiled)
        loss.backward()
        assert torch.equal(loss, expected)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, gradients[name]), name
        optimizer.step()
    with torch.no_grad():
        expected, _ = reference_of_evaluation(model, call, sparsity, sampled, **settings)
        assert torch.equal(call(compiled), expected)


def reference_of_evaluation(model, call, sparsity, sampled, **settings):
    with torch.enable_grad():
        return reference(model, call, sparsity, sampled, noisy=False, **settings)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("sparsity", ["2:4", "1:8", *GROUPS])
def test_linear_layers(sparsity, inner):
    model, x = Net(), torch.randn(5, 40)
    backend = gws_compile.backend("fp6_e3m2", sparsity=setting(sparsity), inner=inner)
    names = ["up.weight", "down.weight"]
    assert_as_reference(model, lambda f: f(x).square().sum(), backend, sparsity, names)
    assert [record.sparsity for record in backend.report().rewritten] == [str(backend.config.sparsity)] * 2


def test_small_masks_and_what_is_zero():
    """Exactly zero, and +0; the mask follows the weight, and what was masked comes back."""
    model = OneLayer(8, 8, bias=False)
    compiled = torch.compile(model, backend=gws_compile.backend("int4", sparsity="2:4", inner="aot_eager"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    used = compiled(torch.eye(8)).t()
    before = mask_of(model.fc.weight, "2:4")
    assert not used[~before].any()
    assert not used[~before].signbit().any()
    (-used * (~before) * model.fc.weight.detach().sign()).sum().backward()
    optimizer.step()  # what is not kept grows by one: it is the largest now
    used = compiled(torch.eye(8)).t()
    assert torch.equal(mask_of(model.fc.weight, "2:4"), ~before)
    assert not used[before].any()


def test_the_summed_side_of_gpt2():
    """Its Conv1D has (in, out): groups run over the rows of what is stored."""
    model, tokens = gpt2(layers=1), torch.randint(0, 96, (2, 16))
    names = [n for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    for sparsity in ("2:4", "rows:0.5"):
        torch._dynamo.reset()
        backend = gws_compile.backend("fp6_e3m2", sparsity=setting(sparsity), inner="aot_eager")
        loss, gradients = loss_and_gradients(torch.compile(model, backend=backend), model, tokens)

        def call(f):
            logits = f(tokens).logits[:, :-1]
            return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

        expected, wanted = reference(model, call, sparsity, names, over_rows=names)
        assert torch.equal(loss, expected)
        for name in names:
            assert torch.equal(gradients[name], wanted[name]), name


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.back = nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 4, 3)
        self.experts = nn.Parameter(torch.randn(3, 16, 12))  # (experts, in, out)
        self.inside = nn.Linear(12, 12)
        self.frozen = nn.Linear(12, 8, bias=False).requires_grad_(False)

    def forward(self, images, tokens):
        images = self.back(self.conv(images).relu())
        hidden = torch.bmm(tokens, self.experts)
        hidden = checkpoint(self.inside, hidden, use_reentrant=False) + self.inside(hidden)
        with torch.no_grad():
            gate = self.inside(hidden)
        return images.square().sum() + (self.frozen(hidden + gate)).square().sum()


@pytest.mark.parametrize("backward", ["save", "recompute"])
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_convolutions_experts_checkpoints_and_frozen_weights(inner, backward):
    torch.manual_seed(1)
    model, images, tokens = Zoo(), torch.randn(2, 4, 6, 6), torch.randn(3, 5, 16)
    backend = gws_compile.backend("fp6_e3m2", sparsity="2:4", inner=inner, backward=backward)
    torch.compile(model, backend=backend)(images, tokens).backward()
    values = dict(model.named_parameters())
    used = {}
    for name, over_rows in (("conv.weight", False), ("back.weight", True), ("inside.weight", False)):
        used[name] = used_weight(values[name], name, "2:4", over_rows=over_rows)
    used["frozen.weight"] = used_weight(model.frozen.weight, "", "2:4", noisy=False)
    mask = torch.stack([mask_of(one, "2:4", over_rows=True) for one in model.experts])
    kept = torch.where(mask, model.experts.detach(), 0)
    used["experts"] = torch.where(mask, gws_compile.sample(kept, "fp6_e3m2", name="experts"), 0)
    cast = used_weight(model.inside.weight, "", "2:4", noisy=False)

    values = {name: used.get(name, p.detach()).clone().requires_grad_(p.requires_grad) for name, p in values.items()}

    def inside(x, weight):
        return nn.functional.linear(x, weight, values["inside.bias"])

    hidden = torch.bmm(tokens, values["experts"])
    hidden = inside(hidden, values["inside.weight"]) + inside(hidden, values["inside.weight"])
    gate = inside(hidden, cast).detach()
    made = nn.functional.conv2d(images, values["conv.weight"], values["conv.bias"]).relu()
    made = nn.functional.conv_transpose2d(made, values["back.weight"], values["back.bias"])
    out = nn.functional.linear(hidden + gate, values["frozen.weight"])
    (made.square().sum() + out.square().sum()).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
        elif inner == "inductor":
            torch.testing.assert_close(parameter.grad, values[name].grad, rtol=1e-4, atol=1e-3)
        else:
            assert torch.equal(parameter.grad, values[name].grad), name


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    """Weights in bfloat16, and float32 ones under autocast, whose samples come in bfloat16."""
    dtype = torch.float32 if autocast else torch.bfloat16
    model, x = OneLayer(24, 32, bias=False).to(dtype), torch.randn(6, 32).to(dtype)
    compiled = torch.compile(model, backend=gws_compile.backend("fp8_e4m3", sparsity="2:4", inner="aot_eager"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = compiled(x)
    out.float().square().sum().backward()
    used = used_weight(model.fc.weight, "fc.weight", "2:4", fmt="fp8_e4m3").to(torch.bfloat16).requires_grad_()
    expected = x.to(torch.bfloat16) @ used.t()
    expected.float().square().sum().backward()
    assert torch.equal(out, expected)
    assert torch.equal(model.fc.weight.grad, used.grad.to(dtype))


def test_graphs_share_a_mask():
    """One for a tied weight, whatever its reads; of a checkpoint's body one of its own."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.second.weight = self.first.weight

        def forward(self, x):
            return checkpoint(self.second, self.second(self.first(x)), use_reentrant=False)

    backend = gws_compile.backend("fp8_e4m3", sparsity="2:4", inner="eager")
    torch.compile(Tied(), backend=backend)(torch.randn(2, 16)).sum().backward()
    (graph,) = backend.graphs
    target = torch.ops.gws.element_mask.default
    inner = [m for m in graph.modules() if m is not graph and isinstance(m, torch.fx.GraphModule)]
    assert [len(m.graph.find_nodes(op="call_function", target=target)) for m in (graph, *inner)] == [1, 1]


def test_gradual_pruning():
    """The share of each draw, with nothing compiled again; evaluation has that of the draw that training is at."""
    model = OneLayer(8, 40, bias=False)
    backend = gws_compile.backend("fp8_e4m3", sparsity=PrunedGroups(0.5, "columns", start=2, stop=6), inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruned, evaluated, expected = [], [], []
    for step in range(8):
        used = compiled(torch.eye(40)).t()
        left = 1 - min(max((step - 2) / 4, 0), 1)
        count = round(0.5 * (1 - left**3) * 40)
        mask = mask_of(model.fc.weight, f"columns:{count / 40}")
        kept = torch.where(mask, model.fc.weight.detach(), 0)
        sampled = gws_compile.sample(kept, "fp8_e4m3", name="fc.weight", step=step)
        assert torch.equal(used, torch.where(mask, sampled, 0))
        expected.append(count)
        pruned.append(int((used == 0).all(0).sum()))
        with torch.no_grad():
            evaluated.append(int((compiled(torch.eye(40)).t() == 0).all(0).sum()))
        assert backend.metrics()["fc.weight"].zeros == count / 40
        used.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pruned == evaluated == expected == [0, 0, 0, 12, 18, 20, 20, 20]
    assert len(backend.graphs) == 2


def test_gradual_pruning_inside_of_a_checkpoint():
    """The clock reaches the body, in training and in evaluation."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 8, bias=False)

        def forward(self, x):
            return checkpoint(self.fc, x, use_reentrant=False)

    model, x = Inside(), torch.eye(16)
    backend = gws_compile.backend("fp8_e4m3", sparsity=PrunedGroups(0.5, stop=2), inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruned = []
    for _ in range(3):
        used = compiled(x).t()
        used.square().sum().backward()
        with torch.no_grad():
            assert torch.equal((compiled(x).t() == 0).all(1), (used == 0).all(1))
        pruned.append(int((used == 0).all(1).sum()))
        optimizer.step()
    assert pruned == [0, round(0.5 * (1 - 0.5**3) * 8), 4]


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", ["2:4", *GROUPS])
def test_inductor(sparsity):
    """The same weights, bit for bit, of a model that is compiled; and its code has no sort of elements."""
    model = Net()
    backend = gws_compile.backend("fp6_e3m2", sparsity=setting(sparsity))
    compiled = torch.compile(model, backend=backend)
    loss = compiled(torch.randn(5, 40)).square().sum()
    loss.backward()
    with torch.no_grad():
        first = torch.compile(OneLayer(24, 40, bias=False), backend=backend)
        out = first(torch.eye(40)).t()
        weight = first._orig_mod.fc.weight
    assert torch.equal(out, used_weight(weight, "", sparsity, noisy=False))


def test_learned_widths_get_no_gradient_of_what_is_masked():
    """dL/db is that of the kept elements alone: R of what is masked is in no product."""
    model = OneLayer(8, 16, bias=False)
    bits = gws_compile.LearnedBits(granularity="weight")
    backend = gws_compile.backend("e8m22", bits=bits, sparsity="2:4", inner="aot_eager")
    backend.prepare(model, torch.randn(2, 16))
    used = torch.compile(model, backend=backend)(torch.eye(16)).t()
    weighted = torch.randn(8, 16)
    (used * weighted).sum().backward()
    mask = mask_of(model.fc.weight, "2:4")
    assert torch.equal(model.fc.weight.grad, weighted)
    (_, parameter), *_ = backend.named_parameters()
    noise = used.detach().double() - torch.where(mask, model.fc.weight.detach(), 0)
    expected = -torch.log(torch.tensor(2.0)) * (weighted * mask * noise).sum() * (bits.init - bits.target)
    torch.testing.assert_close(parameter.grad.double(), expected.double(), rtol=1e-4, atol=1e-6)


def test_recipes_see_a_sample_behind_its_mask():
    """The products of a sparse weight are still its; and each operand is rounded as without sparsity."""
    rounded = {}
    for sparsity in (None, "2:4"):
        torch._dynamo.reset()
        model = OneLayer(32, 64, bias=False)
        backend = gws_compile.backend(recipe="mxfp8", sparsity=sparsity, inner="aot_eager")
        torch.compile(model, backend=backend)(torch.randn(32, 64)).sum().backward()
        rounded[sparsity] = [(p.weight, p.kind, dict(p.operands)) for p in backend.report().products]
    assert rounded[None] == rounded["2:4"]
    assert {kind for _, kind, _ in rounded["2:4"]} >= {"forward", "wgrad"}


def test_what_cannot_be_sparse_stays_dense():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.odd = nn.Linear(8, 10), nn.Linear(10, 2)
            self.both = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return self.odd(self.fc(x @ self.both.t() + x @ self.both))

    backend = gws_compile.backend("fp8_e4m3", sparsity="2:4", inner="eager")
    both = "both: matmul sums over its columns, and matmul over its rows"
    odd = "odd.weight: 2:4 along a side of 10, no multiple of 4"
    with pytest.warns(GwsWarning, match="weights that are not sparse, although sparsity says so") as caught:
        torch.compile(Odd(), backend=backend)(torch.randn(2, 8))
    assert both in str(caught[0].message)
    assert odd in str(caught[0].message)
    text = str(backend.report())
    assert "dense: 2:4 along a side of 10, no" in text
    rows = {record.name: (record.sparsity, record.dense_because) for record in backend.report()}
    assert rows["fc.weight"] == ("2:4", "")
    assert rows["odd.weight"] == ("", odd.partition(": ")[2])
    torch._dynamo.reset()
    none = gws_compile.backend("fp8_e4m3", sparsity=PrunedGroups(0.1), inner="eager")
    with pytest.warns(GwsWarning, match=r"a share of 0.1 of its 2 rows is none of them"):
        torch.compile(OneLayer(2, 8), backend=none)(torch.randn(2, 8))


def test_rules_make_some_weights_sparse():
    model = llama(layers=1)
    rules = [("*.down_proj.*", {"sparsity": PrunedGroups(0.5, "columns")}), ("*.q_proj.*", {"sparsity": None})]
    backend = gws_compile.backend("fp8_e4m3", sparsity="2:4", rules=rules, inner="eager")
    backend.prepare(model, torch.zeros(1, 4, dtype=torch.long))
    torch.compile(model, backend=backend)(torch.zeros(1, 4, dtype=torch.long))
    rows = {record.name.split(".")[-2]: record.sparsity for record in backend.report().rewritten}
    assert rows["q_proj"] == ""
    assert rows["down_proj"] == "columns:0.5"
    assert {rows[name] for name in ("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")} == {"2:4"}
