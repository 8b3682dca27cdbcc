"""Real model code in small sizes, and a training call."""

import torch
from torch import nn


def gpt2(dropout: float = 0.0, layers: int = 2) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers, n_embd=64, n_head=2, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=160,
        vocab_size=96, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def loss_and_gradients(
    call, model: nn.Module, tokens: torch.Tensor, autocast: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Next-token loss of ``call(tokens)`` and the gradients it leaves on the model's parameters, after zeroing them."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = call(tokens).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
