"""Fixed and learned bit widths against each other: small language models over bytes, several seeds.

Each run trains one model with one setting of ``gws_compile.backend`` and reads the held-out loss in two forms: as it is
trained (with noise) and as it is deployed (each weight or block cast to its format, no noise). The figures go to a JSON
file after every run, and a run that is in it already is not repeated, so a stopped experiment goes on.

    python examples/bit_experiment.py run --model gpt2 --out out/bits-gpt2.json
    python examples/bit_experiment.py run --model llama --out out/bits-llama.json
    python examples/bit_experiment.py report out/bits-gpt2.json out/bits-llama.json --docs docs

With ``--rows direct`` training without master weights (``master=False``) against the straight-through cast and against
noise, at 8, 4 and 3 bits and with three levels:

    python examples/bit_experiment.py run --rows direct --model llama --out out/direct-llama.json
    python examples/bit_experiment.py report out/direct-llama.json

The two runs take about 40 minutes side by side on two CPU cores, most of it compiling. ``--size small`` is for a GPU.

Needs ``pip install "gws-compile[examples]"``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from compute_dtype import add_dtype_option, chosen_dtype, computing_in, describe
from optimizing import adamw, learning_rate_schedule
from small_models import MODELS, SIZES, build_model
from tabulate import tabulate
from text_data import Text, load_text
from tqdm import tqdm

import gws_compile
from gws_compile import LearnedBits

mpl.use("Agg")
import matplotlib.pyplot as plt

HELD_OUT_BATCHES = 16
BITS_LR = 0.02
BITS_COEFFICIENT = 0.1
# Student's t for a two-sided 95 % interval, by the number of seeds.
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    Attributes:
        name: what the table calls it.
        arguments: of `gws_compile.backend`; None for plain training.
        coefficient: what `Backend.bit_loss` is multiplied with.
    """

    name: str
    arguments: dict[str, Any] | None
    coefficient: float = 0.0


def direct_settings() -> Iterator[Setting]:
    """The rows with and without master weights."""
    yield Setting("plain", None)
    for fmt in ("int8", "int4", "int3", "int2"):
        yield Setting(f"{fmt}, straight-through", {"fmt": fmt, "noise": "none"})
        yield Setting(f"{fmt}, rounded normal noise", {"fmt": fmt})
        yield Setting(f"{fmt}, no master weights", {"fmt": fmt, "master": False})


def settings() -> Iterator[Setting]:
    """The rows with fixed and learned widths."""
    yield Setting("plain", None)
    fixed = ("fp8_e4m3", "fp6_e3m2", "fp4_e2m1")
    for noise, label in (("rounded_normal", ""), ("uniform", ", uniform noise")):
        if noise == "uniform":
            for fmt in fixed:
                yield Setting(f"fixed {fmt}, no noise (straight-through)", {"fmt": fmt, "noise": "none"})
        for fmt in fixed:
            yield Setting(f"fixed {fmt}{label}", {"fmt": fmt, "noise": noise})
        for granularity in ("block", "weight"):
            bits = LearnedBits(average=5.0, granularity=granularity)  # type: ignore[arg-type]
            yield Setting(
                f"learned per {granularity}, average 5{label}", {"bits": bits, "noise": noise}, coefficient=1.0
            )
        target = LearnedBits(target=4.0)
        yield Setting(
            f"learned per block, target 4{label}", {"bits": target, "noise": noise}, coefficient=BITS_COEFFICIENT
        )


