"""Training functions for ``gws compare``: small GPT-2 and Llama models over bytes.

    gws compare --fmts fp8_e4m3,fp4_e2m1,int3 examples/compare_models.py:llama steps=300
    gws compare --fmts int4,int3,int2 --out out/compare-gpt2 examples/compare_models.py:gpt2 width=128

The text is that of `text_data`, the source of Python's standard library unless ``data=PATH`` names another.

Needs ``pip install "gws-compile[examples]"``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compute_dtype import NAMES, computing_in
from optimizing import adamw, learning_rate_schedule
from small_models import Size, build_model
from text_data import load_text
from training_figures import TrainingFigures

import gws_compile

HELD_OUT_BATCHES = 24
BITS_LR = 0.02

Trained = tuple[torch.nn.Module, Callable[[], float], dict[str, float]]


def llama(backend: gws_compile.Backend, seed: int, **training: Any) -> Trained:
    """A Llama; see `train` for the arguments."""
    return train("llama", backend, seed, **training)


def gpt2(backend: gws_compile.Backend, seed: int, **training: Any) -> Trained:
    """A GPT-2; see `train` for the arguments."""
    return train("gpt2", backend, seed, **training)


def train(
    kind: str,
    backend: gws_compile.Backend,
    seed: int,
    *,
    steps: int = 2000,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    batch: int = 8,
    seq: int = 64,
    lr: float = 4e-3,
    warm_up: float = 0.1,
    dtype: str = "float32",
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    data: str | None = None,
) -> Trained:
    """Train one model.

    Args:
        kind: ``"llama"`` or ``"gpt2"``.
        backend: for ``torch.compile``.
        seed: of weights and batches.
        steps: optimizer steps.
        width, layers, heads: of the model.
        batch, seq: sequences per step, bytes per sequence.
        lr: peak learning rate, of AdamW.
        warm_up: share of the steps over which the rate rises.
        dtype: computed in, ``"float32"`` or ``"bfloat16"`` (autocast).
        device: to train on.
        data: text file or folder.
    """
    torch.manual_seed(seed)
    place = torch.device(device)
    text = load_text(None if data is None else Path(data), batch=batch, seq=seq)
    model = build_model(kind, Size(layers, width, heads, seq, batch, steps, lr), seq).to(place)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    held_out = [tokens.to(place) for tokens in text.held_out_batches(batch, seq, limit=HELD_OUT_BATCHES)]

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with computing_in(NAMES[dtype], place):
            loss: torch.Tensor = compiled(input_ids=tokens, labels=tokens).loss
        return loss

    optimizer = adamw(model, lr)
    if backend.config.learned is not None:
        backend.prepare(model, input_ids=held_out[0], labels=held_out[0])
        optimizer.add_param_group({"params": list(backend.parameters()), "lr": BITS_LR, "weight_decay": 0.0})
    schedule = learning_rate_schedule(optimizer, steps, warm_up)
    figures = TrainingFigures(model, backend, steps)
    for step in range(steps):
        loss = loss_of(text.batch_of_step(step, batch, seq, seed=seed).to(place))
        if backend.config.learned is not None:
            loss = loss + backend.bit_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        figures.before_step(step)
        optimizer.step()
        figures.after_step(step)
        schedule.step()
        optimizer.zero_grad()

    def evaluate() -> float:
        return math.fsum(loss_of(tokens).item() for tokens in held_out) / len(held_out)

    tokens_seen = {"tokens": float(steps * batch * seq)}
    return compiled, evaluate, tokens_seen | figures.numbers() | figures.gradient_noise(loss_of, text, batch, seq, seed)
