"""Hugging Face's Trainer with pseudo-quantization training: the model is compiled in place by the backend's name.

``TrainingArguments(torch_compile_backend="gws")`` does not do: accelerate, which compiles for the Trainer, takes names
of a list of its own. Settings come from the environment: ``GWS_FMT=fp6_e3m2 python examples/huggingface_trainer.py``.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers

import gws_compile

VOCABULARY, SEQ = 64, 32


def build_model() -> transformers.PreTrainedModel:
    """A small Llama with random weights."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=SEQ,
            use_cache=False,
        )
    )


def counting(examples: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that count on from a random number by a random step: int64 (SEQ,)."""
    numbers = torch.randint(VOCABULARY, (examples, 1)) + torch.randint(1, 4, (examples, 1)) * torch.arange(SEQ)
    return [{"input_ids": row, "labels": row} for row in numbers % VOCABULARY]


def train(model: transformers.PreTrainedModel, **arguments: Any) -> transformers.Trainer:
    """Train a model that the user has compiled, or not, as a script that knows nothing of this package would."""
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            report_to=[],
            save_strategy="no",
            dataloader_pin_memory=False,
            disable_tqdm=True,
            **arguments,
        )
        trainer = transformers.Trainer(model, settings, train_dataset=counting(512))
        trainer.train()
    return trainer


def main() -> None:
    transformers.set_seed(0)
    model = build_model()
    model.compile(backend="gws")
    train(model, max_steps=40, gradient_accumulation_steps=2, logging_steps=10)
    print(gws_compile.named_backend().report())


if __name__ == "__main__":
    main()
