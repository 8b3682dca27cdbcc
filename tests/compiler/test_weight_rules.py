"""Rules in training: each weight by its own settings, whatever graphs it shares; seen in report, metrics and state."""

import copy
import warnings

import pytest
import torch
from support.models import gpt2
from support.small_models import Product
from torch import nn

import gws_compile
from gws_compile import GwsWarning, LearnedBits

pytestmark = pytest.mark.usefixtures("fresh")

RULES = (
    ("first.*", {"fmt": "nvfp4", "bits": 2.5}),
    ("second.*", {"fmt": "int4", "block": (1, None), "noise": "uniform"}),
    ("third.*", None),
    ("*", {"block": (16, 32), "noise": "none"}),
)
SAMPLED = {
    "first.weight": {"fmt": "nvfp4", "bits": 2.5},
    "second.weight": {"fmt": "int4", "block": (1, None), "noise": "uniform"},
    "fourth.weight": {"fmt": "fp6_e3m2", "block": (16, 32), "noise": "none"},
}
"""What becomes of `Products` by these rules, as arguments of `gws_compile.sample`."""


class Products(nn.Module):
    def __init__(self, breaks):
        super().__init__()
        self.breaks = breaks
        for name in ("first", "second", "third", "fourth"):
            layer = Product(32)
            layer.weight.data /= 32**0.5  # so that what comes out is as large as what goes in
            setattr(self, name, layer)

    def forward(self, x):
        for layer in (self.first, self.second, self.third, self.fourth):
            if self.breaks:
                torch._dynamo.graph_break()
            x = layer(x)
        return x


def reference(model, x, *, noisy=True, step=0):
    """The plain model with sampled weights in their places: its output, and the gradients of its weights."""
    plain = copy.deepcopy(model)
    for name, p in plain.named_parameters():
        if name in SAMPLED:
            settings = dict(SAMPLED[name]) if noisy else {**SAMPLED[name], "noise": "none"}
            p.data = gws_compile.sample(p.data, name=name, step=step, **settings)
    out = plain(x)
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in plain.named_parameters()}


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("breaks", [False, True], ids=["one graph", "a shared graph"])
def test_each_weight_is_sampled_by_its_own_rule(breaks, inner):
    torch.manual_seed(0)
    model, x = Products(breaks), torch.randn(4, 32)
    backend = gws_compile.backend("fp6_e3m2", rules=RULES, inner=inner)
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(2):
        out, gradients = reference(model, x, step=step)
        optimizer.zero_grad()
        got = compiled(x)
        torch.testing.assert_close(got, out, rtol=1e-5, atol=1e-5)
        got.square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-5, atol=1e-5)
        optimizer.step()
    out, _ = reference(model, x, noisy=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), out, rtol=1e-5, atol=1e-5)


def used_weights(compiled, names):
    """What the products of a stack multiply with, one after the other: of unit vectors; the sign of zero is lost."""
    eye = torch.eye(32)
    return {name: compiled(index, eye).detach().t() for index, name in enumerate(names)}


class OneOf(nn.Module):
    """Calls one of its layers, so that a unit matrix shows the weight."""

    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(Product(32) for _ in range(count))

    def forward(self, index, x):
        return self.layers[index](x)


def test_blocks_compiled_one_by_one_have_rules_of_their_own():
    """One graph for all layers: those that a rule treats otherwise get a graph of their own, found by full names."""
    torch.manual_seed(0)
    model = OneOf(4)
    rules = [(gws_compile.edge_blocks(model, first=1), None), ("layers.2.*", "int3"), ("layers.3.*", {"bits": 3})]
    backend = gws_compile.backend("fp8_e4m3", rules=rules)
    for layer in model.layers:
        layer.compile(backend=backend)
    names = [f"layers.{index}.weight" for index in range(4)]
    for _ in range(2):
        used = used_weights(model, names)
        weights = [p.detach() for p in model.parameters()]
        assert torch.equal(used[names[0]], weights[0])
        assert torch.equal(used[names[1]], gws_compile.sample(weights[1], "fp8_e4m3", name=names[1]))
        assert torch.equal(used[names[2]], gws_compile.sample(weights[2], "int3", name=names[2]))
        assert torch.equal(used[names[3]], gws_compile.sample(weights[3], "fp8_e4m3", bits=3, name=names[3]))
    rows = {record.name: (record.fmt, record.bits, record.rule) for record in backend.report()}
    assert rows == {
        names[0]: ("", None, "layers.0.*=none"),
        names[1]: ("fp8_e4m3", 5.0, ""),
        names[2]: ("int3", 3.0, "layers.2.*=int3"),
        names[3]: ("fp8_e4m3", 3.0, "layers.3.*=bits=3"),
    }
    assert len(backend.graphs) == 4


