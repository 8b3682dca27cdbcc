"""Train a language model with low-precision weights on several ranks, with checkpoints to continue from.

The model and the text are those of ``train_gpt.py``; the noise is the same on every rank, so ranks, engines and
restarts all train the same model:

    torchrun --nproc-per-node 2 examples/train_distributed.py                    # DistributedDataParallel
    torchrun --nproc-per-node 2 examples/train_distributed.py --engine fsdp      # FSDP2, compiled block by block
    torchrun --nproc-per-node 2 examples/train_distributed.py --checkpoint ckpt --save-every 50 --resume

The last line may be started again and again: it continues from the newest complete checkpoint in ``ckpt``, and starts
from the beginning where there is none. On the same number of CPU ranks a continued run repeats the losses of one that
was never stopped, bit for bit. Another number of ranks, or the other engine, may continue it too, to rounding.

Needs ``pip install "gws-compile[examples]"``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from optimizing import adamw, learning_rate_schedule
from small_models import SIZES, build_model
from text_data import Text, load_text
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from train_options import add_training_options, training_figures

import gws_compile

ENGINES = ("ddp", "fsdp")
KEPT = 2
# What a continued run has to have in common with the run that made the checkpoint.
SAME = ("fmt", "bits", "noise", "model", "size", "steps", "batch", "seq", "lr", "seed", "autocast")


@dataclass(frozen=True)
class Settings:
    """What is trained, and how; ``batch`` is that of all ranks together."""

    engine: str
    model: str
    size: str
    steps: int
    batch: int
    seq: int
    lr: float
    seed: int
    autocast: bool
    device: torch.device
    checkpoint: Path | None
    save_every: int
    out: Path


def rank() -> int:
    """This process's number among all, from torchrun's environment."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes there are, from torchrun's environment."""
    return int(os.environ.get("WORLD_SIZE", 1))


