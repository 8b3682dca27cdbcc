"""Small GPT-2 and Llama models over bytes, built from a configuration: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import transformers
from text_data import VOCABULARY


@dataclass(frozen=True)
class Size:
    """A model's shape, and the training that suits it."""

    layers: int
    width: int
    heads: int
    seq: int
    batch: int
    steps: int
    lr: float


SIZES = {
    "tiny": Size(layers=2, width=192, heads=4, seq=128, batch=16, steps=300, lr=2e-3),
    "small": Size(layers=8, width=512, heads=8, seq=512, batch=32, steps=1000, lr=1e-3),
    "gpt2": Size(layers=12, width=768, heads=12, seq=1024, batch=16, steps=2000, lr=6e-4),
}
MODELS = {"gpt2": "GPT-2", "llama": "Llama"}


def build_model(kind: str, size: Size, seq: int) -> transformers.PreTrainedModel:
    """A model of `MODELS` with random weights and no dropout, for sequences of up to ``seq`` bytes."""
    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=size.width,
            n_layer=size.layers,
            n_head=size.heads,
            n_positions=seq,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=size.width,
            intermediate_size=size.width * 8 // 3 // 32 * 32,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads // 2,
            max_position_embeddings=seq,
            **common,
        )
        model = transformers.LlamaForCausalLM(config)
    # GPT-2's class name does not tell transformers its loss; the warning that it logs then would break the graph.
    model.loss_type = "ForCausalLM"
    return model
