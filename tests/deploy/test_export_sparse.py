"""Sparse weights as they are deployed: zeros in the file, those of evaluation, decoded by compressed-tensors."""

import pytest
import torch
from safetensors.torch import load_file
from support.exports import evaluated, hard_weight, read_json, same_bits, without_minus_zero
from support.mask_oracle import mask_of
from support.models import llama
from support.small_models import Net, OneLayer

import gws_compile
from gws_compile import PrunedGroups

pytestmark = pytest.mark.usefixtures("reset")

TOKENS = torch.tensor([[3, 14, 15, 92, 6, 5, 35, 89]])


def decoded(folder, name):
    """A weight of a folder of compressed-tensors, by the package's own decompressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    written = read_json(folder / "config.json")["quantization_config"]
    config = QuantizationConfig.model_validate(written)
    stored = load_file(folder / "model.safetensors")
    local = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
    compressor = BaseCompressor.get_value_from_registry(written["format"])
    return compressor.decompress(local, config.config_groups["group_0"])["weight"]


@pytest.mark.parametrize(
    "fmt",
    ["mxfp8", "int4_group", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mxfp4", "fp8_channel", "nvfp4"))],
)
def test_compressed_tensors_decodes_2_4(fmt, tmp_path):
    """Every group of four has two zeros at least; the others are the cast of what is kept, bit for bit."""
    pytest.importorskip("compressed_tensors")
    settings = {"block": (1, 64)} if fmt == "int4_group" else {}
    model = llama(layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.copy_(hard_weight(160, 64))
    backend = gws_compile.backend(fmt, sparsity="2:4", inner="eager", **settings)
    rules = [("*.down_proj.*", {"block": (1, 32)})] if fmt == "int4_group" else []
    if rules:
        backend = gws_compile.backend(fmt, sparsity="2:4", inner="eager", rules=rules, **settings)
    compiled, _ = evaluated(backend, model, TOKENS)
    report = backend.export(compiled, tmp_path / "out")
    rows = {weight.name: weight for weight in report.weights}
    assert rows["model.layers.0.mlp.up_proj.weight"].sparsity == "2:4"
    assert rows["lm_head.weight"].sparsity == ""
    assert ", 2:4" in str(report)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        w = model.get_parameter(f"model.layers.0.{name}.weight").detach()
        got = decoded(tmp_path / "out", f"model.layers.0.{name}")
        kept = torch.where(mask_of(w, "2:4"), w, 0)
        expected = gws_compile.quantize(kept, fmt, settings.get("block"))
        if fmt == "nvfp4":
            expected = expected.bfloat16()
        expected = without_minus_zero(expected) if fmt.startswith("int") else expected
        assert same_bits(got.to(expected.dtype), expected)
        assert (got.reshape(-1, 4) == 0).sum(1).min() >= 2


@pytest.mark.parametrize("sparsity", ["2:4", PrunedGroups(0.5), PrunedGroups(0.25, "columns")], ids=str)
def test_a_module_gives_back_what_it_evaluated(sparsity, tmp_path):
    """`load_export` in a plain model is the compiled model under ``no_grad``."""
    model, x = Net(), torch.randn(5, 40)
    for seed, parameter in enumerate(model.parameters()):
        if parameter.ndim == 2:
            parameter.data = hard_weight(*parameter.shape, seed=seed)
    backend = gws_compile.backend("fp6_e3m2", sparsity=sparsity, inner="eager")
    compiled, out = evaluated(backend, model, x)
    backend.export(compiled, tmp_path / "out", "dense")
    state = gws_compile.load_export(tmp_path / "out")
    plain = Net()
    plain.load_state_dict(state)
    assert torch.equal(plain(x), out)
    for name in ("up.weight", "down.weight"):
        zero = state[name] == 0
        assert torch.equal(zero, zero | ~mask_of(dict(model.named_parameters())[name], str(sparsity)))
        assert not state[name][~mask_of(dict(model.named_parameters())[name], str(sparsity))].signbit().any()


def test_the_mask_is_that_of_torchs_pruner():
    """Torch's own pruner of 2:4 keeps the same elements."""
    from torch.ao.pruning import WeightNormSparsifier

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    w = model[0].weight.detach().clone()
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    mask = model[0].parametrizations.weight[0].mask.bool()
    assert torch.equal(mask, mask_of(w, "2:4"))


