"""Distill a full-precision GPT or Llama into a student of two or three bits, and train the same student without it.

The teacher is trained first, plainly. Then each format and seed has two students: one learns from the text alone, the
other by ``0.7 T^2 KL(teacher || student) + 0.3 CE``, T = 2 (Hinton, Vinyals, Dean, arXiv 1503.02531). Both start alike
and see the same batches and noise. Teacher and student are called inside one compiled train step, and the teacher stays
as it is: ``exclude="teacher.*"``. What is compared is the deployed student: its weights cast, without noise.

    python examples/distill_gpt.py                                  # about 20 minutes on a CPU core
    python examples/distill_gpt.py --start random --formats int2    # students that begin with random weights
    python examples/distill_gpt.py --formats uniform2 normal2       # levels that are trained: gws_compile.Levels
    python examples/distill_gpt.py --formats uniform2 normal2 --fixed-levels

Needs ``pip install "gws-compile[examples]"``.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from optimizing import adamw, learning_rate_schedule
from over_seeds import interval
from small_models import MODELS, SIZES, build_model
from tabulate import tabulate
from text_data import Text, load_text
from ticking import seconds_between_lines
from torch.nn import functional as F
from tqdm import tqdm

import gws_compile

SIZE = replace(SIZES["tiny"], width=128, batch=8)
HELD_OUT_BATCHES = 8
SHARE = 0.7
TEMPERATURE = 2.0


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Nats per byte, of each byte by those in front of it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def distance(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """``T^2 KL(wanted || given)`` of two tensors of logits, nats per byte."""
    of_student = F.log_softmax(given[:, :-1].flatten(0, 1).float() / TEMPERATURE, dim=-1)
    of_teacher = F.log_softmax(wanted[:, :-1].flatten(0, 1).float() / TEMPERATURE, dim=-1)
    return TEMPERATURE**2 * F.kl_div(of_student, of_teacher, reduction="batchmean", log_target=True)


def loss_of(student: torch.nn.Module, teacher: torch.nn.Module | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """The train step's forward, both models in one function; ``exclude="teacher.*"`` goes by its variable."""

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        given = student(input_ids=tokens).logits
        of_text = cross_entropy(given, tokens)
        if teacher is None:
            return of_text
        with torch.no_grad():
            wanted = teacher(input_ids=tokens).logits
        return SHARE * distance(given, wanted) + (1 - SHARE) * of_text

    return loss


def backend_of(parsed: argparse.Namespace, run: dict[str, Any]) -> gws_compile.Backend:
    """What a student is compiled with. A teacher that is not excluded would be cast, frozen as it is."""
    exclude = (*gws_compile.DEFAULT_EXCLUDE, *(("teacher.*",) if run["taught"] else ()))
    levels = re.fullmatch(r"(uniform|normal)(\d)", run["fmt"])
    if levels is not None:  # they have no noise
        fmt, noise = getattr(gws_compile.Levels, levels[1])(int(levels[2])), None
    else:
        fmt, noise = run["fmt"], parsed.noise
    return gws_compile.backend(fmt, exclude=exclude, seed=run["seed"], inner=parsed.inner, noise=noise)


