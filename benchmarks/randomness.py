"""Write the noise's raw random words, for a published battery of randomness tests.

The words are those of `gws_compile.numerics.noise.random_word`, 32 bits each, little endian, in one of several orders::

    weight   one weight, its elements in memory order (after 2**32 words: the next step)
    weights  training: at each step, weight after weight, 2**16 elements of each
    steps    one element, step after step (after 2**32 words: the next element)
    elements one weight, 256 steps of an element, element after element
    columns  one 4096 x 4096 weight, column by column, step after step

With ``--top-byte`` only each word's top byte is written: it alone decides R, the noise, in all but 1 of 64 words.

    python benchmarks/randomness.py --order weights | dieharder -a -g 200
    python benchmarks/randomness.py --order weights | RNG_test stdin32 -tlmax 64GB -multithreaded      # PractRand
    python benchmarks/randomness.py --order weights --top-byte | RNG_test stdin8 -tlmax 4GB            # PractRand
    python benchmarks/randomness.py --order weights --words 1048576 --output words.bin

TestU01 has no program to read a stream: make a ``unif01_Gen`` of ``fread(&word, 4, 1, stdin)`` with
``unif01_CreateExternGenBits`` and pass it to ``bbattery_SmallCrush`` or ``bbattery_Crush``.
Results are in ``benchmarks/results/randomness``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from gws_compile.numerics.keys import key_words
from gws_compile.numerics.noise import random_word
from gws_compile.numerics.primitives import TorchPrimitives, wrap_int32

PIECE = 2**16  # words drawn at a time: they stay in the second-level cache
SIDE = 4096  # of the weight that is read by columns


def pieces(order: str, seed: int, weights: int, element: int, first_step: int) -> Iterator[torch.Tensor]:
    """Endless pieces of random words, int32."""
    p = TorchPrimitives()
    ramp = torch.arange(PIECE, dtype=torch.int32)
    keys = torch.tensor([key_words(seed, f"layers.{i}.weight") for i in range(weights)], dtype=torch.int32)

    def draw(index: torch.Tensor | int, step: torch.Tensor | int, weight: int = 0) -> torch.Tensor:
        index, step = (torch.tensor(v, dtype=torch.int32) if isinstance(v, int) else v for v in (index, step))
        word: torch.Tensor = random_word(p, index, (keys[weight][0], keys[weight][1]), step)
        return word

    if order == "weight":
        for step in itertools.count(first_step):
            for start in range(0, 2**32, PIECE):
                yield draw(ramp + wrap_int32(start), wrap_int32(step))
    elif order == "weights":
        for step in itertools.count(first_step):
            for weight in range(weights):
                yield draw(ramp, wrap_int32(step), weight)
    elif order == "steps":
        for index in itertools.count(element):
            for start in range(first_step, first_step + 2**32, PIECE):
                yield draw(wrap_int32(index), ramp + wrap_int32(start))
    elif order == "elements":
        for start in itertools.cycle(range(0, 2**32, PIECE // 256)):
            yield draw((ramp >> 8) + wrap_int32(start), (ramp & 255) + first_step)
    elif order == "columns":
        by_column = torch.arange(SIDE * SIDE, dtype=torch.int32).view(SIDE, SIDE).t().reshape(-1, PIECE)
        for step in itertools.count(first_step):
            for index in by_column:
                yield draw(index, wrap_int32(step))
    else:
        raise AssertionError(order)


def write(out: BinaryIO, words: Iterator[torch.Tensor], count: int | None, top_byte: bool) -> None:
    """Write ``count`` words, or for ever."""
    left = count
    while left is None or left > 0:
        piece = next(words).numpy().astype("<i4", copy=False)[:left]
        out.write(piece.view("u1")[3::4].tobytes() if top_byte else piece.tobytes())
        left = None if left is None else left - len(piece)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", choices=("weight", "weights", "steps", "elements", "columns"), default="weights")
    parser.add_argument("--words", type=int, help="how many; the default never ends")
    parser.add_argument("--output", type=Path, help="file to write; the default is the standard output")
    parser.add_argument("--top-byte", action="store_true", help="write only the top byte of each word")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=int, default=224, help="of the order 'weights': Llama-2 7B has 224")
    parser.add_argument("--element", type=int, default=0, help="first element of the order 'steps'")
    parser.add_argument("--first-step", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    words = pieces(args.order, args.seed, args.weights, args.element, args.first_step)
    if args.output:
        with args.output.open("wb") as out:
            write(out, words, args.words, args.top_byte)
        return
    try:
        write(sys.stdout.buffer, words, args.words, args.top_byte)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # The battery has read all it wants. Keep the interpreter from failing on a last flush.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
