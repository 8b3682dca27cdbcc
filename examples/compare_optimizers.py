"""Optimizers of other packages under pseudo-quantization training, each beside itself without it; several seeds.

Each run trains a small Llama over bytes with one optimizer and reads the held-out loss, under the format as it is
deployed: of the cast weights, without noise. Two differences are taken seed by seed: what the format costs with this
optimizer, and what the optimizer costs under the format. The figures go to a JSON file after every run, and a run that
is in it already is not repeated.

    python examples/compare_optimizers.py run --out out/optimizers.json       # about 25 minutes on a CPU core
    python examples/compare_optimizers.py report out/optimizers.json

Needs ``pip install "gws-compile[examples]"``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compute_dtype import chosen_dtype
from optimizer_runs import Make, Named, Settings, adamw, add_options, is_layer_matrix, train
from over_seeds import interval
from tabulate import tabulate
from text_data import load_text
from train_galore import galore

SEEDS = 3


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        make: the optimizers.
        package: what they come from.
    """

    make: Make
    package: str


def entries(lr: float) -> dict[str, Entry]:
    """The rows; AdamW comes first. Packages are imported when a row is trained."""
    return {
        "torch AdamW": Entry(adamw(lr), "torch"),
        "bitsandbytes AdamW8bit": Entry(of("bitsandbytes.optim", "AdamW8bit", lr=lr), "bitsandbytes"),
        "torchao AdamW8bit": Entry(of("torchao.optim", "AdamW8bit", lr=lr), "torchao"),
        "torchao AdamW4bit": Entry(of("torchao.optim", "AdamW4bit", lr=lr), "torchao"),
        "GaLoreAdamW": Entry(galore(lr, rank=48, gap=50), "galore-torch"),
        "Muon, and AdamW for the rest": Entry(muon(10 * lr, lr), "torch"),
        "AdamWScheduleFree": Entry(of("schedulefree", "AdamWScheduleFree", lr=lr, warmup_steps=10), "schedulefree"),
    }


def of(module: str, name: str, **settings: Any) -> Make:
    """One optimizer of a module, for all parameters."""

    def make(named: Named) -> list[torch.optim.Optimizer]:
        kind = getattr(__import__(module, fromlist=[name]), name)
        return [kind([p for _, p in named], **settings)]

    return make


def muon(lr: float, others: float) -> Make:
    """Muon takes the layers' matrices, AdamW the tables and vectors."""

    def make(named: Named) -> Iterable[torch.optim.Optimizer]:
        matrices = [p for name, p in named if is_layer_matrix(name, p)]
        rest = [p for name, p in named if not is_layer_matrix(name, p)]
        return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.01), torch.optim.AdamW(rest, lr=others)]

    return make


def run(args: argparse.Namespace) -> None:
    """Train everything that is not in the file yet."""
    text = load_text(None, batch=args.batch, seq=args.seq)
    done = json.loads(args.out.read_text()) if args.out.exists() else {"runs": []}
    dtype = chosen_dtype(args.dtype, torch.device("cpu"))
    done["settings"] = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    del done["settings"]["act"]
    done["settings"]["dtype"] = str(dtype).removeprefix("torch.")
    known = {(r["optimizer"], r["fmt"], r["seed"]) for r in done["runs"]}
    chosen = {name: entry for name, entry in entries(args.lr).items() if not args.only or args.only in name}
    packages = {entry.package: version(entry.package) for entry in chosen.values()}
    done["versions"] = {**done.get("versions", {}), "python": platform.python_version(), **packages}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(done, indent=1) + "\n")
    for fmt in (args.fmt, None):
        for name, entry in chosen.items():
            for seed in range(args.seeds):
                if (name, fmt, seed) in known:
                    continue
                torch._dynamo.reset()  # models of former runs would count as recompilations
                settings = Settings(fmt, args.steps, args.batch, args.seq, seed, args.inner, dtype)
                title = f"{name}, {fmt or 'plain'}, seed {seed}"
                start = time.perf_counter()
                outcome = train(entry.make, settings, text, title=title)
                seconds = time.perf_counter() - start
                done["runs"].append(
                    {"optimizer": name, "fmt": fmt, "seed": seed, **asdict(outcome), "seconds": seconds}
                )
                args.out.write_text(json.dumps(done, indent=1) + "\n")


Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One optimizer over the seeds; intervals of 95 %, as mean and half of the width.

    Attributes:
        cast: held-out loss under the format.
        beside_adamw: the same less that of AdamW under the format.
        plain: held-out loss without a format; None as long as it has not been trained.
        cost: the loss under the format less the plain one.
        state_bytes: as in `optimizer_runs.Outcome`.
    """

    name: str
    cast: Interval
    beside_adamw: Interval
    plain: Interval | None
    cost: Interval | None
    state_bytes: int


def rows(runs: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """The rows of the optimizers that have been trained with all seeds, AdamW's first."""
    found = {(r["optimizer"], r["fmt"] is not None, r["seed"]): r for r in runs}
    names, seeds = list(dict.fromkeys(r["optimizer"] for r in runs)), sorted({r["seed"] for r in runs})

    def losses(name: str, *, cast: bool) -> list[float] | None:
        known = [found.get((name, cast, seed)) for seed in seeds]
        return None if None in known else [r["held_out"] for r in known]

    def differences(values: list[float] | None, others: list[float] | None) -> Interval | None:
        return (
            None if values is None or others is None else interval([a - b for a, b in zip(values, others, strict=True)])
        )

    for name in names:
        cast, plain = losses(name, cast=True), losses(name, cast=False)
        if cast is not None:
            yield Row(
                name,
                interval(cast),
                differences(cast, losses(names[0], cast=True)),
                None if plain is None else interval(plain),
                differences(cast, plain),
                found[name, True, seeds[0]]["state_bytes"],
            )


def report(args: argparse.Namespace) -> None:
    """Print the table in Markdown."""
    data = json.loads(args.file.read_text())
    found = list(rows(data["runs"]))
    first = found[0].state_bytes

    def text(value: Interval | None, sign: str = "") -> str:
        return "" if value is None else f"{value[0]:{sign}.4f} ± {value[1]:.4f}"

    print(
        tabulate(
            [
                (
                    row.name,
                    text(row.cast),
                    "" if row is found[0] else text(row.beside_adamw, "+"),
                    text(row.plain),
                    text(row.cost, "+"),
                    f"{row.state_bytes / 1024:,.0f} ({row.state_bytes / first:.2f})",
                )
                for row in found
            ],
            headers=("optimizer", "PQT", "PQT - PQT with AdamW", "plain", "PQT - plain", "state, KiB (of AdamW's)"),
            tablefmt="github",
            disable_numparse=True,
        )
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare optimizers under pseudo-quantization training.")
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="train, and write the figures to a file")
    add_options(runs, fmt="fp6_e3m2", steps=100)
    runs.add_argument("--seeds", type=int, default=SEEDS, choices=range(2, 6), help="of each (default: %(default)s)")
    runs.add_argument("--only", default="", metavar="TEXT", help="only optimizers whose name contains this")
    runs.add_argument("--out", type=Path, default=Path("out/optimizers.json"), metavar="FILE")
    runs.set_defaults(act=run, batch=8)
    reports = commands.add_parser("report", help="print the table of such a file")
    reports.add_argument("file", type=Path, metavar="FILE")
    reports.set_defaults(act=report)
    args = parser.parse_args(argv)
    args.act(args)


if __name__ == "__main__":
    main()
