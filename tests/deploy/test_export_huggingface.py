"""Folders of Hugging Face models: names, configuration, what lies beside the weights; adapters; back to training."""

import pytest
import torch
from safetensors.torch import load_file
from support.exports import evaluated, read_json
from support.models import gpt2, llama

import gws_compile

pytestmark = pytest.mark.usefixtures("reset")

TOKENS = torch.tensor([[3, 14, 15, 92, 6, 5, 35, 89]])


def tokenizer():
    """Bytes, as GPT-2 splits and names them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:90]
    vocabulary = {"<|end|>": 0, **{letter: number + 1 for number, letter in enumerate(letters)}}
    merges = [("a", "b"), ("ab", "c")]
    vocabulary |= {"ab": 91, "abc": 92}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", bos_token="<|end|>")


def exported(tmp_path, model, format=None, *, tokenizer=None, **settings):
    backend = gws_compile.backend(inner="eager", **settings)
    compiled, output = evaluated(backend, model, TOKENS)
    report = backend.export(compiled, tmp_path / "out", format, tokenizer=tokenizer)
    return report, output.logits


def test_the_folder(tmp_path):
    model = llama()
    report, _ = exported(tmp_path, model, fmt="mxfp8", tokenizer=tokenizer())
    assert report.files == (
        "config.json", "generation_config.json", "gws_export.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    )  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}
    config = read_json(tmp_path / "out" / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert config["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "format": "mxfp8-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "symmetric": True,
                    "dynamic": False,
                    "strategy": "group",
                    "group_size": 32,
                    "scale_dtype": "torch.uint8",
                    "zp_dtype": "torch.uint8",
                },
                "input_activations": None,
                "output_activations": None,
                "format": "mxfp8-quantized",
            }
        },
    }
    assert not hasattr(model.config, "quantization_config")  # that of the model stays as it is
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.1.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert stored["model.layers.1.mlp.up_proj.weight_scale"].shape == (160, 2)


def test_weights_by_rules_are_groups_by_name(tmp_path):
    report, _ = exported(
        tmp_path,
        llama(),
        fmt="mxfp8",
        rules=[("*.mlp.*", "mxfp4"), ("*layers.1.self_attn.o_proj*", None)],
    )
    assert report.format == "mixed"
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["lm_head", "model.layers.1.self_attn.o_proj"]
    groups = {group["format"]: group["targets"] for group in config["config_groups"].values()}
    assert groups["mxfp4-pack-quantized"] == [
        f"model.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert len(groups["mxfp8-quantized"]) == 7
    row = next(weight for weight in report.weights if weight.name == "model.layers.1.self_attn.o_proj.weight")
    assert row.container == "dense"
    assert row.reason == "the rule '*layers.1.self_attn.o_proj*=none' leaves it alone"


def test_sglang_has_names_of_its_own(tmp_path):
    report, _ = exported(tmp_path, llama(), "mxfp8_sglang", fmt="mxfp8")
    assert report.load == f"python -m sglang.launch_server --model-path {tmp_path / 'out'}"
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"] == {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "modules_to_not_convert": ["lm_head"],
    }
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight_scale_inv"].dtype == torch.uint8
    assert "model.layers.0.mlp.up_proj.weight_scale" not in stored
    loaded = gws_compile.load_export(tmp_path / "out")
    assert "model.layers.0.mlp.up_proj.weight" in loaded


def test_experts_are_stored_one_by_one(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=3, num_experts_per_tok=2,
        decoder_sparse_step=1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    with pytest.raises(
        ValueError, match=r"experts.0.down_proj.weight, trained .* multiple of 32 columns, and it has 48"
    ):
        exported(tmp_path, model, "mxfp8", fmt="mxfp8", block=(16, 32))
    torch._dynamo.reset()
    report, _ = exported(tmp_path, model, fmt="fp8_channel")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    experts = model.model.layers[0].mlp.experts
    cast = gws_compile.quantize(experts.gate_up_proj.detach(), "fp8_channel")
    for expert in range(3):
        for place, name in enumerate(("gate_proj", "up_proj")):
            key = f"model.layers.0.mlp.experts.{expert}.{name}.weight"
            decoded = stored[key].float() * stored[f"{key}_scale"]
            assert torch.equal(decoded, cast[expert, 48 * place : 48 * (place + 1)])
    rows = {weight.name: weight for weight in report.weights}
    assert rows["model.layers.0.mlp.experts.gate_up_proj"].container == "fp8_channel"
    assert rows["model.layers.0.mlp.experts.gate_up_proj"].stored_bytes == 3 * 96 * (64 + 4)
    # Rows of gate and up share blocks of 128 rows, which a file that has them apart cannot tell.
    torch._dynamo.reset()
    backend = gws_compile.backend(fmt="fp8_block", inner="eager")
    compiled, _ = evaluated(backend, model, TOKENS)
    with pytest.raises(ValueError, match=r"its rows are only a part of a group of fp8_block in model.layers.0.mlp.exp"):
        backend.export(compiled, tmp_path / "block", "fp8_block")


def test_gpt2_is_dense_and_says_why(tmp_path):
    model = gpt2().eval()
    with pytest.warns(gws_compile.GwsWarning, match="c_attn.weight: a Conv1D's weight, stored transposed"):
        report, logits = exported(tmp_path, model, fmt="mxfp4")
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    assert report.load == f"GPT2LMHeadModel.from_pretrained('{tmp_path / 'out'}')"
    fresh = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(fresh(TOKENS).logits, logits)


@pytest.mark.parametrize("merged", [False, True])
def test_adapters(merged, tmp_path):
    """LoRA: apart from the packed base, or merged into it."""
    import peft
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=32, init_lora_weights=False)
    model = peft.get_peft_model(llama(), settings).eval()
    if merged:
        model.merge_adapter()
    report, logits = exported(tmp_path, model, fmt="mxfp8")
    assert ("adapter/adapter_model.safetensors" in report.files) is not merged
    assert len(report.packed) == 14
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    if not merged:
        loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "out" / "adapter")
        assert f"adapters are apart: peft.PeftModel.from_pretrained(model, '{tmp_path / 'out' / 'adapter'}')" in str(
            report
        )
    assert torch.equal(loaded(TOKENS).logits, logits)


@pytest.mark.parametrize(
    ("settings", "format", "dtype"),
    [
        ({"fmt": "mxfp8"}, None, torch.float32),
        ({"fmt": "mxfp4"}, None, torch.bfloat16),
        ({"fmt": "fp4_e2m1", "block": (16, 16)}, "nvfp4", torch.float32),
        ({"fmt": "mxfp6", "scale": "ceil"}, None, torch.float32),
        ({"fmt": "fp8_channel"}, None, torch.float32),
        ({"fmt": "int4_group", "block": (1, 32)}, None, torch.float32),
        ({"fmt": "nvfp4"}, None, torch.bfloat16),
    ],
)
def test_back_to_training(settings, format, dtype, tmp_path):
    """The first evaluation of the model that was loaded is that of the exported one; it trains, and leaves again."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    llama().save_pretrained(tmp_path / "start")  # .to(dtype) rounds the rotation's frequencies too
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=dtype).eval()
    _, logits = exported(tmp_path, start, format, **settings)
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=dtype, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    backend = gws_compile.backend(inner="eager", **settings)
    compiled, first = evaluated(backend, model, TOKENS)
    assert torch.equal(first.logits, logits)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    backend.export(compiled, tmp_path / "again", format)
    torch._dynamo.reset()
    with torch.no_grad():
        trained = compiled.eval()(TOKENS).logits
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", dtype=dtype, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert torch.equal(again.eval()(TOKENS).logits, trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gguf(dtype, tmp_path):
    """The gguf package decodes it, and transformers loads the model from it, with the rotation undone."""
    from transformers import AutoModelForCausalLM

    model = llama().eval().to(dtype)
    backend = gws_compile.backend(fmt="mxfp4", inner="eager")
    compiled, output = evaluated(backend, model, TOKENS)
    report = backend.export(compiled, tmp_path / "model.gguf", "gguf", tokenizer=tokenizer())
    assert report.load == f"llama-cli --model {tmp_path / 'model.gguf'}"
    assert report.files == ("model.gguf",)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=dtype)
    state = fresh.state_dict()
    for name, weight in model.state_dict().items():
        packed = name.endswith("proj.weight")
        expected = gws_compile.quantize(weight.detach(), "mxfp4") if packed else weight
        assert torch.equal(state[name], expected), name
    if dtype == torch.float32:
        assert torch.equal(fresh(TOKENS).logits, output.logits)


