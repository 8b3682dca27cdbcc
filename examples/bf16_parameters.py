"""Train with bfloat16 parameters and no float32 copy of them: what it saves, and what rounding does to the loss.

One small Llama is trained on the source text of Python's standard library in four ways from the same parameters:

    float32     float32 parameters and optimizer state, products in bfloat16 (autocast)
    bf16        everything in bfloat16, AdamW as it is: updates below half a step are lost
    bf16, sr    the same with ``torch.compile(optimizer.step, backend=pqt)``: AdamW's update is computed in float32, and
                parameters and state are written by stochastic rounding
    torchao     torchao's AdamW with ``bf16_stochastic_round=True``, which does so for parameters; left out where
                torchao is not installed

    python examples/bf16_parameters.py                      # about 4 minutes on two CPU cores
    python examples/bf16_parameters.py --steps 600 --lr 3e-4

Bytes are counted from the tensors: parameters, gradients and optimizer state. Times are medians, of the optimizer's
step alone and of a whole step.

Needs ``pip install "gws-compile[examples]"``; ``pip install "gws-compile[bench]"`` for torchao.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compute_dtype import computing_in
from optimizing import learning_rate_schedule
from small_models import SIZES, build_model
from tabulate import tabulate
from text_data import Text, load_text
from ticking import seconds_between_lines
from tqdm import tqdm

import gws_compile

SIZE = SIZES["tiny"]
HELD_OUT_BATCHES = 16
ADAMW = {"betas": (0.9, 0.95), "weight_decay": 0.1}


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        name: what the table calls it.
        dtype: of the parameters.
        optimizer: makes it, from parameters and a learning rate: a tensor, which a schedule changes in place, so that
            nothing is compiled again.
        compiled: makes the function that steps.
    """

    name: str
    dtype: torch.dtype
    optimizer: Callable[[Iterable[torch.nn.Parameter], torch.Tensor], torch.optim.Optimizer]
    compiled: Callable[[torch.optim.Optimizer], Callable[[], Any]] = lambda optimizer: optimizer.step


@dataclass(frozen=True)
class Figures:
    """What a run gave: bytes, seconds, and the mean loss of the last steps and of held-out text."""

    bytes: int
    update_seconds: float
    step_seconds: float
    train: float
    held_out: float


def adamw(parameters: Iterable[torch.nn.Parameter], lr: torch.Tensor) -> torch.optim.Optimizer:
    """AdamW of torch."""
    return torch.optim.AdamW(parameters, lr=lr, **ADAMW)


def ways(inner: str, seed: int) -> Iterator[Way]:
    """The rows of the table."""
    yield Way("float32", torch.float32, adamw)
    yield Way("bf16", torch.bfloat16, adamw)
    pqt = gws_compile.backend("bf16", seed=seed, inner=inner)
    yield Way("bf16, sr", torch.bfloat16, adamw, lambda optimizer: torch.compile(optimizer.step, backend=pqt))
    if importlib.util.find_spec("torchao") is not None:
        from torchao.optim import _AdamW

        yield Way("torchao", torch.bfloat16, lambda p, lr: _AdamW(p, lr=lr, bf16_stochastic_round=True, **ADAMW))


def stored_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def train(way: Way, text: Text, parsed: argparse.Namespace) -> Figures:
    """One run."""
    torch.compiler.reset()
    torch.manual_seed(parsed.seed)
    model = build_model("llama", SIZE, SIZE.seq)
    with torch.no_grad():  # all begin at the same values
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model = model.to(way.dtype)
    compiled = model if parsed.inner == "eager" else torch.compile(model, backend=parsed.inner)
    optimizer = way.optimizer(list(model.parameters()), torch.tensor(parsed.lr))
    schedule = learning_rate_schedule(optimizer, parsed.steps)
    step_of = way.compiled(optimizer)
    held_out = text.held_out_batches(SIZE.batch, SIZE.seq, limit=HELD_OUT_BATCHES)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with computing_in(torch.bfloat16, tokens.device):
            loss: torch.Tensor = compiled(input_ids=tokens, labels=tokens).loss
        return loss

    losses, updates, steps = [], [], []
    bar = tqdm(range(parsed.steps), desc=way.name, mininterval=seconds_between_lines())
    held = 0
    for _, tokens in zip(bar, text.batches(SIZE.batch, SIZE.seq, seed=parsed.seed), strict=False):
        begun = time.perf_counter()
        loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = time.perf_counter()
        step_of()
        updates.append(time.perf_counter() - before)
        schedule.step()
        steps.append(time.perf_counter() - begun)
        state = (value for of_one in optimizer.state.values() for value in of_one.values())
        gradients = (parameter.grad for parameter in model.parameters())
        held = stored_bytes([*model.parameters(), *gradients, *(v for v in state if isinstance(v, torch.Tensor))])
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        evaluated = statistics.fmean(loss_of(tokens).item() for tokens in held_out)
    tail = losses[-max(1, len(losses) // 10) :]
    return Figures(held, statistics.median(updates), statistics.median(steps), statistics.fmean(tail), evaluated)


def table(found: dict[str, Figures]) -> str:
    """The rows."""
    whole = found["float32"].bytes
    return tabulate(
        [
            (
                name,
                f"{one.bytes / 2**20:.1f} MiB",
                f"{100 * one.bytes / whole:.0f} %",
                f"{1000 * one.update_seconds:.1f} ms",
                f"{1000 * one.step_seconds:.0f} ms",
                f"{one.train:.4f}",
                f"{one.held_out:.4f}",
            )
            for name, one in found.items()
        ],
        headers=("", "bytes", "of float32", "update", "step", "last losses", "held-out loss"),
        colalign=("left", *["right"] * 6),
        disable_numparse=True,
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, order of the text, and rounding")
    parser.add_argument("--inner", default="inductor", help="compiler: inductor, aot_eager or eager")
    parser.add_argument("--data", type=Path, metavar="PATH", help="text (default: Python's standard library)")
    parser.add_argument("--out", type=Path, default=Path("out/bf16"), metavar="DIR", help="where the figures go")
    parsed = parser.parse_args(argv)
    if parsed.steps < 2:
        parser.error(f"--steps must be 2 or more, got {parsed.steps}")
    return parsed


def main(argv: Sequence[str] | None = None) -> None:
    parsed = parse(argv)
    text = load_text(parsed.data, batch=SIZE.batch, seq=SIZE.seq)
    found = {way.name: train(way, text, parsed) for way in ways(parsed.inner, parsed.seed)}
    print(table(found))
    parsed.out.mkdir(parents=True, exist_ok=True)
    figures = {name: vars(one) for name, one in found.items()}
    (parsed.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
