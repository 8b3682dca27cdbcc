"""A progress bar that moves while one long step is on its way: the first one compiles, which takes seconds."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


def seconds_between_lines() -> float:
    """How often a bar is drawn anew: often on a terminal, seldom in a file, where each drawing is a line."""
    return 0.5 if sys.stderr.isatty() else 10.0


@contextmanager
def ticking(bar: tqdm, what: str) -> Iterator[None]:
    """Inside a ``with`` block the bar says what is done, and its clock goes on."""
    before = bar.desc.removesuffix(": ")
    bar.set_description(what)
    done = threading.Event()

    def tick() -> None:
        while not done.wait(seconds_between_lines()):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        bar.set_description(before, refresh=False)
