"""Text to train a small language model on, as bytes: the vocabulary is the 256 byte values.

By default the text is the source of Python's own standard library, which is on every machine that can run this.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

VOCABULARY = 256
HELD_OUT_SHARE = 10  # one tenth
MAX_BYTES = 1 << 28
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


class TextError(ValueError):
    """The text cannot be trained on; the message says why."""


@dataclass(frozen=True)
class Text:
    """A text in two parts.

    Attributes:
        name: where it comes from, for titles.
        train: uint8, the bytes to train on.
        held_out: uint8, the last tenth.
    """

    name: str
    train: torch.Tensor
    held_out: torch.Tensor

    def batches(self, batch: int, seq: int, *, seed: int) -> Iterator[torch.Tensor]:
        """Endless (batch, seq) tokens from random places of the training part; equal seeds, equal batches."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.train) - seq + 1, (batch, 1), generator=generator)
            yield self.train[starts + torch.arange(seq)].long()

    def batch_of_step(self, step: int, batch: int, seq: int, *, seed: int) -> torch.Tensor:
        """(batch, seq) tokens from random places of the training part: a pure function of seed and step."""
        rng = np.random.default_rng([seed, step])
        starts = torch.from_numpy(rng.integers(len(self.train) - seq + 1, size=(batch, 1)))
        return self.train[starts + torch.arange(seq)].long()

    def held_out_batches(self, batch: int, seq: int, *, limit: int) -> list[torch.Tensor]:
        """At most ``limit`` batches of (batch, seq) tokens, spread evenly over the held-out part, without overlap."""
        rows = self.held_out[: len(self.held_out) // seq * seq].view(-1, seq)
        count = min(limit, len(rows) // batch)
        chosen = torch.linspace(0, len(rows) - 1, count * batch).long()
        return list(rows[chosen].long().split(batch))


def load_text(path: Path | None, *, batch: int, seq: int) -> Text:
    """Read the text and split off the last tenth.

    Files are put in the order of a hash of their names: the same on every machine, and so mixed that the last tenth
    is like the rest.

    Args:
        path: a text file, or a folder of them (hidden and binary files are passed over); the standard library if None.
        batch: rows of a batch, for the check that the held-out part makes at least one.
        seq: tokens of a row.

    Raises:
        TextError: no such path, or too little text.
        OSError: a file cannot be read.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in root.rglob("*.py") if not _NOT_LIBRARY.intersection(f.relative_to(root).parts)]
        name = "source text of Python's standard library"
    elif path.is_dir():
        root, name = path, str(path)
        files = [f for f in root.rglob("*") if f.is_file() and not _hidden(f.relative_to(root))]
    elif path.exists():
        root, name, files = path.parent, str(path), [path]
    else:
        raise TextError(f"no such file or folder: {path}")

    data = bytearray()
    for file in sorted(files, key=lambda f: hashlib.sha256(f.relative_to(root).as_posix().encode()).digest()):
        content = file.read_bytes()
        if file == path or b"\0" not in content[:8192]:
            data += content
        if len(data) >= MAX_BYTES:
            break

    needed = HELD_OUT_SHARE * batch * seq
    if len(data) < needed:
        raise TextError(
            f"too little text in {path or root}: {len(data):,} bytes; with batch {batch} and seq {seq} at least "
            f"{needed:,} are needed, of which a tenth is held out"
        )
    text = torch.frombuffer(data, dtype=torch.uint8)
    split = len(text) - len(text) // HELD_OUT_SHARE
    return Text(name, text[:split], text[split:])


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