def train(
    setting: Setting, kind: str, text: Text, seed: int, dtype: torch.dtype, args: argparse.Namespace
) -> dict[str, Any]:
    """Train one model, computed in ``dtype``, and measure it."""
    torch.manual_seed(seed)
    device = torch.device(args.device)
    model = build_model(kind, SIZES[args.size], args.seq).to(device)
    backend = (
        None if setting.arguments is None else gws_compile.backend(seed=seed, inner=args.inner, **setting.arguments)
    )
    compiled = torch.compile(model, backend=backend or args.inner, fullgraph=True)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with computing_in(dtype, device):
            loss: torch.Tensor = compiled(input_ids=tokens, labels=tokens).loss
        return loss

    held_out = [tokens.to(device) for tokens in text.held_out_batches(args.batch, args.seq, limit=HELD_OUT_BATCHES)]
    optimizer = adamw(model, args.lr)
    if backend is not None:
        backend.prepare(model, input_ids=held_out[0], labels=held_out[0])
        if widths := list(backend.parameters()):
            optimizer.add_param_group({"params": widths, "lr": BITS_LR, "weight_decay": 0.0})
    schedule = learning_rate_schedule(optimizer, args.steps)
    start = time.perf_counter()
    for step in range(args.steps):
        loss = loss_of(text.batch_of_step(step, args.batch, args.seq, seed=seed).to(device))
        if backend is not None and setting.coefficient:
            loss = loss + setting.coefficient * backend.bit_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        deployed = statistics.fmean(loss_of(tokens).item() for tokens in held_out)
    # With gradients enabled the graph of training runs: one sample of the noise.
    trained = statistics.fmean(loss_of(tokens).item() for tokens in held_out)
    return {
        "model": kind,
        "setting": setting.name,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "trained": trained,
        "deployed": deployed,
        "seconds": seconds,
        **sizes(model, backend),
    }


def sizes(model: torch.nn.Module, backend: gws_compile.Backend | None) -> dict[str, Any]:
    """Average width and bytes of the weights that are cast, scales included (a byte for each scaled block)."""
    if backend is None:
        probe = gws_compile.backend("bf16")
        tokens = torch.zeros(1, 8, dtype=torch.long, device=next(model.parameters()).device)
        records = gws_compile.explain(model, input_ids=tokens, labels=tokens, backend=probe).rewritten
        return {"average": None, "bytes": 2 * sum(math.prod(r.shape) for r in records), "share": {"bf16": 1.0}}
    summary = backend.report().bits
    if summary is not None:
        return {"average": summary.average, "bytes": summary.stored_bytes, "share": summary.share}
    of_weight = backend.config.weights
    total = sum(of_weight.stored_bytes(1, r.shape[0], math.prod(r.shape[1:])) for r in backend.report().rewritten)
    return {"average": backend.config.bits, "bytes": total, "share": {of_weight.fmt.name: 1.0}}


ROWS = {"widths": settings, "direct": direct_settings}


