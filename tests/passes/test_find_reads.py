"""Which weight reads are found, and what is said of the others."""

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Reader, reasons
from torch import nn

import gws_compile


def report(model, *args, **settings):
    backend = gws_compile.backend(**{"inner": "eager", **settings})
    torch.compile(model, backend=backend)(*args)
    return reasons(backend)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


X = torch.ones(2, 4)
BATCH = torch.ones(3, 2, 4)


@pytest.mark.parametrize(
    ("x", "shape", "read", "op"),
    [
        (X, (5, 4), lambda x, w: F.linear(x, w), "linear"),
        (X, (5, 4), lambda x, w: F.linear(x, weight=w), "linear"),
        (X, (4, 5), lambda x, w: x @ w, "matmul"),
        (X, (4, 5), lambda x, w: x.matmul(w), "matmul"),
        (X, (4, 5), lambda x, w: torch.matmul(x, other=w), "matmul"),
        (X, (4, 5), lambda x, w: torch.mm(x, w), "mm"),
        (X, (5, 4), lambda x, w: torch.inner(x, w), "inner"),
        (X, (4, 5), lambda x, w: x.mm(w), "mm"),
        (X, (3, 2), lambda x, w: w.mm(x), "mm"),
        (X, (4, 5), lambda x, w: torch.addmm(torch.zeros(5), x, w), "addmm"),
        (X, (4, 5), lambda x, w: torch.addmm(torch.zeros(5), mat1=x, mat2=w), "addmm"),
        (torch.ones(4), (5, 4), lambda x, w: w.mv(x), "mv"),
        (BATCH, (3, 4, 5), lambda x, w: torch.bmm(x, w), "bmm"),
        (BATCH, (3, 4, 5), lambda x, w: torch.baddbmm(torch.zeros(3, 2, 5), x, w), "baddbmm"),
        (X, (5, 4), lambda x, w: torch.einsum("bi,oi->bo", x, w), "einsum"),
        (X, (4, 2, 3), lambda x, w: torch.tensordot(x, w, dims=([1], [0])), "tensordot"),
        (X, (5, 4, 4), lambda x, w: F.bilinear(x, x, w), "bilinear"),
        (torch.ones(1, 4, 8), (5, 4, 3), lambda x, w: F.conv1d(x, w), "conv1d"),
        (torch.ones(1, 4, 8, 8), (5, 4, 3, 3), lambda x, w: F.conv2d(x, weight=w), "conv2d"),
        (torch.ones(1, 4, 4, 4, 4), (5, 4, 3, 3, 3), lambda x, w: F.conv3d(x, w), "conv3d"),
        (torch.ones(1, 4, 8), (4, 5, 3), lambda x, w: F.conv_transpose1d(x, w), "conv_transpose1d"),
        (torch.ones(1, 4, 8, 8), (4, 5, 3, 3), lambda x, w: F.conv_transpose2d(x, w), "conv_transpose2d"),
        (torch.ones(1, 4, 4, 4, 4), (4, 5, 3, 3, 3), lambda x, w: F.conv_transpose3d(x, w), "conv_transpose3d"),
        # through views, transposes, casts, splits, joins
        (X, (5, 4), lambda x, w: x @ w.t(), "matmul"),
        (X, (5, 4), lambda x, w: x @ w.T, "matmul"),
        (X, (5, 4), lambda x, w: x @ w.mT.contiguous(), "matmul"),
        (X, (20,), None, None),
        (X, (2, 10), lambda x, w: x @ w.view(4, 5), "matmul"),
        (X, (5, 4), lambda x, w: x.bfloat16() @ w.to(torch.bfloat16).transpose(0, 1), "matmul"),
        (X, (5, 4), lambda x, w: F.linear(x.half(), w.half()), "linear"),
        (X, (5, 4), lambda x, w: F.linear(x.bfloat16(), w.type_as(x.bfloat16())), "linear"),
        (X, (6, 4), lambda x, w: F.linear(x, w.chunk(2)[1]), "linear"),
        (X, (6, 4), lambda x, w: [F.linear(x, part) for part in w.split([1, 2, 3])], "linear"),
        (X, (3, 5, 4), lambda x, w: [F.linear(x, part) for part in w.unbind(0)], "linear"),
        (X, (6, 4), lambda x, w: F.linear(x, w[2:5]), "linear"),
        (X, (6, 4), lambda x, w: F.linear(x, torch.cat([w, w])), "linear"),
        (X, (5, 4), lambda x, w: F.linear(x, w.unsqueeze(0).expand(2, 5, 4)[1]), "linear"),
        (BATCH, (3, 5, 4), lambda x, w: torch.bmm(x, w.transpose(1, 2)), "bmm"),
        (X, (5, 4), lambda x, w: F.linear(x, w) + F.linear(x, w), "linear"),
        (X, (4, 4), lambda x, w: F.linear(x, w) @ w, "linear, matmul"),
    ],
)
def test_reads(x, shape, read, op):
    if read is None:
        with pytest.warns(gws_compile.GwsWarning, match="no weight has been rewritten"):
            assert (
                report(Reader(torch.ones(shape), lambda x, w: x @ w.view(4, 5)), x) == {}
            )  # one dim: a vector is no weight
        return
    backend = gws_compile.backend(inner="eager")
    torch.compile(Reader(torch.ones(shape), read), backend=backend, fullgraph=True)(x)
    (record,) = backend.report().rewritten
    assert record.op == ", ".join(op.split(", "))
    assert record.name == "weight"
    assert record.shape == shape
    sampled = [n for n in backend.graphs[0].graph.nodes if n.target is torch.ops.gws.sample_weight.default]
    assert len(sampled) == 1
    (placeholder,) = sampled[0].all_input_nodes[:1]
    assert list(placeholder.users) == sampled  # nothing reads the plain weight any more


