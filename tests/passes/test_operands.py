"""Every read in the table in all its forms: a weight by position, by keyword, as a method, as an operator."""

import pytest
import torch
import torch.nn.functional as F
from gws_compile.passes.operations import READS
from support.graphs import Reader, reasons

import gws_compile

aten = torch.ops.aten


def _imatmul(x, w):
    x = x.clone()
    x @= w
    return x


def _out(op):
    def read(x, w):
        return op(x, w, out=torch.empty(2, 5))

    return read


def _recurrent(op, gates):
    """A layer of one direction, with its input's weight first in the list of weights."""

    def read(x, w):
        state = torch.zeros(1, 2, 5)
        state = (state, state) if gates == 4 else state
        return op(x, state, [w, torch.ones(gates * 5, 5)], False, 1, 0.0, True, False, False)[0]

    def read_hidden(x, w):
        state = torch.zeros(1, 2, 5)
        state = (state, state) if gates == 4 else state
        params = [torch.ones(gates * 5, 4), w]
        return op(x, hx=state, params=params, has_biases=False, num_layers=1, dropout=0.0, train=True,
                  bidirectional=False, batch_first=False)[0]  # fmt: skip

    return [((3, 2, 4), (gates * 5, 4), read), ((3, 2, 4), (gates * 5, 5), read_hidden)]


def _cell(op, gates):
    def state():
        return (torch.zeros(2, 5), torch.zeros(2, 5)) if gates == 4 else torch.zeros(2, 5)

    def first(out):
        return out[0] if gates == 4 else out

    return [
        ((2, 4), (gates * 5, 4), lambda x, w: first(op(x, state(), w, torch.ones(gates * 5, 5)))),
        ((2, 4), (gates * 5, 5), lambda x, w: first(op(x, state(), torch.ones(gates * 5, 4), w))),
        ((2, 4), (gates * 5, 4), lambda x, w: first(op(x, hx=state(), w_ih=w, w_hh=torch.ones(gates * 5, 5)))),
        ((2, 4), (gates * 5, 5), lambda x, w: first(op(x, hx=state(), w_ih=torch.ones(gates * 5, 4), w_hh=w))),
    ]


def _attention(x, **weights):
    """`multi_head_attention_forward` with the rest by default."""
    given = {"in_proj_weight": None, "out_proj_weight": torch.ones(4, 4), **weights}
    return F.multi_head_attention_forward(
        x, x, x, 4, 2, in_proj_bias=None, bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
        out_proj_bias=None, need_weights=False, **given)[0]  # fmt: skip


def _separate(name):
    def read(x, w):
        weights = {f"{kind}_proj_weight": torch.ones(4, 4) for kind in "qkv"}
        return _attention(x, use_separate_proj_weight=True, **{**weights, name: w})

    return read


def _encoder_layer(name):
    def read(x, w):
        given = {
            "qkv_weight": torch.ones(12, 4),
            "proj_weight": torch.ones(4, 4),
            "ffn_weight_1": torch.ones(8, 4),
            "ffn_weight_2": torch.ones(4, 8),
            name: w,
        }
        return torch._transformer_encoder_layer_fwd(
            src=x, embed_dim=4, num_heads=2, qkv_bias=torch.zeros(12), proj_bias=torch.zeros(4), use_gelu=False,
            norm_first=False, eps=1e-5, norm_weight_1=torch.ones(4), norm_bias_1=torch.zeros(4),
            norm_weight_2=torch.ones(4), norm_bias_2=torch.zeros(4), ffn_bias_1=torch.zeros(8),
            ffn_bias_2=torch.zeros(4), **given)  # fmt: skip

    return read


def _convolutions(dims):
    op, name = getattr(F, f"conv{dims}d"), f"conv{dims}d"
    transposed = getattr(F, f"conv_transpose{dims}d")
    x, w = (1, 4, *(8,) * dims), (5, 4, *(3,) * dims)
    wt = (4, 5, *(3,) * dims)
    return {
        name: [
            (x, w, lambda x, w: op(x, w)),
            (x, w, lambda x, w: op(x, weight=w)),
            (x, w, lambda x, w: op(weight=w, input=x)),
            (x, w, lambda x, w: op(x, w, None, 1, "same")),
            (x, w, lambda x, w: getattr(aten, name)(x, weight=w)),
        ],
        f"conv_transpose{dims}d": [
            (x, wt, lambda x, w: transposed(x, w)),
            (x, wt, lambda x, w: transposed(x, weight=w)),
            (x, wt, lambda x, w: transposed(weight=w, input=x)),
        ],
    }


def _offsets():
    return torch.tensor([2, 4], dtype=torch.int32)


def _zeros(*shape):
    return torch.zeros(shape)


