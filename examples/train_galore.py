"""Train a small Llama with low-precision weights and GaLore, which keeps the optimizer's state in a low rank.

The gradients of the blocks' matrices are projected to a rank, and AdamW's two moments are kept of the projections. With
``--per-layer`` each parameter has an optimizer of its own, which steps inside backward as soon as backward has its
gradient, and drops it; the blocks are compiled one by one, so that only one block's gradients are there at a time. The
noise is that of one draw all the same. Beside it torch's AdamW trains the same model; a table shows held-out losses and
bytes. No gradient is clipped, since that takes the norm of all of them.

    python examples/train_galore.py                     # about 3 minutes on a CPU core
    python examples/train_galore.py --per-layer --rank 32

Needs ``pip install "gws-compile[examples]"``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from compute_dtype import chosen_dtype
from galore_torch import GaLoreAdamW
from optimizer_runs import Make, Named, Settings, adamw, add_options, is_layer_matrix, table, train
from text_data import load_text


def galore(lr: float, rank: int, gap: int) -> Make:
    """GaLore for the matrices of the blocks; tables, norms and biases have AdamW's rate and no projection.

    An update of GaLore's is scaled by 0.25, so its matrices get four times AdamW's rate.
    """

    def make(named: Named) -> list[torch.optim.Optimizer]:
        low_rank = {"rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std", "lr": 4 * lr}
        groups = [{"params": [p], **(low_rank if is_layer_matrix(name, p) else {})} for name, p in named]
        return [GaLoreAdamW(groups, lr=lr, no_deprecation_warning=True)]

    return make


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="GaLore beside torch's AdamW.")
    parser.add_argument("--rank", type=int, default=48, help="of the projected gradients (default: %(default)s)")
    parser.add_argument("--gap", type=int, default=50, help="steps between new projections (default: %(default)s)")
    parser.add_argument("--per-layer", action="store_true", help="step inside backward, a parameter at a time")
    add_options(parser)
    args = parser.parse_args(argv)
    text = load_text(None, batch=args.batch, seq=args.seq)
    dtype = chosen_dtype(args.dtype, torch.device("cpu"))
    settings = Settings(args.fmt, args.steps, args.batch, args.seq, 0, args.inner, dtype, clip=None)
    low_rank, layers = galore(args.lr, args.rank, args.gap), args.per_layer
    outcomes = {
        "AdamW": train(adamw(args.lr), settings, text, title="AdamW"),
        "GaLoreAdamW": train(
            low_rank, settings, text, per_parameter=layers, block_by_block=layers, title="GaLoreAdamW"
        ),
    }
    print(f"\n{table(outcomes)}")


if __name__ == "__main__":
    main()
