"""Train a small Llama with low-precision weights and bitsandbytes' 8-bit AdamW, and once more with torch's AdamW.

Both runs are pseudo-quantization training on the source text of Python's standard library; they differ in one line,
which makes the optimizer. A table shows the held-out losses, of the cast weights as they will be deployed, and the
bytes of the optimizers' states.

    python examples/train_bitsandbytes.py                         # about 3 minutes on a CPU core
    python examples/train_bitsandbytes.py --optimizer Lion8bit --lr8 2e-4

Needs ``pip install "gws-compile[examples]"``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import bitsandbytes as bnb
import torch
from compute_dtype import chosen_dtype
from optimizer_runs import Named, Settings, adamw, add_options, table, train
from text_data import load_text

OPTIMIZERS = ("AdamW8bit", "Adam8bit", "Lion8bit", "RMSprop8bit", "AdEMAMix8bit")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="8-bit optimizers of bitsandbytes beside torch's AdamW.")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="AdamW8bit", help="(default: %(default)s)")
    parser.add_argument("--lr8", type=float, help="peak learning rate of the 8-bit optimizer (default: AdamW's)")
    add_options(parser)
    args = parser.parse_args(argv)
    text = load_text(None, batch=args.batch, seq=args.seq)
    dtype = chosen_dtype(args.dtype, torch.device("cpu"))
    settings = Settings(args.fmt, args.steps, args.batch, args.seq, 0, args.inner, dtype)

    def eight_bits(named: Named) -> list[torch.optim.Optimizer]:
        # States of 4,096 elements and more are kept in 8 bits, in blocks of 256.
        return [getattr(bnb.optim, args.optimizer)([p for _, p in named], lr=args.lr8 or args.lr)]

    outcomes = {
        "AdamW": train(adamw(args.lr), settings, text, title="AdamW"),
        args.optimizer: train(eight_bits, settings, text, title=args.optimizer),
    }
    print(f"\n{table(outcomes)}")


if __name__ == "__main__":
    main()
