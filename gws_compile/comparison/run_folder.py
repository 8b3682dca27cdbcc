"""The runs of a comparison on disk, a file each: what makes it resumable, and lets several processes share it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .compared_settings import ComparedSetting, ComparisonError

FORMAT = 1
"""Raised when files of runs change their meaning."""


class RunFolder:
    """A folder with a file for each run, written whole or not at all.

    Args:
        path: the folder; made if it is not there.
        identity: what else decides what all runs compute, such as the training function and its arguments.

    Raises:
        ComparisonError: its runs are of another comparison; the message names what differs.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._runs = path / "runs"
        self._runs.mkdir(parents=True, exist_ok=True)
        self._hold_to({"format": FORMAT, **identity})

    def file(self, setting: ComparedSetting, seed: int, ending: str = "json") -> Path:
        """Where a run of a setting lies, or what belongs to it."""
        words = re.sub(r"[^A-Za-z0-9.=]+", "-", setting.name).strip("-")[:80]
        # Names that differ in other characters alone, or are long, are told apart by their hashes.
        mark = hashlib.sha256(setting.name.encode()).hexdigest()[:8]
        return self._runs / f"{words}-{mark}-seed-{seed}.{ending}"

    def read(self, setting: ComparedSetting, seed: int, needed: Sequence[str] = ()) -> dict[str, Any] | None:
        """A finished run; None where there is none, it failed, or lacks one of the casts that are needed.

        Raises:
            ComparisonError: it was made with other arguments than the setting has now.
        """
        file = self.file(setting, seed)
        if not file.exists():
            return None
        run: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if run.get("failed"):
            return None
        if run["arguments"] != setting.text:
            raise ComparisonError(
                f"{self.path} has runs of {setting.name!r} with other arguments ({run['arguments']}, now "
                f"{setting.text}): give the setting another name, or the comparison another folder"
            )
        if any(label not in run.get("casts", {}) for label in needed):
            return None
        return run

    def make(
        self,
        setting: ComparedSetting,
        seed: int,
        needed: Sequence[str],
        run: Callable[[], Mapping[str, Any]],
    ) -> dict[str, Any] | None:
        """Make a run and write it, unless another process is making it or has made it just now.

        Returns:
            The run; None where another process is at it.
        """
        lock = FileLock(self.file(setting, seed, "lock"), timeout=0)
        try:
            with lock:
                known = self.read(setting, seed, needed)
                if known is not None:
                    return known
                made: dict[str, Any] = {
                    "setting": setting.name,
                    "method": setting.method,
                    "arguments": setting.text,
                    "seed": seed,
                }
                made = _finite({**made, **run()})  # as it will be read
                self.write_json(self.file(setting, seed), made)
                return made
        except Timeout:
            return None

    def write_json(self, file: Path, content: Mapping[str, Any]) -> None:
        """Write a file at once, so that no reader sees a part; numbers that are none become null."""
        temporary = file.with_name(f"{file.name}.{os.getpid()}.part")
        temporary.write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)

    def _hold_to(self, identity: Mapping[str, Any]) -> None:
        file = self._runs / "identity.json"
        now = json.loads(json.dumps(identity))
        if not file.exists() or not any(self._runs.glob("*-seed-*[0-9].json")):  # no run has ended yet
            self.write_json(file, identity)
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        for key in sorted(now.keys() | before.keys()):
            if now.get(key) != before.get(key):
                raise ComparisonError(
                    f"{self.path} has runs of another comparison, with {key} = {before.get(key)!r}, now "
                    f"{now.get(key)!r}: give another folder"
                )


def digest_of(file: str | Path | None) -> str:
    """Of a file's content, for what runs have in common; empty where there is no file."""
    if file is None or not Path(file).is_file():
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _finite(value: Any) -> Any:
    """For JSON, which has no NaN: null in its place."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
