"""lm-evaluation-harness on a small Llama: plain, cast afterwards, and trained with pseudo-quantization.

Two models are trained on text, byte by byte: a plain one, and one with its weights in a low-precision format. The
harness (``lm_eval``) then has four to judge, on two tasks that are made from the held-out part of the text:

    plain                    the weights as they were trained
    plain, cast afterwards   the same weights, exported in the format
    PQT, compiled            the model of pseudo-quantization training, as it is deployed: under ``no_grad``
    PQT, exported            the same, exported as an engine loads it, and loaded by transformers

The last two are one model, and the harness's loglikelihoods of both are compared, one by one. A table is printed,
and all figures are written to ``out/evaluate/evaluate.json``. Nothing is downloaded.

    python examples/evaluate.py --fmt mxfp4                       # about 4 minutes on two CPU cores
    python examples/evaluate.py --fmt int4_group --trained out/evaluate/trained/plain out/evaluate/trained/pqt
    python examples/evaluate.py --model out/evaluate/exported/pqt # a folder that is there; any tasks: --tasks arc_easy

Needs ``pip install "gws-compile[examples,eval]"``.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from byte_tokenizer import byte_tokenizer
from compute_dtype import add_dtype_option, chosen_dtype, describe
from harness import Scores, load_folder, results_of, scores
from lm_eval.utils import make_table
from local_tasks import TASKS, write_tasks
from small_models import SIZES, build_model
from tabulate import tabulate
from text_data import Text, load_text
from train_gpt import Run, machine, train
from train_options import Settings

import gws_compile

SIZE, SHAPE = "tiny", SIZES["tiny"]
COMPILED, EXPORTED = "PQT, compiled", "PQT, exported"


@dataclass(frozen=True)
class Agreement:
    """How far the compiled and the exported model are apart.

    Attributes:
        loglikelihoods: that were compared.
        equal: of them, bit for bit.
        largest_difference: in nats.
        largest_share: the largest difference as a share of its loglikelihood.
    """

    loglikelihoods: int
    equal: int
    largest_difference: float
    largest_share: float

    @classmethod
    def between(cls, a: Scores, b: Scores) -> Agreement:
        """Of two models on the same tasks."""
        pairs = list(zip(a.loglikelihoods, b.loglikelihoods, strict=True))
        return cls(
            len(pairs),
            sum(x == y for x, y in pairs),
            max(abs(x - y) for x, y in pairs),
            max(abs(x - y) / abs(x) for x, y in pairs if x != y) if a.loglikelihoods != b.loglikelihoods else 0.0,
        )

    def __str__(self) -> str:
        said = f"compiled and exported: {self.equal:,} of {self.loglikelihoods:,} loglikelihoods are equal bit for bit"
        if self.equal == self.loglikelihoods:
            return said
        return (
            f"{said}; the largest difference is {self.largest_difference:.2g} nats, or {self.largest_share:.1g} of one"
        )


def new_folder(folder: Path) -> Path:
    """A place for a folder, without what an earlier run has left there."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def train_both(
    parsed: argparse.Namespace, text: Text
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedModel]:
    """A plain model and one of pseudo-quantization training: from the same weights, on the same batches."""
    device = torch.device("cpu")
    dtype = chosen_dtype(parsed.dtype, device)
    words = describe(dtype, asked=parsed.dtype != "auto")
    given = {name: getattr(parsed, name) for name in ("steps", "seed", "inner", "out")}
    shape = {name: getattr(SHAPE, name) for name in ("batch", "seq", "lr")}
    settings = Settings("llama", SIZE, SHAPE, **shape, **given, device=device, dtype=dtype, computed_in=words)
    backend = gws_compile.backend(parsed.fmt, seed=parsed.seed, inner=parsed.inner)
    print(f"{text.name}, {settings.steps} steps of {settings.batch} x {settings.seq} bytes, trained in {words}")
    torch.manual_seed(settings.seed)
    model = build_model(settings.model, settings.shape, settings.seq)
    runs = [Run("plain", model, None, settings), Run("PQT", copy.deepcopy(model), backend, settings)]
    with torch._dynamo.config.patch(recompile_limit=8 + 2 * len(runs)):
        train(runs, text, settings)
    for run, name in zip(runs, ("plain", "pqt"), strict=True):
        folder = new_folder(settings.out / "trained" / name)
        run.model.eval().save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return runs[0].model, runs[1].model


def export(model: transformers.PreTrainedModel, backend: gws_compile.Backend, folder: Path, form: str | None) -> None:
    """The model with cast weights, and its tokenizer beside it, as transformers and the harness load them."""
    tokens = torch.zeros(1, SHAPE.seq, dtype=torch.long)
    backend.prepare(model, input_ids=tokens, labels=tokens)  # a model that this backend has not trained
    report = backend.export(model, new_folder(folder), form, tokenizer=byte_tokenizer())
    packed = f"{len(report.packed)} weights packed" if report.packed else "all weights dense"
    print(f"{folder}: {packed}")