def test_gguf_has_the_vocabulary(tmp_path):
    gguf = pytest.importorskip("gguf")
    report, _ = exported(tmp_path, llama(), "gguf", fmt="mxfp4", tokenizer=tokenizer())
    fields = gguf.GGUFReader(report.path).fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 96
    assert tokens[92:95] == ["abc", "[PAD93]", "[PAD94]"]
    assert fields["tokenizer.ggml.merges"].contents() == ["a b", "ab c"]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert fields["llama.attention.head_count_kv"].contents() == 2
    assert fields["general.architecture"].contents() == "llama"


@pytest.mark.parametrize("fmt", ["fp8_channel", "fp8_tensor", "int8_channel"])
def test_torchao(fmt, tmp_path):
    """transformers loads torchao's tensors, whose values are the cast weights."""
    pytest.importorskip("torchao")
    from transformers import AutoModelForCausalLM

    model = llama().eval()
    report, logits = exported(tmp_path, model, "torchao", fmt=fmt)
    assert report.format == "torchao"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            found = loaded.get_parameter(name)
            assert type(found).__name__ == ("Int8Tensor" if fmt == "int8_channel" else "Float8Tensor")
            assert torch.equal(found.dequantize(), gws_compile.quantize(weight.detach(), fmt))
    torch.testing.assert_close(loaded(TOKENS).logits, logits, rtol=1e-4, atol=1e-5)
