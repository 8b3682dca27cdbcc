"""One run under ``gws run``: what stands in for torch's functions, in the process and in those that it spawns."""

from __future__ import annotations

import functools
import multiprocessing.spawn
import multiprocessing.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .auto_compile import AutoCompile
from .named_backend import named_backend
from .run_report import RunReport
from .torch_compile_patch import CompileCalls, TorchCompilePatch


@dataclass(frozen=True)
class RunOptions:
    """What a run is asked for, beside the settings, which are in the environment.

    Attributes:
        script: what is run.
        auto: compile what the script does not.
        file: takes the report.
    """

    script: str
    auto: bool = False
    file: str | None = None


class RunSession:
    """Stands in for torch.compile, with ``--auto`` for module calls, between `start` and `stop`.

    Args:
        options: of the run.

    Attributes:
        report: what is said at the end.

    Raises:
        ValueError: a bad setting in the environment.
    """

    def __init__(self, options: RunOptions) -> None:
        self._options = options
        calls = CompileCalls()
        self._patch = TorchCompilePatch(named_backend(), calls)
        self._auto = AutoCompile(self._patch) if options.auto else None
        self._preparation: Callable[..., dict[str, Any]] = multiprocessing.spawn.get_preparation_data
        self.report = RunReport(calls, script=options.script, auto=options.auto, file=options.file)

    def start(self) -> None:
        """Put everything in place."""
        self._patch.install()
        if self._auto is not None:
            self._auto.install()
        # A spawned process is a fresh interpreter. What it is given to prepare itself holds the message that starts a
        # session there as well, before it imports the script.
        preparation = self._preparation = multiprocessing.spawn.get_preparation_data
        message = _InSpawnedProcess(self._options)

        @functools.wraps(preparation)
        def get_preparation_data(name: str) -> dict[str, Any]:
            return {"gws_compile": message, **preparation(name)}

        multiprocessing.spawn.get_preparation_data = get_preparation_data
        multiprocessing.util.register_after_fork(self.report, _report_of_process)

    def stop(self) -> None:
        """Put torch's functions back; what has been compiled stays so."""
        multiprocessing.spawn.get_preparation_data = self._preparation
        if self._auto is not None:
            self._auto.remove()
        self._patch.remove()


class _InSpawnedProcess:
    """Starts a session where it is unpickled."""

    def __init__(self, options: RunOptions) -> None:
        self._options = options

    def __reduce__(self) -> tuple[Callable[[RunOptions], None], tuple[RunOptions]]:
        return _start_in_spawned_process, (self._options,)


def _start_in_spawned_process(options: RunOptions) -> None:
    session = RunSession(options)
    session.start()
    _report_of_process(session.report)


def _report_of_process(report: RunReport) -> None:
    """Have a process that multiprocessing has started or forked tell of itself: it ends without atexit."""
    report.begin_process()
    multiprocessing.util.Finalize(None, report.finish_process, exitpriority=0)
