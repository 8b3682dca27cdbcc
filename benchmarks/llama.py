"""The Llama that the benchmarks train: its sizes, and the model with random weights."""

from __future__ import annotations

from dataclasses import dataclass

import transformers


@dataclass(frozen=True)
class Size:
    """A Llama's shape, and the batch it is given."""

    layers: int
    width: int
    inner_width: int
    heads: int
    vocabulary: int
    batch: int
    seq: int


SIZES = {
    "tiny": Size(layers=1, width=64, inner_width=160, heads=2, vocabulary=96, batch=2, seq=32),
    "small": Size(layers=6, width=384, inner_width=1024, heads=6, vocabulary=256, batch=8, seq=256),
    "134m": Size(layers=12, width=768, inner_width=2048, heads=12, vocabulary=32000, batch=16, seq=1024),
    "1b": Size(layers=18, width=2048, inner_width=5504, heads=16, vocabulary=32000, batch=8, seq=2048),
}


def build_model(size: Size) -> transformers.PreTrainedModel:
    """A Llama with random weights."""
    config = transformers.LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.inner_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.seq,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)