def run(args: argparse.Namespace) -> None:
    """Train everything that is not in the file yet."""
    text = load_text(args.data, batch=args.batch, seq=args.seq)
    done = json.loads(args.out.read_text()) if args.out.exists() else {"runs": []}
    known = {(r["model"], r["setting"], r["seed"]) for r in done["runs"]}
    todo = [
        (setting, seed)
        for setting in ROWS[args.rows]()
        for seed in range(args.seeds)
        if (args.model, setting.name, seed) not in known and (not args.only or args.only in setting.name)
    ]
    done["settings"] = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "act"
    }
    done["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    done["text"] = text.name
    args.out.parent.mkdir(parents=True, exist_ok=True)
    dtype = chosen_dtype(args.dtype, torch.device(args.device))
    others = {r["dtype"] for r in done["runs"]} - {str(dtype).removeprefix("torch.")}
    if others:
        raise SystemExit(
            f"{args.out} has runs computed in {', '.join(others)}: give the same --dtype, or another --out"
        )
    print(f"computed in {describe(dtype, asked=args.dtype != 'auto')}")
    progress = tqdm(todo, unit="run", mininterval=1)
    for setting, seed in progress:
        progress.set_description(f"{args.model}: {setting.name}, seed {seed}")
        torch._dynamo.reset()  # the models of former runs would count as recompilations of this one's code
        done["runs"].append(train(setting, args.model, text, seed, dtype, args))
        args.out.write_text(json.dumps(done, indent=1) + "\n")


# --- Report ----------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def rows(runs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each setting, over the seeds; differences to plain training are taken seed by seed."""
    plain = {r["seed"]: r["deployed"] for r in runs if r["setting"] == "plain"}
    for name in dict.fromkeys(r["setting"] for r in runs):
        mine = [r for r in runs if r["setting"] == name]
        yield {
            "name": name,
            "trained": interval([r["trained"] for r in mine]),
            "deployed": interval([r["deployed"] for r in mine]),
            "difference": interval([r["deployed"] - plain[r["seed"]] for r in mine]),
            "average": None if mine[0]["average"] is None else statistics.fmean(r["average"] for r in mine),
            "bytes": statistics.fmean(r["bytes"] for r in mine),
            "share": mine[0]["share"],
            "seeds": len(mine),
        }


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""

    def pair(value: tuple[float, float]) -> str:
        return f"{value[0]:.4f} ± {value[1]:.4f}"

    return tabulate(
        [
            (
                row["name"],
                pair(row["trained"]),
                pair(row["deployed"]),
                "" if row["name"] == "plain" else f"{row['difference'][0]:+.4f} ± {row['difference'][1]:.4f}",
                "" if row["average"] is None else f"{row['average']:.2f}",
                f"{row['bytes'] / 1024:,.0f}",
            )
            for row in found
        ],
        headers=("setting", "held-out loss, trained form", "deployed form", "deployed - plain", "average b", "KiB"),
        tablefmt="github",
        disable_numparse=True,
    )


def plot(path: Path, kind: str, found: Sequence[dict[str, Any]]) -> None:
    """Deployed loss against average width."""
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    groups = {
        "rounded normal noise": ("o", "tab:blue", -0.08, lambda n: "uniform" not in n and "no noise" not in n),
        "uniform noise": ("s", "tab:orange", 0.0, lambda n: "uniform" in n),
        "no noise": ("^", "tab:green", 0.08, lambda n: "no noise" in n),
    }
    for label, (marker, color, aside, belongs) in groups.items():
        members = [r for r in found if r["average"] is not None and belongs(r["name"])]
        for learned in (False, True):
            part = [r for r in members if r["name"].startswith("learned") == learned]
            if part:
                axes.errorbar(
                    [r["average"] + aside + 0.03 * (learned + i % 2 * learned) for i, r in enumerate(part)],
                    [r["deployed"][0] for r in part],
                    [r["deployed"][1] for r in part],
                    fmt=marker,
                    color=color,
                    markerfacecolor=color if learned else "white",
                    capsize=3,
                    label=f"{label}, {'learned' if learned else 'fixed'}",
                )
    plain = next(r for r in found if r["name"] == "plain")
    axes.axhline(plain["deployed"][0], color="gray", linestyle="--", label="plain")
    axes.set(
        xlabel="average bit width b (points spread sideways)",
        ylabel="deployed held-out loss (nats per byte)",
        title=MODELS[kind],
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(args: argparse.Namespace) -> None:
    """Print the tables, and with ``--docs`` draw the plots."""
    for path in args.files:
        data = json.loads(path.read_text())
        for kind in dict.fromkeys(r["model"] for r in data["runs"]):
            found = list(rows([r for r in data["runs"] if r["model"] == kind]))
            print(f"### {MODELS[kind]}\n\n{table(found)}\n")
            if args.docs is not None and any(row["name"].startswith("fixed") for row in found):
                plot(args.docs / f"experiments-{kind}.png", kind, found)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare fixed and learned bit widths over several seeds.")
    commands = parser.add_subparsers(required=True)
    add = (runs := commands.add_parser("run", help="train, and write the figures to a file")).add_argument
    add("--model", choices=MODELS, default="gpt2", help="architecture (default: %(default)s)")
    add("--rows", choices=ROWS, default="widths", help="which settings (default: %(default)s)")
    add("--size", choices=SIZES, default="tiny", help="of the model (default: %(default)s)")
    add("--seeds", type=int, default=3, choices=range(1, 6), help="runs of each setting (default: %(default)s)")
    add("--steps", type=int, default=120, help="optimizer steps (default: %(default)s)")
    add("--batch", type=int, default=8, help="sequences per step (default: %(default)s)")
    add("--seq", type=int, default=128, help="bytes per sequence (default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="peak learning rate of the weights (default: %(default)s)")
    add("--only", default="", metavar="TEXT", help="only settings whose name contains this")
    add("--inner", default="inductor", help="compiler: inductor, aot_eager or eager (default: %(default)s)")
    add("--data", type=Path, metavar="PATH", help="text file or folder (default: Python's standard library)")
    add(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ... (default: %(default)s)"
    )
    add_dtype_option(runs)
    add("--out", type=Path, default=Path("out/bits.json"), metavar="FILE", help="figures (default: %(default)s)")
    runs.set_defaults(act=run)
    reports = commands.add_parser("report", help="print the tables of such files")
    reports.add_argument("files", type=Path, nargs="+", metavar="FILE")
    reports.add_argument("--docs", type=Path, metavar="DIR", help="draw the plots into this folder")
    reports.set_defaults(act=report)
    args = parser.parse_args(argv)
    args.act(args)


if __name__ == "__main__":
    main()