def test_there_is_no_container_of_positions():
    """What docs/sparsity.md says of compressed-tensors: names, and nothing behind them."""
    compressed_tensors = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor, ModelCompressor
    from compressed_tensors.config import CompressionFormat, Sparse24BitMaskConfig

    known = BaseCompressor.registered_names()
    for name in ("sparse-24-bitmask", "sparse-bitmask", "marlin-24"):
        assert name in [one.value for one in CompressionFormat], compressed_tensors.__version__
        assert name not in known
    with pytest.raises(ValueError, match="Sparse24 format is not longer supported"):
        ModelCompressor.from_compression_config(Sparse24BitMaskConfig())


def test_an_exported_weight_packs_in_the_layout_of_semi_structured_kernels(tmp_path):
    """Which takes two of four elements, and gives back the others as zeros."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.utils import semi_structured_conversions as conversions

    model = OneLayer(64, 64, bias=False).to(torch.bfloat16)
    backend = gws_compile.backend("fp8_e4m3", sparsity="2:4", inner="eager")
    compiled, _ = evaluated(backend, model, torch.zeros(1, 64, dtype=torch.bfloat16))
    backend.export(compiled, tmp_path / "out", "dense")
    w = gws_compile.load_export(tmp_path / "out")["fc.weight"]
    packed, positions = conversions.sparse_semi_structured_from_dense_cutlass(w)
    assert packed.shape == (64, 32)
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(packed, positions), w)


@pytest.mark.slow
def test_learned_widths_and_a_share_together(tmp_path):
    """As GETA has both (arXiv 2502.16638): the share that was asked for is zero, and widths end in their range."""
    torch.manual_seed(0)
    model, tokens = llama(layers=1), torch.randint(0, 96, (4, 32))
    bits = gws_compile.LearnedBits(average=5.0, min=3.0, max=8.0)
    backend = gws_compile.backend(bits=bits, sparsity=PrunedGroups(0.25), inner="aot_eager")
    backend.prepare(model, tokens)
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters(), "lr": 3e-3}, {"params": list(backend.parameters()), "lr": 0.05}],
        weight_decay=0.0,
    )
    losses = []
    for _ in range(60):
        logits = compiled(tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + backend.bit_loss()).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert abs(backend.average_bits() - 5.0) < 0.3
    widths = backend.bits()
    assert all(((b >= 3) & (b <= 8)).all() for b in widths.values())
    assert len({float(b) for of_weight in widths.values() for b in of_weight.flatten()}) > 10
    backend.freeze_bits()
    backend.export(compiled, tmp_path / "out", "dense")
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name in widths:
        rows = (state[name] == 0).all(1)
        assert int(rows.sum()) == round(0.25 * len(rows)), name


def test_slices_of_an_mlp_compute_the_same(tmp_path):
    """Half of the neurons go, where the columns of down_proj are zero; what is left is a smaller Llama."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = llama()
    rules = [("*.down_proj.*", {"sparsity": PrunedGroups(0.5, "columns")})]
    backend = gws_compile.backend("fp8_e4m3", rules=rules, inner="eager")
    compiled, _ = evaluated(backend, model, TOKENS)
    backend.export(compiled, tmp_path / "out", "dense")
    masked = LlamaForCausalLM.from_pretrained(tmp_path / "out").double().eval()
    sliced = LlamaForCausalLM.from_pretrained(tmp_path / "out").double().eval()
    for layer in sliced.model.layers:
        mlp = layer.mlp
        kept = gws_compile.slice_pruned(mlp.down_proj, [mlp.gate_proj, mlp.up_proj])
        assert len(kept) == 80
        assert (mlp.down_proj.in_features, mlp.up_proj.out_features) == (80, 80)
    with torch.no_grad():
        torch.testing.assert_close(sliced(TOKENS).logits, masked(TOKENS).logits, rtol=1e-12, atol=1e-12)
    sliced.config.intermediate_size = 80
    sliced.save_pretrained(tmp_path / "small")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters()) - 2 * 3 * 80 * 64


