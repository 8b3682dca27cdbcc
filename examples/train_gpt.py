"""Train a language model as it is, and once more with its weights in a low-precision format, side by side.

The model is Hugging Face's GPT-2 (or Llama), unmodified; the text is the source code of Python's standard library,
byte by byte. Nothing is downloaded. The two runs differ in one argument:

    torch.compile(model)
    torch.compile(model, backend=gws_compile.backend(fmt="fp8_e4m3"))

They start from the same weights, see the same batches, and take turns step by step, so that a busy machine slows both
alike. A table then shows what the format costs: in loss (the held-out loss under a format is that of the cast weights,
without noise, as they will be deployed) and in tokens per second. Beside it stand the loss of the plain model whose
weights are cast afterwards, and the bytes of the matrices as they are deployed. The loss curves go to
``out/train_gpt.png``, all figures to ``out/train_gpt.json``, and each format's model, as an engine loads it, to
``out/exported``.

    python examples/train_gpt.py                                     # about 3 minutes on two CPU cores
    python examples/train_gpt.py --fmt mxfp8 nvfp4 int4_group        # several formats at once, or presets
    python examples/train_gpt.py --learned block --average 5         # and bit widths that are learned
    python examples/train_gpt.py --model llama --size small --data my_text/

Needs ``pip install "gws-compile[examples]"``.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import shutil
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from compute_dtype import computing_in
from loss_plot import Curve, plot_losses
from optimizing import adamw, learning_rate_schedule
from small_models import MODELS, build_model
from tabulate import tabulate
from text_data import Text
from ticking import seconds_between_lines, ticking
from tqdm import tqdm
from train_options import Settings, parse

import gws_compile

HELD_OUT_BATCHES = 8
HELD_OUT_POINTS = 6
# Steps that tokens/s leaves out: the first one compiles.
WARM_UP_STEPS = 5
# Peak learning rate of learned bit widths, which move over whole units.
BITS_LR = 0.02


@dataclass
class Run:
    """One model in training, and what was measured.

    Attributes:
        name: what table and curves call it.
        model: the model; no two runs share one.
        backend: a backend of gws_compile; None for the plain model.
        train_losses: one per step, in nats per byte.
        held_out: (step, loss) pairs; under a backend, of the cast weights.
        cast_afterwards: held-out loss of the plain run's last weights, cast to this run's format.
        step_seconds: one per step.
    """

    name: str
    model: transformers.PreTrainedModel
    backend: gws_compile.Backend | None
    settings: Settings
    train_losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    cast_afterwards: float | None = None
    step_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.compiled = torch.compile(self.model, backend=self.backend or self.settings.inner, fullgraph=True)
        self.optimizer = adamw(self.model, self.settings.lr)
        if self.learned:
            tokens = torch.zeros(1, self.settings.seq, dtype=torch.long, device=self.settings.device)
            self.backend.prepare(self.model, input_ids=tokens, labels=tokens)
            widths = list(self.backend.parameters())
            self.optimizer.add_param_group({"params": widths, "lr": BITS_LR, "weight_decay": 0.0})
        self.schedule = learning_rate_schedule(self.optimizer, self.settings.steps)

    @property
    def learned(self) -> bool:
        """Whether the backend learns bit widths."""
        return self.backend is not None and self.backend.config.learned is not None

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the next byte."""
        with computing_in(self.settings.dtype, self.settings.device):
            return self.compiled(input_ids=tokens, labels=tokens).loss

    def train_step(self, tokens: torch.Tensor) -> None:
        """One optimizer step on one batch."""
        start = time.perf_counter()
        loss = self.loss(tokens)
        (loss + self.backend.bit_loss() if self.learned else loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.train_losses.append(loss.item())
        if tokens.is_cuda:
            torch.cuda.synchronize()
        self.step_seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def held_out_loss(self, batches: Sequence[torch.Tensor]) -> float:
        """Mean loss over the batches. Without gradients a gws_compile backend casts the weights and adds no noise."""
        self.model.eval()
        losses = [self.loss(tokens).item() for tokens in batches]
        self.model.train()
        return statistics.fmean(losses)

    @property
    def final_train_loss(self) -> float:
        """Mean over the last tenth of the steps."""
        return statistics.fmean(self.train_losses[-max(1, len(self.train_losses) // 10) :])

    @property
    def tokens_per_second(self) -> float:
        """From the median step."""
        counted = self.step_seconds[WARM_UP_STEPS:] or self.step_seconds[-1:]
        return self.settings.batch * self.settings.seq / statistics.median(counted)


def train(runs: Sequence[Run], text: Text, settings: Settings) -> None:
    """Train all runs on the same batches, in turns; the first of them is the plain one."""
    held_out = text.held_out_batches(settings.batch, settings.seq, limit=HELD_OUT_BATCHES)
    held_out = [tokens.to(settings.device) for tokens in held_out]
    batches = text.batches(settings.batch, settings.seq, seed=settings.seed)
    points = {round(settings.steps * i / HELD_OUT_POINTS) for i in range(HELD_OUT_POINTS)}
    progress = tqdm(range(settings.steps), desc="training", unit="step", mininterval=seconds_between_lines())
    for step, tokens in zip(progress, batches, strict=False):
        if step in points:
            for run in runs:
                with compiling(progress, run, "to evaluate", step):
                    run.held_out.append((step, run.held_out_loss(held_out)))
        # In changing order, so that no run always finds the caches as another one has left them.
        for run in runs if step % 2 == 0 else reversed(runs):
            with compiling(progress, run, "to train", step):
                run.train_step(tokens.to(settings.device))
            if step == 0 and run.backend is not None:
                progress.write(f"{run.name}: {report_line(run.backend)}")
        progress.set_postfix({run.name: _postfix(run) for run in runs}, refresh=False)

    plain = runs[0]
    for run in runs:
        run.held_out.append((settings.steps, run.held_out_loss(held_out)))
        if run.backend is not None and not run.learned:
            with cast_weights(plain.model, run.backend):
                run.cast_afterwards = plain.held_out_loss(held_out)


def compiling(progress: tqdm, run: Run, purpose: str, step: int) -> AbstractContextManager[None]:
    """The first step traces and compiles; the progress bar says so."""
    return ticking(progress, f"tracing and compiling {run.name}, {purpose}") if step == 0 else nullcontext()


def _postfix(run: Run) -> str:
    loss = f"{run.train_losses[-1]:.3f}"
    return f"{loss} at {run.backend.average_bits():.2f} bits" if run.learned else loss


@contextmanager
def cast_weights(model: torch.nn.Module, backend: gws_compile.Backend) -> Iterator[None]:
    """Inside a ``with`` block, the model has the weights that the backend rewrites cast to its format."""
    names = [record.name for record in backend.report().rewritten]
    weights = [model.get_parameter(name) for name in names]
    saved = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for name, weight in zip(names, weights, strict=True):
            settings = backend.config.settings_of(name)
            weight.copy_(gws_compile.quantize(weight, settings.fmt, settings.block, settings.scale))
        try:
            yield
        finally:
            for weight, before in zip(weights, saved, strict=True):
                weight.copy_(before)


def report_line(backend: gws_compile.Backend) -> str:
    """The backend's report in one line."""
    report, config = backend.report(), backend.config
    skipped = ", ".join(record.name for record in report.skipped)
    return (
        f"{len(report.rewritten)} of {len(report)} weights rewritten (noise {config.noise}, {_width(config)}); "
        f"left alone: {skipped or 'none'}"
    )


def _width(config: Any) -> str:
    return f"b = {config.bits:g}" if config.learned is None else "b learned"


def deployed_bytes(run: Run, report: gws_compile.Report) -> int:
    """Bytes of the matrices that a report lists as they are deployed: cast ones with their scales, others in bfloat16.

    Args:
        run: the run that is deployed; of the plain one all matrices are in bfloat16.
        report: of this run's backend; for the plain run, of another's.
    """
    total = 0
    for record in report:
        stored = record.stored_bytes
        if record.rewritten and stored is None:  # learned widths
            stored = report.bits.by_weight[record.name].stored_bytes
        total += 2 * math.prod(record.shape) if stored is None or run.backend is None else stored
    return total


def result_table(runs: Sequence[Run]) -> str:
    """Losses and speed of each run."""
    plain = runs[0]
    base_loss, base_speed = plain.held_out[-1][1], plain.tokens_per_second
    reports = {run.name: run.backend.report() for run in runs if run.backend is not None}
    of_plain = next(iter(reports.values()), None)
    rows: list[tuple[Any, ...]] = []
    for run in runs:
        loss, speed = run.held_out[-1][1], run.tokens_per_second
        row = (run.name, f"{run.final_train_loss:.4f}", f"{loss:.4f}", _percent(loss / base_loss), f"{speed:,.0f}")
        if run is plain:
            size = "" if of_plain is None else f"{deployed_bytes(run, of_plain):,}"
            rows.append((*row[:3], "", row[4], "", size))
            continue
        cast, size = run.cast_afterwards, f"{deployed_bytes(run, reports[run.name]):,}"
        rows.append((*row, _percent(base_speed / speed), size))
        if run.learned:
            continue
        afterwards = (f"{cast:.4f}", _percent(cast / base_loss))
        rows.append((f"plain, cast to {run.name} afterwards", "", *afterwards, "", "", size))
    return tabulate(
        rows,
        headers=("model", "train loss", "held-out loss", "vs plain", "tokens/s", "overhead", "matrices, bytes"),
        colalign=("left", *["right"] * 6),
        disable_numparse=True,
    )


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %"


def figures(runs: Sequence[Run], text: Text, settings: Settings) -> dict[str, Any]:
    """Everything that was set and measured, for JSON."""
    plain = runs[0]
    return {
        "settings": {name: _plain_value(value) for name, value in asdict(settings).items()},
        "text": {"name": text.name, "train_bytes": len(text.train), "held_out_bytes": len(text.held_out)},
        "machine": machine(settings.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "gws_compile": gws_compile.__version__,
        },
        "parameters": sum(p.numel() for p in plain.model.parameters()),
        "runs": [
            {
                "name": run.name,
                "backend": None if run.backend is None else _backend_figures(run.backend),
                "final_train_loss": run.final_train_loss,
                "final_held_out_loss": run.held_out[-1][1],
                "plain_cast_afterwards_held_out_loss": run.cast_afterwards,
                "tokens_per_second": run.tokens_per_second,
                "deployed_bytes": None if run.backend is None else deployed_bytes(run, run.backend.report()),
                "overhead": plain.tokens_per_second / run.tokens_per_second - 1,
                "train_losses": run.train_losses,
                "held_out_losses": run.held_out,
                "step_seconds": run.step_seconds,
            }
            for run in runs
        ],
    }


def _plain_value(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, (Path, torch.device, torch.dtype)) else value


def _backend_figures(backend: gws_compile.Backend) -> dict[str, Any]:
    config, report = backend.config, backend.report()
    return {
        "fmt": config.weights.name,
        "block": config.weights.block_text,
        "scale": config.scale,
        "bits": config.bits if config.learned is None else backend.average_bits(),
        "learned": None if config.learned is None else asdict(config.learned)["granularity"],
        "share_of_formats": None if report.bits is None else report.bits.share,
        "noise": config.noise,
        "backward": config.backward,
        "weights": len(report),
        "rewritten": len(report.rewritten),
        "left_alone": {record.name: record.reason for record in report.skipped},
    }


def machine(device: torch.device) -> dict[str, Any]:
    """The device that the figures were read on."""
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return {"type": "cpu", "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def export(run: Run, folder: Path) -> str:
    """Write a run's model as an engine loads it, and say in a line what came out."""
    if (folder / "gws_export.json").exists():  # of an earlier run
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if run.learned:
        run.backend.freeze_bits(per_weight=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gws_compile.GwsWarning)  # that nothing can be packed, which is said here
        report = run.backend.export(run.compiled, folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    packed = f"{len(report.packed)} weights packed"
    if not report.packed:
        packed = f"all weights dense ({next(w.reason for w in report.weights if w.trained)})"
    return f"{run.name}: {packed}, {size:,} bytes in {folder}; load it with\n    {report.load}"


def main(argv: Sequence[str] | None = None) -> None:
    settings, text, backends = parse(argv)
    torch.manual_seed(settings.seed)
    model = build_model(settings.model, settings.shape, settings.seq)
    model.to(settings.device)
    parameters = sum(p.numel() for p in model.parameters())
    shape = settings.shape
    title = (
        f"{MODELS[settings.model]}, {shape.layers} layers of width {shape.width}, {parameters / 1e6:.3g} M parameters"
    )
    data = f"{text.name}, {settings.batch} x {settings.seq} bytes a step, {settings.computed_in}"
    print(f"{title}\n{data}, on {machine(settings.device)['name']}")

    runs = [Run("plain", model, None, settings)]
    runs += [Run(name, copy.deepcopy(model), backend, settings) for name, backend in backends.items()]
    # Dynamo counts the compilations of one forward over all models: each run needs one to train and one to evaluate.
    with torch._dynamo.config.patch(recompile_limit=8 + 2 * len(runs)):
        train(runs, text, settings)

    print(f"\n{result_table(runs)}")
    for run in runs:
        if run.learned:
            print(f"\n{run.name}: {run.backend.average_bits():.3f} bits on average\n{run.backend.report()}")
    json_path, png_path = settings.out / "train_gpt.json", settings.out / "train_gpt.png"
    json_path.write_text(json.dumps(figures(runs, text, settings), indent=1) + "\n")
    curves = [Curve(run.name, run.train_losses, run.held_out) for run in runs]
    noise = ", ".join(f"{name}: {b.config.noise} noise, {_width(b.config)}" for name, b in backends.items())
    plot_losses(png_path, curves, title=title, subtitle=f"{data}\n{noise}")
    print(f"\nloss curves in {png_path}, all figures in {json_path}\n")
    for run in runs[1:]:
        print(export(run, settings.out / "exported" / run.name.replace(" ", "_")))


if __name__ == "__main__":
    main()