def test_what_report_metrics_and_state_say():
    torch.manual_seed(0)
    model, x = Products(False), torch.randn(4, 32)
    backend = gws_compile.backend("fp6_e3m2", rules=RULES, inner="eager")
    torch.compile(model, backend=backend)(x).sum().backward()
    report = backend.report()
    rows = [(r.name, r.fmt, r.bits, r.noise, r.block, r.scale, r.rule) for r in report]
    assert rows == [
        ("first.weight", "nvfp4", 2.5, "rounded_normal", "16 x 16", "nvfp4", "first.*=nvfp4,bits=2.5"),
        ("second.weight", "int4", 4.0, "uniform", "row", "amax", "second.*=int4,block=1xall,noise=uniform"),
        ("third.weight", "", None, "", "", "", "third.*=none"),
        ("fourth.weight", "fp6_e3m2", None, "none", "16 x 32", "floor", "*=block=16x32,noise=none"),
    ]
    assert "the rule 'third.*=none' leaves it alone" in str(report)
    assert "second.*=int4,block=1xall,noise=uniform" in str(report)
    metrics = backend.metrics()
    assert {name: (m.fmt, m.bits) for name, m in metrics.items()} == {
        "first.weight": ("nvfp4", 2.5),
        "second.weight": ("int4", 4.0),
        "fourth.weight": ("fp6_e3m2", None),
    }
    for name, m in metrics.items():
        w = model.get_parameter(name).detach()
        noisy = gws_compile.sample(w, name=name, **SAMPLED[name]).double()
        cast = gws_compile.sample(w, name=name, **{**SAMPLED[name], "noise": "none"}).double()
        assert m.exact == (cast == w).double().mean()
        if m.sqnr_noise is not None:
            signal, error = w.double().square().sum(), (w - noisy).square().sum()
            assert m.sqnr_noise == pytest.approx(10 * torch.log10(signal / error).item(), abs=1e-9)
    assert metrics["second.weight"].saturated == 0  # the maximum of a row is what the scale is made for
    assert backend.average_bits() == 3.25
    state = backend.state_dict()
    assert state["settings"] == [["first.weight", "e2m1 16x16 nvfp4"], ["second.weight", "int4 1xall amax"]]
    assert state["rules"] == [
        "first.*=nvfp4,bits=2.5",
        "second.*=int4,block=1xall,noise=uniform",
        "third.*=none",
        "*=block=16x32,noise=none",
    ]


def test_a_resumed_run_has_the_same_rules():
    model, x = Products(False), torch.randn(4, 32)
    backend = gws_compile.backend("fp6_e3m2", rules=RULES, inner="eager")
    torch.compile(model, backend=backend)(x).sum().backward()
    state = backend.state_dict()
    gws_compile.backend("fp6_e3m2", rules=RULES).load_state_dict(state)
    with pytest.raises(ValueError, match=r"the state was saved with rules=\['first.*\], this backend has \[\]"):
        gws_compile.backend("fp6_e3m2").load_state_dict(state)
    del state["rules"]
    with pytest.raises(ValueError, match=r"first.weight in 'e2m1 16x16 nvfp4' .*, this backend has 'e3m2 32x32 floor'"):
        gws_compile.backend("fp6_e3m2").load_state_dict(state)
    with pytest.raises(ValueError, match=r"first.weight in 'e2m1 16x16 nvfp4' .*, this backend leaves it alone"):
        gws_compile.backend("fp6_e3m2", rules=[("first.*", None)]).load_state_dict(state)
    for key in ("settings",):  # of an older version
        del state[key]
    gws_compile.backend("fp6_e3m2").load_state_dict(state)