def compare(
    plain: transformers.PreTrainedModel, pqt: transformers.PreTrainedModel, parsed: argparse.Namespace, tasks: Path
) -> dict[str, Scores]:
    """What the harness says of each of the four, in float32."""
    torch._dynamo.reset()  # what training has compiled
    tokenizer = byte_tokenizer()
    folders = {name: parsed.out / "exported" / name for name in ("plain_cast_afterwards", "pqt")}
    for model, folder in zip((plain, pqt), folders.values(), strict=True):
        export(model, gws_compile.backend(parsed.fmt), folder, parsed.format)
    # The harness's batches differ in rows and length: not every shape is compiled anew.
    backend = gws_compile.backend(parsed.fmt, inner=parsed.inner)
    models = {
        "plain": plain,
        "plain, cast afterwards": load_folder(folders["plain_cast_afterwards"], torch.float32),
        COMPILED: torch.compile(pqt, backend=backend, fullgraph=True, dynamic=True),
        EXPORTED: load_folder(folders["pqt"], torch.float32),
    }
    found = {}
    for name, model in models.items():
        print(f"evaluating {name}")
        found[name] = scores(model, tokenizer, tasks)
    return found


def table(found: Mapping[str, Scores]) -> str:
    """One line a model."""
    rows = [
        (name, f"{s.bits_per_byte:.4f}", f"{s.byte_perplexity:.4f}", f"{s.accuracy:.3f} ± {s.accuracy_stderr:.3f}")
        for name, s in found.items()
    ]
    headers = ("model", "bits per byte", "byte perplexity", "acc ± stderr")
    return tabulate(rows, headers=headers, colalign=("left", "right", "right", "right"), disable_numparse=True)


def evaluate_folder(parsed: argparse.Namespace, tasks: Path) -> dict[str, Any]:
    """Any causal model in a folder, on any of the harness's tasks: its own results."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(parsed.model)
    found = results_of(load_folder(parsed.model, torch.float32), tokenizer, parsed.tasks, tasks)
    print(make_table(found))
    return {name: found[name] for name in ("results", "n-samples", "versions")}


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Text]:
    """Read the command line; a mistake ends the program with a usage message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--fmt", default="mxfp4", help="format or preset of training (default: %(default)s)")
    add("--format", help="of the export (default: the one that the weights were trained for)")
    add("--steps", type=int, default=SHAPE.steps, help="optimizer steps (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, data order, noise and questions (default: 0)")
    add("--inner", default="inductor", help="compiler: inductor, aot_eager or eager (default: %(default)s)")
    add("--data", type=Path, metavar="PATH", help="text file or folder (default: Python's standard library)")
    add("--trained", nargs=2, type=Path, metavar=("PLAIN", "PQT"), help="folders of trained models, to train none")
    add("--model", type=Path, metavar="FOLDER", help="evaluate the model of this folder alone, as it is")
    add("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help="with --model: any of the harness's tasks")
    add("--out", type=Path, default=Path("out/evaluate"), metavar="DIR", help="(default: %(default)s)")
    add_dtype_option(parser)
    parsed = parser.parse_args(argv)
    for folder in [*(parsed.trained or ()), *([parsed.model] if parsed.model else ())]:
        if not (folder / "config.json").is_file():
            parser.error(f"no Hugging Face model in {folder}: there is no config.json")
    if parsed.model and not (parsed.model / "tokenizer_config.json").is_file():
        parser.error(f"no tokenizer in {parsed.model}: export the model with tokenizer=..., or save it there")
    if parsed.tasks != list(TASKS) and not parsed.model:
        parser.error("--tasks goes with --model FOLDER")
    if parsed.steps < 1:
        parser.error(f"--steps must be at least 1, got {parsed.steps}")
    try:
        gws_compile.backend(parsed.fmt, inner=parsed.inner)
        text = load_text(parsed.data, batch=SHAPE.batch, seq=SHAPE.seq)
        write_tasks(text.held_out, parsed.out / "tasks", seed=parsed.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return parsed, text


def main(argv: Sequence[str] | None = None) -> None:
    parsed, text = parse(argv)
    tasks = parsed.out / "tasks"
    versions = {package.__name__: package.__version__ for package in (torch, transformers, lm_eval, gws_compile)}
    figures: dict[str, Any] = {"machine": machine(torch.device("cpu")), "versions": versions}
    if parsed.model:
        figures["model"] = str(parsed.model)
        figures |= evaluate_folder(parsed, tasks)
    else:
        if parsed.trained:
            plain, pqt = (load_folder(folder, torch.float32) for folder in parsed.trained)
        else:
            plain, pqt = train_both(parsed, text)
            figures["steps"] = parsed.steps
        found = compare(plain, pqt, parsed, tasks)
        agreement = Agreement.between(found[COMPILED], found[EXPORTED])
        print(f"\n{table(found)}\n\n{agreement}")
        figures |= {"fmt": parsed.fmt, "seed": parsed.seed, "text": text.name}
        figures |= {"models": {name: asdict(one) for name, one in found.items()}, "agreement": asdict(agreement)}
    path = parsed.out / ("model.json" if parsed.model else "evaluate.json")
    path.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"all figures in {path}")


if __name__ == "__main__":
    main()
