"""Real Hugging Face architectures: every weight that is read is rewritten, or left alone for a reason."""

import warnings

import pytest
import torch

import gws_compile

transformers = pytest.importorskip("transformers")

SMALL = {
    "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 96, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False,
}  # fmt: skip
ROUTER, HEAD = "matches the exclude pattern '*.gate.weight'", "matches the exclude pattern 'lm_head.*'"
EXPERTS = "transformers::grouped_mm_fallback"
TIED = "also an embedding table (tied); name it in include to rewrite its matrix products"
LOOKUP = "embedding look-up"


def build(name: str, **settings: object) -> torch.nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **settings})
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize(
    ("name", "settings", "rewritten", "skipped"),
    [
        (
            "Qwen3Moe",
            {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
             "head_dim": 8},
            {"self_attn.q_proj.weight": "linear", "self_attn.k_proj.weight": "linear",
             "self_attn.v_proj.weight": "linear", "self_attn.o_proj.weight": "linear",
             "mlp.experts.gate_up_proj": EXPERTS, "mlp.experts.down_proj": EXPERTS},
            {"model.embed_tokens.weight": LOOKUP, "model.layers.0.mlp.gate.weight": ROUTER, "lm_head.weight": HEAD},
        ),
        (
            "Mixtral",
            {"num_key_value_heads": 2, "num_local_experts": 4},
            {"self_attn.q_proj.weight": "linear", "self_attn.k_proj.weight": "linear",
             "self_attn.v_proj.weight": "linear", "self_attn.o_proj.weight": "linear",
             "mlp.experts.gate_up_proj": EXPERTS, "mlp.experts.down_proj": EXPERTS},
            {"model.embed_tokens.weight": LOOKUP, "model.layers.0.mlp.gate.weight": ROUTER, "lm_head.weight": HEAD},
        ),
        (
            "GPTNeoX",
            {},
            {"attention.query_key_value.weight": "linear", "attention.dense.weight": "linear",
             "mlp.dense_h_to_4h.weight": "linear", "mlp.dense_4h_to_h.weight": "linear"},
            {"gpt_neox.embed_in.weight": LOOKUP, "lm_head.weight": HEAD},
        ),
        (
            "Mamba",
            {"state_size": 4},
            {"mixer.in_proj.weight": "linear", "mixer.conv1d.weight": "conv1d", "mixer.x_proj.weight": "linear",
             "mixer.dt_proj.weight": "matmul", "mixer.out_proj.weight": "linear"},
            {"backbone.embeddings.weight": TIED,
             "backbone.layers.0.mixer.A_log": "no matrix product or convolution reads it, only: exp"},
        ),
    ],
)  # fmt: skip
def test_language_models(name, settings, rewritten, skipped):
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        report = gws_compile.explain(build(name, **settings), torch.arange(8)[None])
    assert {r.name.split("layers.0.")[1]: r.op for r in report.rewritten} == rewritten
    assert {r.name: r.reason for r in report.skipped} == skipped


def test_gradient_checkpointing_of_hugging_face():
    torch._dynamo.reset()
    model = build("Llama", num_key_value_heads=2)
    names = {r.name for r in gws_compile.explain(model, torch.arange(8)[None]).rewritten}
    model.gradient_checkpointing_enable()
    model.train()
    torch._dynamo.reset()
    assert {r.name for r in gws_compile.explain(model, torch.arange(8)[None]).rewritten} == names
    assert len(names) == 7


def test_vision_transformer():
    torch._dynamo.reset()
    config = transformers.ViTConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    report = gws_compile.explain(transformers.ViTForImageClassification(config), torch.randn(1, 3, 32, 32))
    assert [r.op for r in report.rewritten] == ["conv2d"] + ["linear"] * 6
    assert {r.name.split(".")[-1]: r.reason for r in report.skipped if r.op == ""} == {
        "cls_token": "no matrix product or convolution reads it, only: add",
        "position_embeddings": "no matrix product or convolution reads it, only: add",
    }
