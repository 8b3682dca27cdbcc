"""Writing a folder of safetensors: beside its place first, and renamed when all of it is there."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

_QUIET_SECONDS = 5
"""A write that is shorter shows no progress bar."""


def check_path(path: Path, *, file: bool = False) -> None:
    """Hold a place to write to.

    Args:
        path: of a folder.
        file: it is that of a file.

    Raises:
        FileExistsError: there is something already. FileNotFoundError: it would lie in no folder.
    """
    if path.is_dir() and not file and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        kind = "is a file" if not path.is_dir() else "is a folder" if file else "is there and is not empty"
        wanted = "the name of a file" if file else "a folder"
        raise FileExistsError(f"{path} {kind}: give export() {wanted} that does not exist yet, or remove this one")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path.absolute().parent}: there is no such folder to write {path.name} into")


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes its place at the end; it goes if that is not reached.

    A process that is killed leaves ``.NAME.partial-*`` beside the place, and nothing in it.
    """
    place = path.absolute()
    partial = Path(tempfile.mkdtemp(prefix=f".{place.name}.partial-", dir=place.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's are for their owner alone
        yield partial
        if place.is_dir():
            place.rmdir()  # empty, or this fails
        partial.rename(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, beside its place, as `whole_or_nothing` has it for a folder."""
    place = path.absolute()
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.partial-", dir=place.parent) as folder:
        partial = Path(folder) / place.name
        yield partial
        partial.replace(place)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, before it is made.

    Attributes:
        name: in the file.
        shape: of it.
        dtype: of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def shards_of(groups: Sequence[Sequence[StoredTensor]], largest: int) -> list[list[int]]:
    """Which groups of tensors go into which file: a file holds whole groups, in their order, up to so many bytes."""
    shards: list[list[int]] = [[]]
    filled = 0
    for number, group in enumerate(groups):
        size = sum(tensor.bytes for tensor in group)
        if shards[-1] and filled + size > largest:
            shards.append([])
            filled = 0
        shards[-1].append(number)
        filled += size
    return shards


def write_shards(
    folder: Path,
    groups: Sequence[Sequence[StoredTensor]],
    made: Iterable[Mapping[str, torch.Tensor]],
    check: Callable[[int, Callable[[str], torch.Tensor]], None],
    metadata: Callable[[], dict[str, str]],
    *,
    largest: int,
) -> tuple[str, ...]:
    """Write tensors in files as transformers names them, with an index where there are several; one file in memory.

    Args:
        folder: to write into.
        groups: what comes together, in the order of ``made``.
        made: the tensors of each group by name.
        check: called with a group's number and what reads one of its tensors from the file that was written.
        metadata: of a file whose groups have been made.
        largest: bytes of a file, where a group has not more.

    Returns:
        The files' names.
    """
    shards = shards_of(groups, largest)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    total = sum(tensor.bytes for group in groups for tensor in group)
    made = iter(made)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {folder.name}", delay=_QUIET_SECONDS) as bar:
        for file, numbers in zip(files, shards, strict=True):
            tensors: dict[str, torch.Tensor] = {}
            for number in numbers:
                tensors.update(next(made))
                bar.update(sum(tensor.bytes for tensor in groups[number]))
            save_file(tensors, folder / file, metadata=metadata())
            (folder / file).chmod(0o644)  # as the files beside it
            tensors.clear()
            with safe_open(folder / file, framework="pt") as written:
                for number in numbers:
                    check(number, written.get_tensor)
    if len(shards) > 1:
        where = {t.name: file for file, numbers in zip(files, shards, strict=True) for n in numbers for t in groups[n]}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / "model.safetensors.index.json", index)
        return (*files, "model.safetensors.index.json")
    return tuple(files)


def write_json(path: Path, content: object) -> None:
    """Write JSON as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
