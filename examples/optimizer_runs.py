"""One small Llama, trained with one optimizer or another: losses, and the bytes that the optimizer keeps.

What ``train_bitsandbytes.py``, ``train_galore.py`` and ``compare_optimizers.py`` have in common. A run is described by
what makes the optimizers of some parameters; several of them step one after another, and those of schedule-free
training are switched between its two forms of the weights.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compute_dtype import add_dtype_option, computing_in
from optimizing import learning_rate_schedule
from small_models import SIZES, build_model
from tabulate import tabulate
from text_data import Text
from ticking import seconds_between_lines
from torch import nn
from tqdm import tqdm

import gws_compile

SIZE = SIZES["tiny"]
HELD_OUT_BATCHES = 16

Named = Sequence[tuple[str, nn.Parameter]]
Make = Callable[[Named], Iterable[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Settings:
    """What is trained, beside the optimizer.

    Attributes:
        fmt: the format of pseudo-quantization training; None for plain training.
        inner: what compiles the graphs.
        dtype: what products are computed in.
        clip: the norm that all gradients together have at most; None where they are taken one by one.
    """

    fmt: str | None
    steps: int
    batch: int
    seq: int
    seed: int
    inner: str
    dtype: torch.dtype
    clip: float | None = 1.0


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        train_loss: mean over the last tenth of the steps, in nats per byte.
        held_out: as deployed: of the cast weights, without noise.
        state_bytes: of all that the optimizers keep from step to step.
        gradient_bytes: of the gradients that there are behind backward.
        draws: of the noise; 0 of plain training.
    """

    train_loss: float
    held_out: float
    state_bytes: int
    gradient_bytes: int
    draws: int


def train(
    make: Make,
    settings: Settings,
    text: Text,
    *,
    per_parameter: bool = False,
    block_by_block: bool = False,
    title: str = "",
) -> Outcome:
    """Train a model.

    Args:
        make: the optimizers of some parameters, given with their names.
        settings: of the run.
        text: is learned.
        per_parameter: each parameter has optimizers of its own, which step inside backward as soon as its gradient is
            there; then the gradient goes.
        block_by_block: compile each transformer block by itself. The backward of one graph hands over the gradients of
            all its parameters at once: of a whole model they would all be there before the first optimizer steps.
        title: in front of the progress.
    """
    torch.manual_seed(settings.seed)
    model = build_model("llama", SIZE, settings.seq)
    backend = (
        None if settings.fmt is None else gws_compile.backend(settings.fmt, seed=settings.seed, inner=settings.inner)
    )
    compiled = model
    if block_by_block:
        for block in model.model.layers:
            block.compile(backend=backend or settings.inner, fullgraph=True)
    else:
        compiled = torch.compile(model, backend=backend or settings.inner, fullgraph=True)
    optimizers = step_in_backward(model, make) if per_parameter else list(make(list(model.named_parameters())))
    schedules = [learning_rate_schedule(one, settings.steps) for one in optimizers if not is_schedule_free(one)]

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with computing_in(settings.dtype, torch.device("cpu")):
            loss: torch.Tensor = compiled(input_ids=tokens, labels=tokens).loss
        return loss

    losses, gradients = [], 0
    switch(optimizers, training=True)
    for step in tqdm(range(settings.steps), desc=title, unit="step", mininterval=seconds_between_lines()):
        loss = loss_of(text.batch_of_step(step, settings.batch, settings.seq, seed=settings.seed))
        loss.backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        if settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        if not per_parameter:
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
        for schedule in schedules:
            schedule.step()
        losses.append(loss.item())
    switch(optimizers, training=False)
    with torch.no_grad():
        batches = text.held_out_batches(settings.batch, settings.seq, limit=HELD_OUT_BATCHES)
        held_out = statistics.fmean(loss_of(tokens).item() for tokens in batches)
    last = losses[-max(1, len(losses) // 10) :]
    return Outcome(
        statistics.fmean(last), held_out, state_bytes(optimizers), gradients, 0 if backend is None else backend.draw
    )


def step_in_backward(model: nn.Module, make: Make) -> list[torch.optim.Optimizer]:
    """Make optimizers for each parameter, which step when backward has its gradient, and drop the gradient."""
    own = {p: list(make([(name, p)])) for name, p in model.named_parameters()}

    def step(parameter: torch.Tensor) -> None:
        for optimizer in own[parameter]:
            optimizer.step()
        parameter.grad = None

    for parameter in own:
        parameter.register_post_accumulate_grad_hook(step)
    return [optimizer for several in own.values() for optimizer in several]


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the weights have two forms, one to train and one to evaluate; there is no schedule of learning rates."""
    return hasattr(optimizer, "eval")


def switch(optimizers: Sequence[Any], *, training: bool) -> None:
    """Put the weights of schedule-free optimizers into the one form or the other."""
    for optimizer in filter(is_schedule_free, optimizers):
        optimizer.train() if training else optimizer.eval()


def state_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of all tensors in the optimizers' state; what several parameters share, a code book, counts once."""
    storages = {}
    for optimizer in optimizers:
        for tensor in tensors_in(list(optimizer.state.values())):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors in containers, in objects (GaLore's projectors) and in tensor subclasses (torchao's states)."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            yield from tensors_in([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        else:
            yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


def is_layer_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix of a transformer block: no table, head or norm."""
    return parameter.ndim == 2 and ".layers." in name


def adamw(lr: float) -> Make:
    """The AdamW of torch, which the others are held against."""
    return lambda named: [torch.optim.AdamW([p for _, p in named], lr=lr)]


def table(outcomes: dict[str, Outcome]) -> str:
    """Losses, and bytes; the first row is what the others' bytes are compared with."""
    first = next(iter(outcomes.values())).state_bytes
    return tabulate(
        [
            (
                name,
                f"{one.train_loss:.4f}",
                f"{one.held_out:.4f}",
                f"{one.state_bytes:,}",
                f"{one.state_bytes / first:.3f}",
                f"{one.gradient_bytes:,}",
            )
            for name, one in outcomes.items()
        ],
        headers=("optimizer", "train loss", "held-out loss", "state, bytes", "of AdamW's", "gradients behind backward"),
        colalign=("left", *["right"] * 5),
        disable_numparse=True,
    )


def add_options(parser: argparse.ArgumentParser, *, fmt: str = "fp8_e4m3", steps: int = SIZE.steps) -> None:
    """Those of `Settings`."""
    add = parser.add_argument
    add("--fmt", default=fmt, help="format or preset (default: %(default)s)")
    add("--steps", type=int, default=steps, help="optimizer steps (default: %(default)s)")
    add("--batch", type=int, default=SIZE.batch, help="sequences per step (default: %(default)s)")
    add("--seq", type=int, default=SIZE.seq, help="bytes per sequence (default: %(default)s)")
    add("--lr", type=float, default=SIZE.lr, help="peak learning rate of AdamW (default: %(default)s)")
    add("--inner", default="inductor", help="compiler: inductor, aot_eager or eager (default: %(default)s)")
    add_dtype_option(parser)
