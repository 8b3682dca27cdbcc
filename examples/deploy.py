"""From training to an engine: train a small Llama, export it in low bits, and load it where this package is not.

The model is trained with pseudo-quantization on the source text of Python's standard library, byte by byte. It is
exported as a folder that vLLM, SGLang and transformers take; here transformers loads it, in a process of its own that
knows nothing of gws_compile. Both go on with the same text, and the held-out losses of four are shown: the compiled
model under ``no_grad``, the exported one, and the trained weights as they are, in float32 and in bfloat16.

    python examples/deploy.py                       # about 2 minutes on two CPU cores
    python examples/deploy.py --fmt mxfp4 --steps 600
    python examples/deploy.py --fmt fp4_e2m1 --block 16x16 --format nvfp4

Needs ``pip install "gws-compile[examples]"``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from optimizing import adamw, learning_rate_schedule
from small_models import SIZES, build_model
from text_data import load_text
from ticking import seconds_between_lines
from tqdm import tqdm

SIZE = SIZES["tiny"]
HELD_OUT_BATCHES = 8
PROMPT = b"def read(self, size=-1):\n    "
GENERATED = 96


def losses_and_text(logits_of: Callable[[torch.Tensor], torch.Tensor], held_out: Sequence[torch.Tensor]) -> dict:
    """Mean held-out loss in nats per byte, and how the prompt goes on when the likeliest byte is taken each time."""
    losses = []
    with torch.no_grad():
        for tokens in held_out:
            logits = logits_of(tokens)[:, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item())
        # Always of the same length, so that nothing is compiled again: what stands behind a byte does not change it.
        text = list(PROMPT)
        for _ in range(GENERATED):
            window = text[-SIZE.seq :]
            padded = torch.tensor([window + [0] * (SIZE.seq - len(window))])
            rows = padded.expand(SIZE.batch, -1)
            text.append(int(logits_of(rows)[0, len(window) - 1].argmax()))
    return {"loss": sum(losses) / len(losses), "text": bytes(text).decode("utf-8", "replace")}


def in_a_fresh_process(folder: Path, dtype: str) -> dict[str, Any]:
    """What a process makes of a folder that has transformers alone."""
    command = [sys.executable, __file__, "--load", str(folder), "--dtype", dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def load(folder: Path, dtype: str) -> None:
    """Load a folder with transformers, and print what it gives as JSON: the part that runs in a process of its own."""
    assert "gws_compile" not in sys.modules
    packed = "quantization_config" in json.loads((folder / "config.json").read_text())
    how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if packed else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **how).eval()
    text = load_text(None, batch=SIZE.batch, seq=SIZE.seq)
    held_out = text.held_out_batches(SIZE.batch, SIZE.seq, limit=HELD_OUT_BATCHES)
    print(json.dumps(losses_and_text(lambda tokens: model(input_ids=tokens).logits, held_out)))


def bytes_of(folder: Path) -> int:
    """Of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def train(parsed: argparse.Namespace) -> None:
    """Train, export, load, compare."""
    import gws_compile

    torch.manual_seed(0)
    text = load_text(None, batch=SIZE.batch, seq=SIZE.seq)
    held_out = text.held_out_batches(SIZE.batch, SIZE.seq, limit=HELD_OUT_BATCHES)
    model = build_model("llama", SIZE, SIZE.seq)
    block = None if parsed.block is None else tuple(map(int, parsed.block.split("x")))
    pqt = gws_compile.backend(parsed.fmt, block=block, inner=parsed.inner)
    compiled = torch.compile(model, backend=pqt)
    optimizer = adamw(model, SIZE.lr)
    schedule = learning_rate_schedule(optimizer, parsed.steps)
    batches = text.batches(SIZE.batch, SIZE.seq, seed=0)
    for _, tokens in zip(tqdm(range(parsed.steps), mininterval=seconds_between_lines()), batches, strict=False):
        compiled(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    compiled.eval()
    evaluated = losses_and_text(lambda tokens: compiled(input_ids=tokens).logits, held_out)
    deployed, trained = parsed.out / "deployed", parsed.out / "trained"
    for folder in (deployed, trained):
        if folder.exists():  # of an earlier run
            shutil.rmtree(folder)
    parsed.out.mkdir(parents=True, exist_ok=True)
    report = pqt.export(compiled, deployed, parsed.format)
    print(f"\n{report}\n")
    model.save_pretrained(trained)

    exported = in_a_fresh_process(deployed, "float32")
    rows = [
        ("compiled, under no_grad", evaluated, ""),
        ("exported, loaded by transformers", exported, f"{bytes_of(deployed):,}"),
        ("trained weights, float32", in_a_fresh_process(trained, "float32"), f"{bytes_of(trained):,}"),
        ("trained weights, bfloat16", in_a_fresh_process(trained, "bfloat16"), f"{bytes_of(trained) // 2:,}"),
    ]
    width = max(len(name) for name, _, _ in rows)
    print(f"{'':{width}}  held-out loss  bytes")
    for name, result, size in rows:
        print(f"{name:{width}}  {result['loss']:13.6f}  {size}")
    same = "the same text" if exported["text"] == evaluated["text"] else "ANOTHER TEXT"
    print(f"\nthe compiled and the exported model write {same}:\n\n{exported['text']}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a small Llama, export it in low bits, and load it elsewhere.")
    parser.add_argument("--fmt", default="mxfp8", help="format or preset of training (default: %(default)s)")
    parser.add_argument("--block", metavar="ROWSxCOLUMNS", help="block of training (default: the format's)")
    parser.add_argument("--format", help="of the export (default: the one that the weights were trained for)")
    parser.add_argument("--steps", type=int, default=SIZE.steps, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--inner", default="inductor", help="compiler: inductor, aot_eager or eager")
    parser.add_argument("--out", type=Path, default=Path("out/deploy"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    parsed = parser.parse_args(argv)
    if parsed.load is not None:
        load(parsed.load, parsed.dtype)
    else:
        train(parsed)


if __name__ == "__main__":
    main()