def said(rules, model=None, **settings):
    """The warnings of a compiled call that are about rules."""
    backend = gws_compile.backend(rules=rules, inner="eager", **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(model or Products(False), backend=backend)(torch.randn(4, 32))
    return [str(w.message) for w in caught if issubclass(w.category, GwsWarning)]


def test_a_rule_that_decides_nothing_is_named():
    (message,) = said([("*.mlp.*", "nvfp4")])
    assert message == (
        "the rule '*.mlp.*=nvfp4' decides nothing: the weights that are known are: first.weight, second.weight, "
        "third.weight, fourth.weight"
    )
    (message,) = said([("*", "int8"), ("first.*", "nvfp4")])
    assert message == "the rule 'first.*=nvfp4' decides nothing: first.weight: the rule '*=int8' comes first"
    (message,) = said([("first.*", "nvfp4")], exclude=["first.*"])
    assert message == ("the rule 'first.*=nvfp4' decides nothing: first.weight: matches the exclude pattern 'first.*'")


def test_a_rule_for_a_layer_to_come_is_no_mistake():
    """Of blocks compiled one by one, whose first graph is that of the first layer, the others are known by then."""
    assert said([("fourth.*", "int4")], Products(True)) == []


def test_experts_and_frozen_weights_follow_rules():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 32, 48))
            self.frozen = nn.Parameter(torch.randn(48, 32), requires_grad=False)

        def forward(self, x):
            return torch.bmm(x, self.experts) @ self.frozen

    torch.manual_seed(0)
    model = Experts()
    backend = gws_compile.backend(rules=[("experts", "nvfp4"), ("frozen", "int8_channel")])
    x = torch.eye(32).expand(3, 32, 32)
    got = torch.compile(model, backend=backend)(x)
    experts = gws_compile.sample(model.experts.detach(), "nvfp4", name="experts")
    torch.testing.assert_close(got, experts @ gws_compile.quantize(model.frozen, "int8_channel"), rtol=1e-5, atol=1e-5)


def test_learned_widths_beside_rules():
    """Weights that a rule takes out have no widths; a rule's block is that of a weight's widths."""
    torch.manual_seed(0)
    model, x = Products(False), torch.randn(4, 32)
    rules = [("first.*", "nvfp4"), ("second.*", {"block": (8, 16)}), ("third.*", {"block": (None, None)})]
    backend = gws_compile.backend(bits=LearnedBits(), rules=rules)
    backend.prepare(model, x)
    shapes = {name: tuple(p.shape) for name, p in backend.named_parameters()}
    assert shapes == {"second.weight.bits": (4, 2), "third.weight.bits": (1, 1), "fourth.weight.bits": (1, 1)}
    compiled = torch.compile(model, backend=backend)
    (compiled(x).square().sum() + backend.bit_loss()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backend.parameters())
    assert backend.metrics()["first.weight"].bits == 3.0
    state = backend.state_dict()
    assert set(state["bits"]) == {"second.weight", "third.weight", "fourth.weight"}
    other = gws_compile.backend(bits=LearnedBits(), rules=rules)
    other.load_state_dict(state)
    other.prepare(copy.deepcopy(model), x)
    assert [p.shape for p in other.parameters()] == [p.shape for p in backend.parameters()]


def test_rules_on_gpt2():
    """Fused projections, tied embeddings, all blocks in one graph; the first and last block as they are."""
    torch.manual_seed(0)
    model = gpt2(layers=4)
    tokens = torch.randint(96, (2, 16))
    rules = [(gws_compile.edge_blocks(model, first=1, last=1), None), ("*.mlp.*", "nvfp4"), ("*.c_attn.*", "fp8_block")]
    backend = gws_compile.backend("mxfp8", rules=rules, inner="eager")
    torch.compile(model, backend=backend)(tokens).logits.sum().backward()
    found = {record.name: record.fmt for record in backend.report() if ".h." in record.name}
    assert {found[name] for name in found if ".h.0." in name or ".h.3." in name} == {""}
    inner = {name.partition(".h.")[2]: fmt for name, fmt in found.items() if fmt}
    assert inner == {
        f"{layer}.{part}.weight": fmt
        for layer in (1, 2)
        for part, fmt in (
            ("attn.c_attn", "fp8_block"),
            ("attn.c_proj", "mxfp8"),
            ("mlp.c_fc", "nvfp4"),
            ("mlp.c_proj", "nvfp4"),
        )
    }
