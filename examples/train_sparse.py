"""Train a small Llama whose matrices are half zeros: 2:4 in FP8, beside dense PQT, and beside neurons pruned away.

Sparsity is one more argument:

    torch.compile(model, backend=gws_compile.backend(fmt="fp8_e4m3"))
    torch.compile(model, backend=gws_compile.backend(fmt="fp8_e4m3", sparsity="2:4"))

The mask is computed from the weights in every forward, and gradients go straight through it. All models start alike
and see the same text, the source of Python's standard library, byte by byte. The held-out losses are printed, those of
the cast and masked weights, as they are deployed; so is what becomes of the dense run's weights when they are masked
afterwards. The run ``neurons`` prunes the columns of ``down_proj`` step by step, and is then cut to a smaller Llama,
which computes the same.

    python examples/train_sparse.py                        # about 4 minutes on two CPU cores
    python examples/train_sparse.py --sparsity 1:4 --seed 1

Needs ``pip install "gws-compile[examples]"``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from optimizing import adamw, learning_rate_schedule
from small_models import SIZES, build_model
from tabulate import tabulate
from text_data import Text, load_text
from ticking import seconds_between_lines
from tqdm import tqdm

import gws_compile

SIZE = replace(SIZES["tiny"], layers=4, width=128, batch=8)
HELD_OUT_BATCHES = 8
SHARE = 0.5
"""Of the neurons of each MLP, in the run ``neurons``."""


@dataclass
class Run:
    """One model in training.

    Attributes:
        name: what the table calls it.
        model: the model; all runs begin with the same weights.
        backend: a backend of gws_compile; None for the plain model.
        held_out: loss after training, of the weights as they are deployed.
        step_seconds: median.
    """

    name: str
    model: transformers.PreTrainedModel
    backend: gws_compile.Backend | None
    compiled: Any
    held_out: float = 0.0
    step_seconds: float = 0.0

    @torch.no_grad()
    def loss_on(self, batches: Sequence[torch.Tensor]) -> float:
        """Mean loss over the batches; without gradients the backend casts and masks the weights, and adds no noise."""
        return statistics.fmean(self.compiled(input_ids=tokens, labels=tokens).loss.item() for tokens in batches)


def backends(parsed: argparse.Namespace) -> Iterator[tuple[str, gws_compile.Backend | None]]:
    """What each run is compiled with, by its name."""
    common = {"fmt": parsed.fmt, "seed": parsed.seed, "inner": parsed.inner}
    yield "plain", None
    yield "dense", gws_compile.backend(**common)
    yield parsed.sparsity, gws_compile.backend(**common, sparsity=parsed.sparsity)
    gradual = gws_compile.PrunedGroups(SHARE, "columns", start=parsed.steps // 10, stop=max(parsed.steps // 2, 1))
    yield "neurons", gws_compile.backend(**common, rules=[("*.down_proj.*", {"sparsity": gradual})])


def train(name: str, backend: gws_compile.Backend | None, text: Text, parsed: argparse.Namespace) -> Run:
    """One run."""
    torch._dynamo.reset()  # the runs compile the same code
    torch.manual_seed(parsed.seed)
    model = build_model("llama", SIZE, SIZE.seq)
    run = Run(name, model, backend, torch.compile(model, backend=backend or parsed.inner))
    optimizer = adamw(model, SIZE.lr)
    schedule = learning_rate_schedule(optimizer, parsed.steps)
    seconds = []
    bar = tqdm(range(parsed.steps), desc=name, mininterval=seconds_between_lines())
    for _, tokens in zip(bar, text.batches(SIZE.batch, SIZE.seq, seed=parsed.seed), strict=False):
        begun = time.perf_counter()
        run.compiled(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
    run.step_seconds = statistics.median(seconds)
    run.held_out = run.loss_on(held_out_batches(text))
    return run


def held_out_batches(text: Text) -> list[torch.Tensor]:
    """The batches that losses are compared on."""
    return list(text.held_out_batches(SIZE.batch, SIZE.seq, limit=HELD_OUT_BATCHES))


@contextmanager
def weights_of(run: Run, other: Run) -> Iterator[None]:
    """Inside a ``with`` block, a run's model has the weights of another's."""
    own = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.model.load_state_dict(other.model.state_dict())
    try:
        yield
    finally:
        run.model.load_state_dict(own)


def sliced(run: Run) -> transformers.PreTrainedModel:
    """The model of a run without the neurons that it has pruned: each MLP is that much smaller."""
    with tempfile.TemporaryDirectory() as folder:
        run.backend.export(run.compiled, Path(folder) / "deployed", "dense")
        model = transformers.LlamaForCausalLM.from_pretrained(Path(folder) / "deployed")
    for layer in model.model.layers:
        kept = gws_compile.slice_pruned(layer.mlp.down_proj, [layer.mlp.gate_proj, layer.mlp.up_proj])
    model.config.intermediate_size = len(kept)
    return model.eval()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sparsity", default="2:4", metavar="N:M", help="(default: %(default)s)")
    add("--fmt", default="fp8_e4m3", help="format or preset of all runs (default: %(default)s)")
    add("--steps", type=int, default=200, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, batches and noise (default: %(default)s)")
    add("--inner", choices=("inductor", "aot_eager"), default="inductor", help="(default: %(default)s)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where the figures go (default: out)")
    parsed = parser.parse_args(argv)
    if parsed.steps < 1:
        parser.error(f"--steps must be 1 or more, got {parsed.steps}")
    try:
        gws_compile.backend(parsed.fmt, sparsity=parsed.sparsity)
    except ValueError as error:
        parser.error(str(error))
    return parsed


def main(argv: Sequence[str] | None = None) -> None:
    parsed = parse(argv)
    text = load_text(None, batch=SIZE.batch, seq=SIZE.seq)
    runs = {name: train(name, backend, text, parsed) for name, backend in backends(parsed)}
    batches = held_out_batches(text)
    sparse, dense = runs[parsed.sparsity], runs["dense"]
    with weights_of(sparse, dense):
        afterwards = sparse.loss_on(batches)
    smaller = sliced(runs["neurons"])
    with torch.no_grad():
        cut = statistics.fmean(smaller(input_ids=tokens, labels=tokens).loss.item() for tokens in batches)

    rows = []
    for name, run in runs.items():
        zeros = "" if run.backend is None else f"{100 * run.backend.metrics().scalars()['gws/zeros']:.1f} %"
        difference = f"{100 * (run.held_out / dense.held_out - 1):+.2f} %"
        rows.append((name, f"{run.held_out:.4f}", difference, zeros, f"{1000 * run.step_seconds:.0f}"))
    headers = ("run", "held-out loss", "from dense", "zeros", "ms a step")
    print(tabulate(rows, headers=headers, colalign=("left", *["right"] * 4), disable_numparse=True))
    parameters = [sum(p.numel() for p in model.parameters()) for model in (dense.model, smaller)]
    print(f"dense, masked to {parsed.sparsity} afterwards: {afterwards:.4f}")
    print(f"neurons, cut out: {cut:.4f}, with {parameters[1]:,} of {parameters[0]:,} parameters")
    figures = {name: run.held_out for name, run in runs.items()} | {"afterwards": afterwards, "cut": cut}
    parsed.out.mkdir(parents=True, exist_ok=True)
    (parsed.out / "sparse.json").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
