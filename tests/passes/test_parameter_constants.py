"""Weights that are computed with before they are read are left alone, for a reason; learned queries are not weights."""

import pytest
import torch
import torch.nn.functional as F
from support.graphs import reasons
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import gws_compile

X = torch.linspace(-1, 1, 16).view(2, 8)

pytestmark = pytest.mark.filterwarnings("ignore:no weight has been rewritten:gws_compile.GwsWarning")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def said(model: nn.Module, *args: torch.Tensor, **settings: object) -> dict[str, str]:
    backend = gws_compile.backend(inner="eager", **settings)
    torch.compile(model, backend=backend, fullgraph=True)(*args)
    return reasons(backend)


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).T


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (parametrizations.weight_norm, {"original0": "_weight_norm", "original1": "_weight_norm"}),
        (nn.utils.weight_norm, {"weight_g": "_weight_norm", "weight_v": "_weight_norm"}),
        # The power iteration multiplies by the weight too: that is no read by the model.
        (parametrizations.spectral_norm, {"original": "mv"}),
        (nn.utils.spectral_norm, {"weight_orig": "mv"}),
        (parametrizations.orthogonal, {"original": "tril"}),
        (lambda m: parametrize.register_parametrization(m, "weight", Symmetric()), {"original": "triu"}),
    ],
    ids=["weight_norm", "old weight_norm", "spectral_norm", "old spectral_norm", "orthogonal", "of the user"],
)
def test_parametrizations(wrap, expected):
    found = said(nn.Sequential(wrap(nn.Linear(8, 8))), X)
    texts = {name.rsplit(".", 1)[-1]: text for name, text in found.items()}
    assert texts.keys() == expected.keys()
    for name, op in expected.items():
        assert texts[name].startswith(f"computed with before linear reads it: {op}"), texts[name]


class Merged(nn.Module):
    """Adapters merged into their base before the product, as LoRA does for deployment."""

    def __init__(self, read):
        super().__init__()
        self.base = nn.Parameter(torch.randn(8, 8))
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))
        self.fc = nn.Linear(8, 8)
        self.read = read

    def forward(self, x):
        return self.fc(self.read(x, self.base + 0.5 * (self.b @ self.a)))


@pytest.mark.parametrize("product", ["einsum", "addmm", "mm"])
def test_adapters_merged_by_other_products(product):
    def merge(base, b, a):
        if product == "einsum":
            return base + torch.einsum("or,ri->oi", b, a)
        return torch.addmm(base, b, a) if product == "addmm" else base + b.mm(a)

    class Other(Merged):
        def forward(self, x):
            return self.fc(self.read(x, merge(self.base, self.b, self.a)))

    found = said(Other(F.linear), X)
    for name in ("base", "a", "b"):
        assert found[name].startswith("computed with before linear reads it: "), found[name]


@pytest.mark.parametrize(
    ("read", "op"),
    [
        (F.linear, "linear"),
        (lambda x, w: x @ w.T, "matmul"),
        (lambda x, w: torch.einsum("bi,oi->bo", x, w), "einsum"),
        (lambda x, w: torch.addmm(x, x, w), "addmm"),
        (lambda x, w: checkpoint(F.linear, x, w, use_reentrant=False), "linear"),
        (lambda x, w: F.conv1d(x[..., None], w[..., None])[..., 0], "conv1d"),
    ],
)
def test_merged_adapters(read, op):
    found = said(Merged(read), X)
    assert found["fc.weight"] == "linear"
    for name, how in (("base", "add"), ("a", "matmul"), ("b", "matmul")):
        assert found[name].startswith(f"computed with before {op} reads it: {how} at {__file__}:"), found[name]


class MergedInCheckpoint(Merged):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_merged_adapters_inside_a_checkpoint():
    found = said(MergedInCheckpoint(F.linear), X)
    assert {name for name, text in found.items() if text.startswith("computed with")} == {"base", "a", "b"}
    assert found["fc.weight"] == "linear"


class Both(nn.Module):
    """Read as it is and, elsewhere, computed with: one weight cannot be half sampled."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) + F.linear(x, self.fc.weight.square())


def test_a_weight_that_is_also_computed_with():
    assert said(Both(), X)["fc.weight"].startswith("computed with before linear reads it: square at ")


class Queries(nn.Module):
    """Learned queries: activations made of parameters, whose projections are weights all the same."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, 8))
        self.norm = nn.LayerNorm(8)
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.mix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        q = self.q(self.norm(self.queries)) @ self.mix
        return F.softmax(q @ self.k(x).T, -1) @ x


def test_learned_queries():
    found = said(Queries(), X)
    assert (found["q.weight"], found["k.weight"], found["mix"]) == ("linear", "linear", "matmul")
    assert "layer_norm" in found["queries"]


def test_fused_projections_are_sampled_one_by_one():
    """Weights that are joined before use draw by their own names; the gradients are those of the parts."""
    from support.eager import gradients

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, n, bias=False) for n in (8, 4, 4))

        def forward(self, x):
            joined = F.linear(x, torch.cat([self.q.weight, self.k.weight, self.v.weight]))
            stacked = torch.stack([self.k.weight, self.v.weight])
            return joined.square().sum() + torch.bmm(stacked, x.T.expand(2, -1, -1)).square().sum()

    model = Fused()
    backend = gws_compile.backend("fp4_e2m1", inner="eager")
    loss = torch.compile(model, backend=backend, fullgraph=True)(X)
    loss.backward()
    names = [r.name for r in backend.report().rewritten]
    assert names == ["q.weight", "k.weight", "v.weight"]
    expected, grads = gradients(model, lambda call: call(X), names, "fp4_e2m1", 0)
    assert loss.item() == expected
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())


@torch.library.custom_op("gws_test::multiply", mutates_args=())
def multiply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w


multiply.register_fake(lambda x, w: x @ w)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return multiply(self.fc(x), self.weight)


def test_an_operation_that_is_not_known_says_how_to_ask_for_it():
    with torch.no_grad():
        found = said(Unknown(), X)
    line = Unknown.forward.__code__.co_firstlineno + 1
    assert found["weight"] == (
        f"used by gws_test::multiply at {__file__}:{line}, which gws_compile does not know: please report it with this "
        "line; if it multiplies by the weight, it belongs into READS in gws_compile/passes/operations.py, else into "
        "OTHERS"
    )


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x @ self.weight, lambda x: x - self.weight.sum(), (self.fc(x),))


def test_inside_a_higher_order_operator():
    found = said(Branch(), X)
    assert found["fc.weight"] == "linear"
    assert found["weight"].startswith("inside cond at ")
    assert found["weight"].endswith("a higher-order operator whose body is not rewritten")


def test_a_weight_that_an_unknown_operation_uses_too():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return multiply(x @ self.weight, self.weight)

    with torch.no_grad(), pytest.warns(gws_compile.GwsWarning) as caught:
        found = said(Twice(), X)
    assert found == {"weight": "matmul"}
    line = Twice.forward.__code__.co_firstlineno + 1
    assert [str(w.message) for w in caught] == [
        f"weight is sampled for matmul, but gws_test::multiply at {__file__}:{line} uses the weight itself: "
        "gws_compile does not know this operation, or does not look into it"
    ]