M, V, B = (2, 4), (4,), (3, 2, 4)
GROUPS = (2, 8, 16)

# Operation -> (shape of the input, shape of the weight, the read), with the weight as each operand that is one.
FORMS = {
    "linear": [
        (M, (5, 4), lambda x, w: F.linear(x, w)),
        (M, (5, 4), lambda x, w: F.linear(x, weight=w)),
        (M, (5, 4), lambda x, w: F.linear(weight=w, input=x)),
        (M, (5, 4), lambda x, w: F.linear(x, w, bias=_zeros(5))),
        (M, (5, 4), lambda x, w: torch._C._nn.linear(x, weight=w)),
        (M, (5, 4), lambda x, w: aten.linear(x, w)),
        (M, (5, 4), lambda x, w: aten.linear.default(input=x, weight=w)),
    ],
    "bilinear": [
        (M, (5, 4, 4), lambda x, w: F.bilinear(x, x, w)),
        (M, (5, 4, 4), lambda x, w: F.bilinear(input1=x, input2=x, weight=w)),
    ],
    "matmul": [
        (M, (4, 5), lambda x, w: x @ w),
        ((4, 5), (2, 4), lambda x, w: w @ x),
        (M, (4, 5), lambda x, w: x.matmul(w)),
        (M, (4, 5), lambda x, w: x.matmul(other=w)),
        ((4, 5), (2, 4), lambda x, w: w.matmul(x)),
        ((4, 5), (2, 4), lambda x, w: w.matmul(other=x)),
        (M, (4, 5), lambda x, w: torch.matmul(x, w)),
        (M, (4, 5), lambda x, w: torch.matmul(x, other=w)),
        (M, (4, 5), lambda x, w: torch.matmul(other=w, input=x)),
        ((4, 5), (2, 4), lambda x, w: torch.matmul(input=w, other=x)),
        (M, (4, 5), lambda x, w: x.__matmul__(w)),
        (M, (4, 5), lambda x, w: w.__rmatmul__(x)),
        (M, (4, 5), lambda x, w: torch.linalg.matmul(x, w)),
        (M, (4, 5), lambda x, w: torch.linalg.matmul(input=x, other=w)),
        (M, (4, 5), lambda x, w: aten.matmul(x, other=w)),
        (M, (4, 5), _out(torch.matmul)),
    ],
    "imatmul": [(M, (4, 4), _imatmul)],
    "inner": [
        (M, (5, 4), lambda x, w: torch.inner(x, w)),
        (M, (5, 4), lambda x, w: torch.inner(input=x, other=w)),
        (M, (5, 4), lambda x, w: x.inner(other=w)),
        (M, (5, 4), lambda x, w: w.inner(x)),
    ],
    "mm": [
        (M, (4, 5), lambda x, w: torch.mm(x, w)),
        (M, (4, 5), lambda x, w: torch.mm(x, mat2=w)),
        (M, (4, 5), lambda x, w: torch.mm(mat2=w, input=x)),
        (M, (3, 2), lambda x, w: torch.mm(input=w, mat2=x)),
        (M, (4, 5), lambda x, w: x.mm(w)),
        (M, (4, 5), lambda x, w: x.mm(mat2=w)),
        (M, (3, 2), lambda x, w: w.mm(x)),
        (M, (4, 5), lambda x, w: aten.mm(x, w)),
        (M, (3, 2), lambda x, w: aten.mm.default(self=w, mat2=x)),
        (M, (4, 5), _out(torch.mm)),
    ],
    "bmm": [
        (B, (3, 4, 5), lambda x, w: torch.bmm(x, w)),
        (B, (3, 4, 5), lambda x, w: torch.bmm(input=x, mat2=w)),
        (B, (3, 5, 2), lambda x, w: torch.bmm(mat2=x, input=w)),
        (B, (3, 4, 5), lambda x, w: x.bmm(mat2=w)),
        (B, (3, 5, 2), lambda x, w: w.bmm(x)),
    ],
    "mv": [
        (V, (5, 4), lambda x, w: torch.mv(w, x)),
        (V, (5, 4), lambda x, w: torch.mv(input=w, vec=x)),
        (V, (5, 4), lambda x, w: w.mv(vec=x)),
    ],
    "dot": [
        (V, (2, 4), lambda x, w: torch.dot(x, w[0])),
        (V, (2, 4), lambda x, w: torch.dot(x, tensor=w[0])),
        (V, (2, 4), lambda x, w: w[0].dot(x)),
    ],
    "vdot": [
        (V, (2, 4), lambda x, w: torch.vdot(x, w[0])),
        (V, (2, 4), lambda x, w: torch.vdot(input=x, other=w[0])),
        (V, (2, 4), lambda x, w: w[0].vdot(other=x)),
    ],
    "vecdot": [
        (M, (2, 4), lambda x, w: torch.linalg.vecdot(x, w)),
        (M, (2, 4), lambda x, w: torch.linalg.vecdot(w, x, dim=0)),
        (M, (2, 4), lambda x, w: torch.linalg.vecdot(x=x, y=w)),
    ],
    "addmm": [
        (M, (4, 5), lambda x, w: torch.addmm(_zeros(5), x, w)),
        (M, (4, 5), lambda x, w: torch.addmm(_zeros(5), mat1=x, mat2=w)),
        (M, (3, 2), lambda x, w: torch.addmm(mat1=w, mat2=x, input=_zeros(4))),
        (M, (4, 5), lambda x, w: torch.addmm(_zeros(5), x, w, beta=2, alpha=3)),
        (M, (4, 5), lambda x, w: _zeros(5).addmm(x, mat2=w)),
    ],
    "addmm_": [
        (M, (4, 5), lambda x, w: _zeros(2, 5).addmm_(x, w)),
        (M, (3, 2), lambda x, w: _zeros(3, 4).addmm_(mat1=w, mat2=x)),
    ],
    "addmv": [
        (V, (5, 4), lambda x, w: torch.addmv(_zeros(5), w, x)),
        (V, (5, 4), lambda x, w: torch.addmv(_zeros(5), mat=w, vec=x)),
        (V, (5, 4), lambda x, w: _zeros(5).addmv(w, vec=x)),
    ],
    "addmv_": [(V, (5, 4), lambda x, w: _zeros(5).addmv_(mat=w, vec=x))],
    "addbmm": [
        (B, (3, 4, 5), lambda x, w: torch.addbmm(_zeros(2, 5), x, w)),
        (B, (3, 5, 2), lambda x, w: torch.addbmm(_zeros(5, 4), batch1=w, batch2=x)),
    ],
    "addbmm_": [(B, (3, 4, 5), lambda x, w: _zeros(2, 5).addbmm_(x, batch2=w))],
    "baddbmm": [
        (B, (3, 4, 5), lambda x, w: torch.baddbmm(_zeros(3, 2, 5), x, w)),
        (B, (3, 5, 2), lambda x, w: torch.baddbmm(_zeros(3, 5, 4), batch1=w, batch2=x)),
        (B, (3, 4, 5), lambda x, w: _zeros(3, 2, 5).baddbmm(x, batch2=w)),
    ],
    "baddbmm_": [(B, (3, 4, 5), lambda x, w: _zeros(3, 2, 5).baddbmm_(x, w))],
    "einsum": [
        (M, (5, 4), lambda x, w: torch.einsum("bi,oi->bo", x, w)),
        (M, (5, 4), lambda x, w: torch.einsum("oi,bi->bo", w, x)),
        (M, (5, 4), lambda x, w: torch.einsum("bi,oi->bo", [x, w])),
        (M, (5, 4), lambda x, w: torch.einsum("bi,oi->bo", (x, w))),
        (M, (5, 4), lambda x, w: torch.einsum(x, [0, 1], w, [2, 1], [0, 2])),
        (M, (5, 4), lambda x, w: torch.einsum(w, [2, 1], x, [0, 1])),
        (M, (5, 4), lambda x, w: aten.einsum("bi,oi->bo", tensors=[x, w])),
    ],
    "tensordot": [
        (M, (4, 5), lambda x, w: torch.tensordot(x, w, dims=1)),
        (M, (4, 5), lambda x, w: torch.tensordot(a=x, b=w, dims=([1], [0]))),
        (M, (3, 2), lambda x, w: torch.tensordot(w, x, 1)),
        (M, (4, 5), lambda x, w: aten.tensordot(x, other=w, dims_self=[1], dims_other=[0])),
    ],
    "multi_dot": [
        (M, (4, 5), lambda x, w: torch.linalg.multi_dot([x, w])),
        (M, (4, 5), lambda x, w: torch.linalg.multi_dot(tensors=(x, w))),
    ],
    "chain_matmul": [(M, (4, 5), lambda x, w: torch.chain_matmul(x, w))],
    "grouped_mm": [
        (GROUPS, (2, 16, 8), lambda x, w: F.grouped_mm(x, w)),
        (GROUPS, (2, 16, 8), lambda x, w: F.grouped_mm(x, mat_b=w)),
        (GROUPS, (2, 16, 8), lambda x, w: F.grouped_mm(mat_a=w, mat_b=x)),
    ],
    "_grouped_mm": [
        (GROUPS, (2, 16, 8), lambda x, w: torch._grouped_mm(x, w)),
        (GROUPS, (2, 16, 8), lambda x, w: torch._grouped_mm(x, mat2=w)),
    ],
    "transformers::grouped_mm_fallback": [
        ((4, 16), (2, 16, 8), lambda x, w: torch.ops.transformers.grouped_mm_fallback(x, w, _offsets())),
        (
            (4, 16),
            (2, 16, 8),
            lambda x, w: torch.ops.transformers.grouped_mm_fallback(x, weight=w, offs=_offsets()),
        ),
    ],
    **_convolutions(1),
    **_convolutions(2),
    **_convolutions(3),
    "conv_tbc": [
        ((6, 2, 4), (3, 4, 5), lambda x, w: torch.conv_tbc(x, w, _zeros(5), 0)),
        ((6, 2, 4), (3, 4, 5), lambda x, w: torch.conv_tbc(x, bias=_zeros(5), weight=w)),
    ],
    "convolution": [
        ((1, 4, 8), (5, 4, 3), lambda x, w: torch.convolution(x, w, None, [1], [0], [1], False, [0], 1)),
        (
            (1, 4, 8),
            (5, 4, 3),
            lambda x, w: torch.convolution(
                x,
                weight=w,
                bias=None,
                stride=[1],
                padding=[0],
                dilation=[1],
                transposed=False,
                output_padding=[0],
                groups=1,
            ),
        ),
    ],
    "multi_head_attention_forward": [
        (
            B,
            (12, 4),
            lambda x, w: F.multi_head_attention_forward(
                x, x, x, 4, 2, w, None, None, None, False, 0.0, torch.ones(4, 4), None
            )[0],
        ),
        (B, (12, 4), lambda x, w: _attention(x, in_proj_weight=w)),
        (B, (4, 4), lambda x, w: _attention(x, in_proj_weight=torch.ones(12, 4), out_proj_weight=w)),
        *((B, (4, 4), _separate(f"{kind}_proj_weight")) for kind in "qkv"),
    ],
    "_native_multi_head_attention": [
        (
            B,
            (12, 4),
            lambda x, w: torch._native_multi_head_attention(x, x, x, 4, 2, w, _zeros(12), torch.ones(4, 4), _zeros(4))[
                0
            ],
        ),
        (
            B,
            (4, 4),
            lambda x, w: torch._native_multi_head_attention(
                x, x, x, 4, 2, torch.ones(12, 4), _zeros(12), proj_weight=w, proj_bias=_zeros(4)
            )[0],
        ),
    ],
    "_transformer_encoder_layer_fwd": [
        (B, (12, 4), _encoder_layer("qkv_weight")),
        (B, (4, 4), _encoder_layer("proj_weight")),
        (B, (8, 4), _encoder_layer("ffn_weight_1")),
        (B, (4, 8), _encoder_layer("ffn_weight_2")),
    ],
    "lstm": _recurrent(torch.lstm, 4),
    "gru": _recurrent(torch.gru, 3),
    "rnn_tanh": _recurrent(torch.rnn_tanh, 1),
    "rnn_relu": _recurrent(torch.rnn_relu, 1),
    "lstm_cell": _cell(torch.lstm_cell, 4),
    "gru_cell": _cell(torch.gru_cell, 3),
    "rnn_tanh_cell": _cell(torch.rnn_tanh_cell, 1),
    "rnn_relu_cell": _cell(torch.rnn_relu_cell, 1),
}


