"""``python -m tests.fuzz``: run cases by their seeds, from the root of the repository.

python -m tests.fuzz --seed 17                 # run one; where it fails, make it small and print it as a program
python -m tests.fuzz --first 0 --count 1000    # run many; the seeds that fail, each made small
"""

from __future__ import annotations

import argparse
import gc
import sys
import time

import torch

from .case import source
from .check import failure_of, smallest_failure
from .generate import generate


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Parse the arguments and run; 1 where a case fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, help="run this case alone")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=50, help="how many")
    parser.add_argument("--as-is", action="store_true", help="do not make failing cases small")
    parser.add_argument("--show", action="store_true", help="print the cases and run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # what is there stays, and every collection would go through it
    one = arguments.seed is not None
    seeds = [arguments.seed] if one else range(arguments.first, arguments.first + arguments.count)
    began, failed = time.perf_counter(), []
    for number, seed in enumerate(seeds):
        if number and number % 100 == 0:
            _say(f"{number} cases in {time.perf_counter() - began:.0f} s, {len(failed)} failed")
        case = generate(seed)
        if arguments.show:
            _say(f"# seed {seed}\n{source(case)}")
            continue
        failure = failure_of(case) if arguments.as_is else smallest_failure(case)
        if failure is not None:
            failed.append(seed)
            _say(f"seed {seed} fails: {failure}")
    if not arguments.show:
        seconds = time.perf_counter() - began
        _say(f"{len(seeds)} cases in {seconds:.0f} s, {len(failed)} failed: {failed}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