def train(
    name: str,
    model: torch.nn.Module,
    loss: Callable[[torch.Tensor], torch.Tensor],
    text: Text,
    steps: int,
    seed: int,
    levels: Sequence[torch.nn.Parameter] = (),
) -> None:
    """Train a model in place, and the levels of its format."""
    optimizer = adamw(model, SIZE.lr)
    if levels:
        optimizer.add_param_group({"params": levels, "weight_decay": 0.0})
    schedule = learning_rate_schedule(optimizer, steps)
    bar = tqdm(range(steps), desc=name, mininterval=seconds_between_lines())
    for _, tokens in zip(bar, text.batches(SIZE.batch, SIZE.seq, seed=seed), strict=False):
        loss(tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out_loss(call: Callable[..., Any], text: Text) -> float:
    """Of a compiled model as it is deployed: under ``no_grad`` weights are cast, without noise."""
    batches = text.held_out_batches(SIZE.batch, SIZE.seq, limit=HELD_OUT_BATCHES)
    return statistics.mean(cross_entropy(call(input_ids=tokens).logits, tokens).item() for tokens in batches)


def trained_teacher(parsed: argparse.Namespace, text: Text) -> torch.nn.Module:
    """The teacher, trained without any backend of gws_compile, and frozen."""
    torch.manual_seed(0)
    teacher = build_model(parsed.model, SIZE, SIZE.seq)
    compiled = teacher if parsed.inner == "eager" else torch.compile(teacher, backend=parsed.inner)
    train("teacher", teacher, loss_of(compiled, None), text, parsed.teacher_steps, seed=0)
    return teacher.requires_grad_(False)


def student_loss(parsed: argparse.Namespace, teacher: torch.nn.Module, text: Text, run: dict[str, Any]) -> float:
    """Train one student, and evaluate it as it is deployed."""
    torch._dynamo.reset()  # the runs compile the same code
    torch.manual_seed(run["seed"])
    student = build_model(parsed.model, SIZE, SIZE.seq)
    if parsed.start == "teacher":
        student.load_state_dict(copy.deepcopy(teacher.state_dict()))
    pqt = backend_of(parsed, run)
    loss = torch.compile(loss_of(student, teacher if run["taught"] else None), backend=pqt, fullgraph=True)
    name = f"{run['fmt']}, seed {run['seed']}, {'taught' if run['taught'] else 'alone'}"
    loss(next(text.batches(SIZE.batch, SIZE.seq, seed=0)))  # a first forward makes the levels
    levels = list(pqt.parameters())
    for one in levels:
        one.requires_grad_(not parsed.fixed_levels)
    train(name, student, loss, text, parsed.steps, run["seed"] + 1, [one for one in levels if one.requires_grad])
    return held_out_loss(torch.compile(student, backend=pqt), text)


def row(students: Sequence[dict[str, Any]]) -> list[str]:
    """Loss alone, with the teacher, and the difference seed by seed: mean and half of the 95 % interval."""
    alone, taught = ([one["loss"] for one in students if one["taught"] is wanted] for wanted in (False, True))
    differences = [after - before for before, after in zip(alone, taught, strict=True)]
    return [
        *(f"{mean:.4f} ± {half:.4f}" for mean, half in map(interval, (alone, taught))),
        "{:+.4f} ± {:.4f}".format(*interval(differences)),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, default="gpt2", help="of teacher and student (default: %(default)s)")
    add(
        "--formats",
        nargs="+",
        default=["int2", "int3", "fp4_e2m1"],
        help="of the student; uniformN and normalN are 2^N levels that are trained (default: %(default)s)",
    )
    add(
        "--noise",
        choices=("rounded_normal", "uniform", "none"),
        default="rounded_normal",
        help="(default: %(default)s)",
    )
    add("--fixed-levels", action="store_true", help="levels of uniformN and normalN stay as they begin")
    add("--start", choices=("teacher", "random"), default="teacher", help="weights of a student (default: %(default)s)")
    add("--teacher-steps", type=int, default=800, help="(default: %(default)s)")
    add("--steps", type=int, default=200, help="of a student (default: %(default)s)")
    add("--seeds", type=int, default=3, help="how many: of batches, noise and random weights (default: %(default)s)")
    add("--inner", choices=("inductor", "aot_eager", "eager"), default="inductor", help="(default: %(default)s)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where the figures go (default: out)")
    parsed = parser.parse_args(argv)
    if parsed.seeds < 2:
        parser.error(f"--seeds must be 2 or more, for an interval, got {parsed.seeds}")
    return parsed


def main(argv: Sequence[str] | None = None) -> None:
    parsed = parse(argv)
    text = load_text(None, batch=SIZE.batch, seq=SIZE.seq)
    teacher = trained_teacher(parsed, text)
    of_teacher = held_out_loss(teacher, text)
    parsed.out.mkdir(parents=True, exist_ok=True)
    rows, figures = [], {"teacher": of_teacher, "students": []}
    for fmt in parsed.formats:
        runs = [
            {"fmt": fmt, "seed": seed, "taught": taught} for seed in range(parsed.seeds) for taught in (False, True)
        ]
        for run in runs:
            figures["students"].append(run | {"loss": student_loss(parsed, teacher, text, run)})
            (parsed.out / "distillation.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
        rows.append([fmt, *row(figures["students"][-len(runs) :])])
    print(f"teacher, full precision: {of_teacher:.4f} nats per byte, held out")
    print(tabulate(rows, headers=("student", "alone", "with the teacher", "difference"), disable_numparse=True))


if __name__ == "__main__":
    main()