def test_every_read_has_forms():
    assert set(FORMS) == set(READS)


CASES = [pytest.param(op, *form, id=f"{op}-{i}") for op, forms in FORMS.items() for i, form in enumerate(forms)]


@pytest.mark.parametrize(("op", "given", "shape", "read"), CASES)
def test_a_read_is_a_read(op, given, shape, read):
    if op.startswith("transformers::"):
        pytest.importorskip("transformers.integrations.moe")
    torch._dynamo.reset()
    dtype = torch.bfloat16 if "grouped" in op else torch.float32
    model = Reader(torch.ones(shape, dtype=dtype), read)
    backend = gws_compile.backend(inner="eager")
    x = torch.ones(given, dtype=dtype)
    # Those that only run without gradients are written without, too: what is looked at is the graph.
    with torch.set_grad_enabled(not op.startswith(("_native", "_transformer")) and "out" not in read.__qualname__):
        torch.compile(model, backend=backend, fullgraph=True)(x)
    # What torch traces of `F.grouped_mm` is the operator inside.
    assert reasons(backend)["weight"].removeprefix("_") == op.removeprefix("_")
    (sample,) = [n for n in backend.graphs[0].graph.nodes if n.target is torch.ops.gws.sample_weight.default]
    (weight,) = sample.all_input_nodes[:1]
    assert list(weight.users) == [sample]  # nothing takes the weight itself any more