def test_slices_of_heads_and_of_conv1d(tmp_path):
    """Whole heads, by the columns of what follows them; and GPT-2's layers, whose weights lie the other way."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(32, 32) for _ in range(3))
            self.o = Conv1D(32, 32)

        def forward(self, x):
            q, k, v = (one(x).unflatten(-1, (-1, 8)).transpose(1, 2) for one in (self.q, self.k, self.v))
            heads = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.o(heads.transpose(1, 2).flatten(2))

    model, x = Attention(), torch.randn(2, 5, 32)
    with torch.no_grad():
        model.o.weight.normal_()  # (in, out)
    rules = [("o.*", {"sparsity": PrunedGroups(0.5, "columns", size=8)})]
    backend = gws_compile.backend("fp8_e4m3", rules=rules, inner="eager")
    compiled, out = evaluated(backend, model, x)
    backend.export(compiled, tmp_path / "out", "dense")
    sliced = Attention()
    sliced.load_state_dict(gws_compile.load_export(tmp_path / "out"))
    masked = Attention().double()
    masked.load_state_dict(sliced.state_dict())
    norms = model.o.weight.detach().double().square().sum(1).view(4, 8).sum(1)
    kept = gws_compile.slice_pruned(sliced.o, [sliced.q, sliced.k, sliced.v], size=8)
    heads = norms.topk(2).indices.sort().values
    assert kept.tolist() == [int(head) * 8 + i for head in heads for i in range(8)]
    assert sliced.o.weight.shape == (16, 32)
    assert sliced.q.bias.shape == (16,)
    torch.testing.assert_close(sliced(x), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sliced.double()(x.double()), masked(x.double()), rtol=1e-12, atol=1e-12)


def test_what_cannot_be_sliced():
    def layer(rows, cols):
        return torch.nn.Linear(cols, rows)

    consumer = layer(8, 6)
    with pytest.raises(ValueError, match="no input of the consumer has zeros alone"):
        gws_compile.slice_pruned(consumer, [layer(6, 4)])
    consumer.weight.data[:, 2:4] = 0
    with pytest.raises(ValueError, match="the 6 outputs that the consumer takes, got one with 12"):
        gws_compile.slice_pruned(consumer, [layer(12, 4)])
    with pytest.raises(ValueError, match="takes one producer or more, got none"):
        gws_compile.slice_pruned(consumer, [])
    with pytest.raises(ValueError, match="a divisor of the consumer's 6 inputs, got 4"):
        gws_compile.slice_pruned(consumer, [layer(6, 4)], size=4)
    with pytest.raises(ValueError, match="no group of 3 inputs of the consumer"):
        gws_compile.slice_pruned(consumer, [layer(6, 4)], size=3)
    with pytest.raises(ValueError, match=r"nn\.Linear and Conv1D layers, got Conv2d"):
        gws_compile.slice_pruned(torch.nn.Conv2d(3, 3, 3), [layer(6, 4)])
    consumer.weight.data[:] = 0
    with pytest.raises(ValueError, match="nothing would be left"):
        gws_compile.slice_pruned(consumer, [layer(6, 4)])
    assert consumer.weight.shape == (8, 6)


def test_a_weight_that_is_sparse_in_one_graph_alone(tmp_path):
    """Along its columns in one graph, and left dense in another, that reads it the other way: no file can be both."""

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(8, 8))

        def forward(self, x, turned):
            return x @ self.w if turned else x @ self.w.t()

    model = Both()
    backend = gws_compile.backend("fp8_e4m3", sparsity="2:4", inner="eager")
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(torch.randn(2, 8), False)
        compiled(torch.randn(2, 8), True)
    with pytest.raises(ValueError, match="w is sparse along one side in one graph, and along the other"):
        backend.export(compiled, tmp_path / "out", "dense")