@pytest.mark.filterwarnings("ignore::gws_compile.GwsWarning")
@pytest.mark.parametrize(
    ("x", "shape", "read", "reason"),
    [
        (torch.tensor([1, 2]), (5, 4), lambda x, w: F.embedding(x, w), "embedding look-up"),
        (torch.tensor([1, 2]), (5, 4), lambda x, w: w[x], "only: the graph's output"),
        (X, (2, 4), lambda x, w: x + w, "no matrix product or convolution reads it, only: add"),
        (X, (2, 4), lambda x, w: F.layer_norm(x, (2, 4), w), "only: layer_norm"),
        (X, (2, 4), lambda x, w: F.linear(w, x), "only: linear, as its input"),
        (X, (5, 4), lambda x, w: x.sum() * torch.tanh(w), "only: tanh"),
        (X, (2, 4), lambda x, w: x.view(w.shape).view_as(w), "not used in the graph"),
        (X.double(), (5, 4), lambda x, w: F.linear(x, w.double()), None),
    ],
)
def test_left_alone(x, shape, read, reason):
    found = report(Reader(torch.ones(shape), read), x)
    if reason is None:
        assert found == {"weight": "linear"}
    else:
        assert found.get("weight", "not used in the graph").endswith(reason)


@pytest.mark.filterwarnings("ignore::gws_compile.GwsWarning")
def test_written_in_place():
    def read(x, w):
        with torch.no_grad():
            w.mul_(0.5)
        return F.linear(x, w)

    assert report(Reader(torch.ones(5, 4), read), X) == {"weight": "written in place inside the graph"}


@pytest.mark.filterwarnings("ignore::gws_compile.GwsWarning")
def test_written_in_place_by_a_product_of_parameters_alone():
    """Which would be a reason too: that it is written comes first."""

    def read(x, w):
        with torch.no_grad():
            w @= w
        return x @ w

    assert report(Reader(torch.ones(4, 4), read), X) == {"weight": "written in place inside the graph"}


@pytest.mark.filterwarnings("ignore::gws_compile.GwsWarning")
def test_float64_weights_are_not_sampled():
    assert report(Reader(torch.ones(5, 4), F.linear).double(), X.double()) == {
        "weight": "float64 weights are not sampled"
    }


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.fc(self.embed(tokens)))


def test_tied_head_is_left_alone_unless_included():
    tokens = torch.tensor([[1, 2]])
    found = report(TiedHead(), tokens)
    assert found["fc.weight"] == "linear"
    assert found["embed.weight"].startswith("also an embedding table (tied)")
    torch._dynamo.reset()
    model = TiedHead()
    backend = gws_compile.backend(inner="eager", include=["embed.*"])
    torch.compile(model, backend=backend, fullgraph=True)(tokens)
    assert reasons(backend)["embed.weight"] == "linear"
    (graph,) = backend.graphs
    embedding = next(n for n in graph.graph.nodes if getattr(n.target, "__name__", "") == "embedding")
    assert embedding.args[1].op == "placeholder"  # the look-up keeps the plain table


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.gate = nn.Linear(4, 4, bias=False)
        self.gate_proj = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 4)

    def forward(self, x):
        return self.lm_head(self.gate_proj(self.gate(self.mlp(self.attn(x)))))


def test_heads_and_routers_are_excluded_by_default():
    assert report(Zoo(), X) == {
        "attn.weight": "linear",
        "mlp.0.weight": "linear",
        "mlp.1.weight": "linear",
        "gate.weight": "matches the exclude pattern 'gate.weight'",
        "gate_proj.weight": "linear",
        "lm_head.weight": "matches the exclude pattern 'lm_head.*'",
    }


def test_include_and_exclude():
    found = report(Zoo(), X, include=["mlp.*", "attn.weight"], exclude=["*.1.*"])
    assert [name for name, text in found.items() if text == "linear"] == ["attn.weight", "mlp.0.weight"]
    assert found["mlp.1.weight"] == "matches the exclude pattern '*.1.*'"
    assert found["gate_proj.weight"] == "no include pattern matches (mlp.*, attn.weight)"


def test_exclude_nothing():
    assert set(report(Zoo(), X, exclude=None).values()) == {"linear"}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['h']._modules['0']._modules['fc']._parameters['weight']", "h.0.fc.weight"),
        ("L['self']._modules['_orig_mod']._modules['fc']._parameters['weight']", "fc.weight"),
        ("L['self']._modules['module']._modules['fc']._parameters['weight']", "module.fc.weight"),
        ("L['self']._modules['a']._modules['_checkpoint_wrapped_module']._parameters['w']", "a.w"),
        ("L['self']._modules['_fsdp_wrapped_module']._parameters['w']", "w"),
        ("L['self']._modules['enc']._modules['module']._parameters['w']", "enc.module.w"),
        ("L['fn']._parameters['weight']", "weight"),
        ("L['fn'].weight", "weight"),
        ("L['w']", "w"),
        ("L['self'].__dict__['_modules']['lm_head']._parameters['weight']", "lm_head.weight"),
        ("unknown(L['self'], 3)", "unknown(L['self'], 3)"),
    ],
)
def test_qualified_names(source, name):
    from gws_compile.weight_names import qualified_name

    assert qualified_name(source) == name
