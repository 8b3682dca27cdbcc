"""One run under ``gws run``: what stands in for torch's functions, in the process and in those that it spawns."""

from __future__ import annotations

import functools
import multiprocessing.spawn
import multiprocessing.util
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ..compiler.backend import Backend
from ..compiler.cast_afterwards import CastAfterwards
from .auto_compile import AutoCompile
from .named_backend import named_backend
from .run_report import Ending, RunReport
from .state_file import StateFile
from .torch_compile_patch import CompileCalls, TorchCompilePatch


@dataclass(frozen=True)
class RunOptions:
    """What a run is asked for, beside the settings, which are in the environment.

    Attributes:
        script: what is run.
        auto: compile what the script does not.
        file: takes the report.
        state: the file that carries the draws from run to run.
        cast_afterwards: training stays as it is, see `gws_compile.compiler.cast_afterwards.CastAfterwards`.
    """

    script: str
    auto: bool = False
    file: str | None = None
    state: str | None = None
    cast_afterwards: bool = False


class RunSession:
    """Stands in for torch.compile, with ``--auto`` for module calls, between `start` and `stop`.

    Args:
        options: of the run.

    Attributes:
        calls: the calls of torch.compile.

    Raises:
        ValueError: a bad setting in the environment; or the file of the state is none, or one of other settings.
    """

    def __init__(self, options: RunOptions) -> None:
        self._options = options
        self._process = os.getpid()
        self.calls = calls = CompileCalls()
        backend = named_backend(kind=CastAfterwards if options.cast_afterwards else Backend)
        self._state = None if options.state is None else StateFile(options.state)
        if self._state is not None:
            self._state.give(backend)
        self._patch = TorchCompilePatch(backend, calls, self._meet)
        self._auto = AutoCompile(self._patch) if options.auto else None
        self._preparation: Callable[..., dict[str, Any]] = multiprocessing.spawn.get_preparation_data
        self._report = RunReport(
            calls,
            script=options.script,
            auto=options.auto,
            file=options.file,
            trains_plain=options.cast_afterwards,
        )

    def _meet(self, backend: Backend) -> None:
        if self._state is not None:
            self._state.give(backend)

    def start(self) -> None:
        """Put everything in place."""
        self._patch.install()
        if self._auto is not None:
            self._auto.install()
        if self._state is not None:
            _before_sigterm(self._write_state)
        # A spawned process is a fresh interpreter. What it is given to prepare itself holds the message that starts a
        # session there as well, before it imports the script.
        preparation = self._preparation = multiprocessing.spawn.get_preparation_data
        message = _InSpawnedProcess(self._options)

        @functools.wraps(preparation)
        def get_preparation_data(name: str) -> dict[str, Any]:
            return {"gws_compile": message, **preparation(name)}

        multiprocessing.spawn.get_preparation_data = get_preparation_data
        multiprocessing.util.register_after_fork(self, RunSession.begin_process)

    def stop(self) -> None:
        """Put torch's functions back; what has been compiled stays so."""
        multiprocessing.spawn.get_preparation_data = self._preparation
        if self._auto is not None:
            self._auto.remove()
        self._patch.remove()

    def ended_by(self, error: BaseException | None) -> None:
        """Note what the script has raised, for `finish`."""
        self._report.ending = Ending.by(error)

    def finish(self) -> None:
        """What comes behind the script, in the process that was started: its state, and the report."""
        if os.getpid() == self._process:  # not in one that the script has forked by itself
            self._write_state()
            self._report.finish()

    def begin_process(self) -> None:
        """Have a process that multiprocessing has started or forked do likewise: it ends without atexit."""
        self._report.begin_process()
        if self._state is not None:
            self._state.begin_process()
        multiprocessing.util.Finalize(None, self._finish_process, exitpriority=0)

    def _finish_process(self) -> None:
        self.ended_by(sys.exception())  # multiprocessing finishes before it says what the process has raised
        self._write_state()
        self._report.finish_process()

    def _write_state(self) -> None:
        if self._state is None or not self._patch.calls.is_first_rank():
            return
        try:
            self._state.write()
        except (OSError, RuntimeError) as error:  # torch.save raises the second
            sys.stderr.write(f"gws run: the state could not be written to {self._state.path}: {error}\n")


def _before_sigterm(act: Callable[[], None]) -> None:
    """Call a function before SIGTERM ends the process, as it would without; a script's own handler takes its place."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return
    process = os.getpid()

    def handler(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:  # not in the workers that it forks
            act()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, handler)


class _InSpawnedProcess:
    """Starts a session where it is unpickled."""

    def __init__(self, options: RunOptions) -> None:
        self._options = options

    def __reduce__(self) -> tuple[Callable[[RunOptions], None], tuple[RunOptions]]:
        return _start_in_spawned_process, (self._options,)


def _start_in_spawned_process(options: RunOptions) -> None:
    session = RunSession(options)
    session.start()
    session.begin_process()