def fail(message: str) -> NoReturn:
    """End the program with a message that is printed once, however many ranks have found the mistake."""
    if rank() > 0:
        # Torchrun stops the other ranks when rank 0 ends; a rank that is still here after this has found a mistake of
        # its own.
        time.sleep(5)
    print(f"train_distributed.py: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class Progress:
    """The number of steps done, as part of a checkpoint, with the settings that have to stay the same."""

    def __init__(self, same: dict[str, Any]) -> None:
        self.step = 0
        self._same = same

    def state_dict(self) -> dict[str, Any]:
        """For `torch.distributed.checkpoint`."""
        return {"step": self.step, "settings": dict(self._same)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For `torch.distributed.checkpoint`; a checkpoint of other settings ends the program."""
        for name, value in self._same.items():
            if (saved := state["settings"][name]) != value:
                fail(f"the checkpoint was made with {name} = {saved}, this run has {value}")
        self.step = state["step"]


class Checkpoints:
    """Numbered folders of `torch.distributed.checkpoint`.

    ``.metadata`` is written last, and renamed into place when it is whole: a folder without it is of a save that was
    not finished, and does not count.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(path.parent for path in self._directory.glob("step_*/.metadata"))

    def newest(self) -> Path | None:
        """The newest complete checkpoint, the same on all ranks."""
        found: list[Path | None] = [None, *self.complete()][-1:]
        dist.broadcast_object_list(found)
        return found[0]

    def save(self, state: dict[str, Any], step: int) -> None:
        """Save on all ranks, then drop all but the last few."""
        dcp.save(state, checkpoint_id=self._directory / f"step_{step:08d}")
        if rank() == 0:
            kept = self.complete()[-KEPT:]
            for path in self._directory.glob("step_*"):
                if path not in kept:
                    # First what makes it count: this may be interrupted as well.
                    (path / ".metadata").unlink(missing_ok=True)
                    shutil.rmtree(path)


class LossLog:
    """The losses of all steps, a line of JSON each; on rank 0 only."""

    def __init__(self, path: Path, first_step: int) -> None:
        lines = path.read_text().splitlines(keepends=True) if first_step and path.exists() else []
        # Steps behind the checkpoint are done again, and the last line of a run that was killed may be half a line.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first_step]
        new = path.with_name(path.name + ".new")
        new.write_text("".join(kept))
        new.replace(path)
        self._file = path.open("a")

    def write(self, step: int, loss: float) -> None:
        """Add a line; written out before the checkpoint of its step is."""
        self._file.write(json.dumps({"step": step, "loss": loss}) + "\n")
        self._file.flush()


class Training:
    """A model on this rank, its optimizer and all that a checkpoint holds."""

    def __init__(self, settings: Settings, pqt: gws_compile.Backend, same: dict[str, Any]) -> None:
        self._settings = settings
        torch.manual_seed(settings.seed)
        self.model = build_model(settings.model, SIZES[settings.size], settings.seq).to(settings.device)
        if settings.engine == "ddp":
            ids = [settings.device.index] if settings.device.type == "cuda" else None
            self._call: Callable[..., Any] = torch.compile(
                DistributedDataParallel(self.model, device_ids=ids), backend=pqt
            )
        else:
            shard(self.model, pqt, settings.device)
            self._call = self.model
        self.optimizer = adamw(self.model, settings.lr)
        self.schedule = learning_rate_schedule(self.optimizer, settings.steps)
        self.progress = Progress(same)
        self._pqt = pqt

    def step(self, tokens: torch.Tensor) -> float:
        """One optimizer step on this rank's part of a batch; returns the loss over the whole batch."""
        settings = self._settings
        with torch.autocast(settings.device.type, dtype=torch.bfloat16, enabled=settings.autocast):
            loss = self._call(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return mean.item() / world_size()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; the names in it are those of the bare model, under either engine."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule,
            "pqt": self._pqt,
            "progress": self.progress,
        }

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; one of other settings ends the program."""
        # By itself first: with other settings, the rest may not even have the same shapes.
        dcp.load({"progress": self.progress}, checkpoint_id=path)
        # The state of a new optimizer is made by a step with zero gradients, which a backend takes for a step: its own
        # state has to be loaded after that, as it is here.
        state = self.state()
        dcp.load(state, checkpoint_id=path)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def shard(model: transformers.PreTrainedModel, pqt: gws_compile.Backend, device: torch.device) -> None:
    """Shard with FSDP2; the blocks are compiled one by one, between the gathering of their weights."""
    mesh = init_device_mesh(device.type, (world_size(),))
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for block in blocks:
        block.compile(backend=pqt)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train(training: Training, text: Text, settings: Settings) -> None:
    """Train from the step that was reached to the last one."""
    checkpoints = Checkpoints(settings.checkpoint) if settings.checkpoint else None
    done = training.progress.step
    log = LossLog(settings.out, done) if rank() == 0 else None
    share = settings.batch // world_size()
    interval = 0.5 if sys.stderr.isatty() else 10
    progress = tqdm(
        range(done, settings.steps),
        desc=settings.engine,
        unit="step",
        initial=done,
        total=settings.steps,
        mininterval=interval,
        disable=rank() > 0,
    )
    for step in progress:
        tokens = text.batch_of_step(step, settings.batch, settings.seq, seed=settings.seed)
        loss = training.step(tokens[rank() * share :][:share].to(settings.device))
        if log:
            log.write(step, loss)
            progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        done = step + 1
        if checkpoints and (done % settings.save_every == 0 or done == settings.steps):
            checkpoints.save(training.state(), done)


def parse(argv: Sequence[str] | None) -> tuple[Settings, Text, gws_compile.Backend, dict[str, Any]]:
    """Read the command line; a mistake ends the program with one message.

    Returns:
        The settings, the text, the backend, and the settings that a checkpoint has to share.
    """
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description="Train a model with low-precision weights on several ranks. Start it with torchrun.",
        epilog="torchrun --nproc-per-node 2 examples/train_distributed.py --engine fsdp --checkpoint ckpt --resume",
    )
    add = parser.add_argument
    add("--engine", choices=ENGINES, default="ddp", help="DistributedDataParallel or FSDP2 (default: %(default)s)")
    add("--fmt", default="fp8_e4m3", metavar="FORMAT", help="of the weights (default: %(default)s)")
    add(
        "--backward",
        help="save, or recompute the weights in backward (default: save under ddp; recompute under fsdp, where "
        "keeping whole weights would undo the sharding)",
    )
    add_training_options(parser, "small" if cuda else "tiny")
    add("--autocast", action="store_true", help="compute in bfloat16")
    add("--checkpoint", type=Path, metavar="DIR", help=f"where checkpoints go; the last {KEPT} are kept")
    add("--save-every", type=int, metavar="STEPS", help="steps between checkpoints (default: a tenth of all)")
    add("--resume", action="store_true", help="continue from the newest complete checkpoint, if there is one")
    add("--out", type=Path, default=Path("out/train_distributed.jsonl"), metavar="FILE", help="losses, one line each")
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu", help="(default: %(default)s here)")
    parser.error = fail
    args = parser.parse_args(argv)
    try:
        figures = training_figures(args)
        check(args, figures)
        settings = Settings(
            engine=args.engine,
            model=args.model,
            size=args.size,
            **figures,
            seed=args.seed,
            autocast=args.autocast,
            device=device(args.device),
            checkpoint=args.checkpoint,
            save_every=args.save_every or max(1, figures["steps"] // 10),
            out=args.out,
        )
        text = load_text(args.data, batch=settings.batch, seq=settings.seq)
        for folder in filter(None, (args.checkpoint, args.out.parent)):
            folder.mkdir(parents=True, exist_ok=True)
        pqt = gws_compile.backend(
            args.fmt,
            bits=args.bits,
            noise=args.noise,
            seed=args.seed,
            backward=args.backward or ("recompute" if args.engine == "fsdp" else "save"),
            inner=args.inner,
        )
    except (ValueError, OSError) as error:
        fail(str(error))
    config = {"fmt": pqt.config.fmt.spec, "bits": pqt.config.bits, "noise": pqt.config.noise}
    return settings, text, pqt, {name: {**vars(args), **figures, **config}[name] for name in SAME}


def check(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Look for options that do not go together.

    Raises:
        ValueError: some do not.
    """
    if "RANK" not in os.environ:
        raise ValueError("start it with torchrun: torchrun --nproc-per-node 2 examples/train_distributed.py")
    if figures["batch"] % world_size():
        raise ValueError(f"--batch {figures['batch']} does not divide among {world_size()} ranks")
    if args.checkpoint is None and (args.resume or args.save_every is not None):
        raise ValueError(f"{'--resume' if args.resume else '--save-every'} needs --checkpoint")
    if args.save_every is not None and args.save_every < 1:
        raise ValueError(f"--save-every must be at least 1, got {args.save_every}")
    if args.checkpoint and not args.resume and Checkpoints(args.checkpoint).complete():
        raise ValueError(f"{args.checkpoint} holds checkpoints: continue with --resume, or name another folder")


def device(kind: str) -> torch.device:
    """This rank's device.

    Raises:
        ValueError: there are more ranks than devices.
    """
    if kind == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"rank {local_rank} has no device: torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", local_rank)


def run(settings: Settings, text: Text, pqt: gws_compile.Backend, same: dict[str, Any]) -> None:
    """All that happens between the beginning and the end of the process group."""
    training = Training(settings, pqt, same)
    start = "starting at step 0"
    if settings.checkpoint and (path := Checkpoints(settings.checkpoint).newest()):
        training.load(path)
        start = f"continuing from {path}"
    if rank() == 0:
        print(f"{settings.engine} on {world_size()} ranks, {pqt.config.fmt.name}: {start}", flush=True)
    train(training, text, settings)
    if rank() == 0:
        sampled = len(pqt.state_dict()["weights"])
        print(f"{sampled} weights were sampled; the losses are in {settings.out}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    settings, text, pqt, same = parse(argv)
    if settings.device.type == "cuda":
        torch.cuda.set_device(settings.device)
        dist.init_process_group("nccl", device_id=settings.device)
    else:
        # With more threads the gradient of an embedding is summed in another order each time.
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    try:
        run(settings, text, pqt, same)
        # Gloo's threads may still hold Python's tensors when a collective has returned. An interpreter that ends before
        # they let go hangs or aborts; a barrier holds none, and gives them the time.
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
