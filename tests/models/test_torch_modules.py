"""Torch's own modules with fused operations: attention, encoder layers with their fast paths, recurrent layers."""

import contextlib

import pytest
import torch
from support.eager import gradients
from torch import nn

import gws_compile

pytestmark = pytest.mark.usefixtures("reset")


@contextlib.contextmanager
def recurrent_layers_traced():
    # Plain torch.compile cannot train an LSTM on oneDNN's kernel (torch 2.13).
    with torch._dynamo.config.patch(allow_rnn=True), torch.backends.mkldnn.flags(enabled=False):
        yield


def loss_of(y):
    return y.pow(3).sum()  # behind a layer norm the sum of squares is a constant


def assert_close_gradients(actual, expected):
    # Sums of float32 in another order: off by a few units in the last place of their largest terms.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def assert_trains_on_the_samples(model, x, expected, *, inner="aot_eager", **settings):
    """One training step: the weights of ``expected`` are sampled, and the gradients are those at the samples."""
    backend = gws_compile.backend("fp4_e2m1", inner=inner, **settings)
    compiled = torch.compile(model, backend=backend)
    loss = loss_of(compiled(x))
    loss.backward()
    report = backend.report()
    assert {r.name: r.op for r in report.rewritten} == expected
    assert report.skipped == ()
    wanted, grads = gradients(model, lambda call: loss_of(call(x)), expected, "fp4_e2m1", 0)
    torch.testing.assert_close(loss.item(), wanted, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        assert_close_gradients(parameter.grad, grads[name])
    return backend, compiled


ATTENTION = "multi_head_attention_forward"


class SelfAttention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True, **settings)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("settings", [{}, {"kdim": 16, "vdim": 16}, {"add_bias_kv": True}])
@pytest.mark.parametrize("backward", ["save", "recompute"])
def test_multihead_attention(settings, backward):
    names = ["mha.in_proj_weight", "mha.out_proj.weight"]
    model = SelfAttention(**settings)
    backend = gws_compile.backend("fp4_e2m1", inner="aot_eager", backward=backward)
    x = torch.randn(2, 5, 16)
    loss_of(torch.compile(model, backend=backend)(x)).backward()
    assert {r.name: r.op for r in backend.report().rewritten} == dict.fromkeys(names, ATTENTION)
    assert {r.name: r.reason for r in backend.report().skipped} == (
        {
            f"mha.{bias}": f"no matrix product or convolution reads it, only: {ATTENTION}, as its {bias}"
            for bias in ("bias_k", "bias_v")
        }
        if "add_bias_kv" in settings
        else {}
    )
    _, grads = gradients(model, lambda call: loss_of(call(x)), names, "fp4_e2m1", 0)
    for name, parameter in model.named_parameters():
        assert_close_gradients(parameter.grad, grads[name])


def test_attention_with_separate_projections():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(16, 2, kdim=8, vdim=12, batch_first=True)

        def forward(self, x):
            return self.mha(x, x[..., :8], x[..., :12])[0]

    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert_trains_on_the_samples(Cross(), torch.randn(2, 5, 16), {f"mha.{n}": ATTENTION for n in names})


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_encoder_and_its_fast_path(inner):
    expected = {}
    for i in (0, 1):
        expected |= {f"layers.{i}.self_attn.{name}": ATTENTION for name in ("in_proj_weight", "out_proj.weight")}
        expected |= {f"layers.{i}.linear{n}.weight": "linear" for n in (1, 2)}
    model, x = encoder(), torch.randn(2, 5, 16)
    backend, compiled = assert_trains_on_the_samples(model, x, expected, inner=inner)
    model.eval()
    with torch.no_grad():
        got = compiled(x)
        assert any("_transformer_encoder_layer_fwd" in str(n.target) for n in backend.graphs[-1].graph.nodes)
        plain = model(x)
        for name in expected:
            weight = model.get_parameter(name)
            weight.copy_(gws_compile.quantize(weight, "fp4_e2m1"))
        torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-6)
        assert (got - plain).abs().max() > 0.01
    assert {r.name for r in backend.report().rewritten} == expected.keys()


@pytest.mark.parametrize("backward", ["save", "recompute"])
def test_encoder_under_autocast_is_the_plain_one(backward):
    """The weights of fused attention are cast where its own products would cast them: no bit changes."""
    model, x = encoder(), torch.randn(2, 5, 16)
    results = []
    for backend in ("aot_eager", gws_compile.backend("e8m23", noise="none", backward=backward, inner="aot_eager")):
        torch._dynamo.reset()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.compile(model, backend=backend, fullgraph=True)(x)
        loss_of(y.float()).backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Recurrent(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        self.rnn = kind(8, 16, batch_first=True, **settings)
        self.fc = nn.Linear(self.rnn.proj_size or 16, 4)

    def forward(self, x):
        return self.fc(self.rnn(x)[0])


@pytest.mark.parametrize(
    ("kind", "op", "settings"),
    [
        (nn.LSTM, "lstm", {"num_layers": 2}),
        (nn.LSTM, "lstm", {"proj_size": 6}),
        (nn.GRU, "gru", {"bias": False}),
        (nn.RNN, "rnn_tanh", {}),
        (nn.RNN, "rnn_relu", {"nonlinearity": "relu"}),
    ],
)
def test_recurrent_layers_that_dynamo_traces(kind, op, settings):
    model = Recurrent(kind, **settings)
    weights = [name for name, p in model.rnn.named_parameters() if p.ndim == 2]
    expected = {f"rnn.{name}": op for name in weights} | {"fc.weight": "linear"}
    with recurrent_layers_traced():
        assert_trains_on_the_samples(model, torch.randn(2, 5, 8), expected)


@pytest.mark.parametrize(
    ("kind", "op"), [(nn.LSTMCell, "lstm_cell"), (nn.GRUCell, "gru_cell"), (nn.RNNCell, "rnn_tanh_cell")]
)
def test_recurrent_cells(kind, op):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = kind(8, 16)

        def forward(self, x):
            state = None
            for t in range(3):
                state = self.cell(x[:, t], state)
            return state[0] if isinstance(state, tuple) else state

    assert_trains_on_the_samples(Loop(), torch.randn(2, 3, 8), {"cell.weight_ih": op, "cell.weight_hh": op})


def test_a_learned_initial_state_is_no_weight():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(8, 16)
            self.h0 = nn.Parameter(torch.randn(1, 16))

        def forward(self, x):
            return self.rnn(x, self.h0)[0]

    backend = gws_compile.backend(inner="eager")
    with recurrent_layers_traced():
        torch.compile(Stateful(), backend=backend, fullgraph=True)(torch.randn(5, 8))
    (record,) = backend.report().skipped
    assert record.name == "h0"
