"""A file that carries the draws of a script's backends from run to run: `StateFile`, for ``gws run --state``."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from ..compiler.backend import Backend

KEY = "gws_run_backends"
"""Under which the file has the states."""


class StateFile:
    """The states of a run's backends, in the order in which the script first uses them.

    All ranks read the file, and one writes it: the state is the same on every rank.

    Args:
        path: of the file, which need not exist.

    Raises:
        ValueError: it is there, and it is no file of this kind.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._states = _read(self.path)
        self._backends: list[Backend] = []
        self._begun: list[int] = []

    def give(self, backend: Backend) -> None:
        """Have a backend that nothing has been compiled with yet go on where that of the last run has ended.

        Raises:
            ValueError: the state is of other settings; the message says which.
        """
        if any(backend is known for known in self._backends):
            return
        place = len(self._backends)
        if place < len(self._states):
            try:
                backend.load_state_dict(self._states[place])
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}") from None
        self._backends.append(backend)
        self._begun.append(backend.draw)

    def begin_process(self) -> None:
        """In a process that has been forked: what it has to write is what it draws itself."""
        self._begun = [backend.draw for backend in self._backends]

    def write(self) -> None:
        """Write the states, all of the file or nothing, if there have been new draws in this process."""
        if [backend.draw for backend in self._backends] == self._begun:
            return
        states = [backend.state_dict() for backend in self._backends]
        rest = self._states[len(states) :]  # of backends that this run has not come to
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            torch.save({KEY: [*states, *rest]}, beside)
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)
        self._begun = [backend.draw for backend in self._backends]


def _read(path: Path) -> list[Any]:
    if not path.exists():
        return []
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a state of gws run: {reason}") from None
    states = content.get(KEY) if isinstance(content, dict) else None
    if not isinstance(states, list):
        raise ValueError(f"{path} is no state of gws run: it was written by something else")
    return states
