"""Runs of an unmodified script for a comparison: `ComparedScript`, a ``gws run`` for each."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..comparison.compared_settings import PLAIN, ComparedSetting
from ..comparison.run_folder import RunFolder, digest_of
from ..comparison.training import sizes_of
from ..numerics.formats import FloatFormat
from ..numerics.integers import IntFormat
from ..warning import GwsWarning
from .compared_settings_file import TRAINING
from .options import UsageError
from .settings_text import CONFIG_VARIABLE, NAMES, variable

ARGUMENTS = "arguments"
"""The key of a setting's training with further arguments of the script."""

SEED = "{seed}"
"""What stands for the seed in a script's arguments."""

_NUMBER = r"[\"'\s:=]{1,12}([-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|[-+]?inf)(?!\w)"
HELD_OUT_LOSS = rf"(?<![a-z])(?:eval|val|valid|validation|test|held[-_ ]?out)[-_ ]?loss{_NUMBER}"
ANY_LOSS = rf"loss{_NUMBER}"
"""What is read where nothing else is asked for: the last held-out loss in the output, else the last loss."""


class NoLossError(RuntimeError):
    """A run ended without saying a loss, or did not end well; the message says where its output is."""


@dataclass(frozen=True)
class ComparedScript:
    """A script that is run under several settings.

    Attributes:
        script: the program, or the name of a module.
        arguments: its own; ``{seed}`` in them stands for the seed.
        module: it is a module.
        auto: compile what it does not, as ``gws run --auto``.
        loss: a regular expression with one group, the loss; the last match in the output counts. The usual ways to say
            a held-out loss when None.
    """

    script: str
    arguments: tuple[str, ...] = ()
    module: bool = False
    auto: bool = False
    loss: str | None = None

    def __post_init__(self) -> None:
        if self.loss is not None:
            try:
                groups = re.compile(self.loss).groups
            except re.error as error:
                raise UsageError(f"--loss {self.loss}: no regular expression: {error}") from None
            if groups != 1:
                raise UsageError(f"--loss {self.loss}: it must have one group, which is the loss, and has {groups}")
        if not self.module and not Path(self.script).is_file():
            raise UsageError(f"can't open file {self.script!r}: there is no such file")
        if self.module and _origin(self.script) is None:
            raise UsageError(f"no module named {self.script!r}, looked for in {Path.cwd()} too")

    @property
    def identity(self) -> dict[str, Any]:
        """What runs must have in common."""
        return {
            "of": self.script,
            "training": list(self.arguments),
            "auto": self.auto,
            "loss": self.loss or "",
            "source": digest_of(_origin(self.script) if self.module else self.script),
        }

    def run(self, setting: ComparedSetting, seed: int, folder: RunFolder) -> dict[str, Any]:
        """Run the script once, and read the loss from what it prints.

        Raises:
            NoLossError: it failed, said no loss, or none of its weights was cast.
        """
        log, report = folder.file(setting, seed, "log"), folder.file(setting, seed, "report.json").absolute()
        settings = folder.file(setting, seed, "toml").absolute()
        settings.write_text(as_toml({**setting.arguments, "seed": seed}), encoding="utf-8")
        report.unlink(missing_ok=True)
        start = time.perf_counter()
        with log.open("w", encoding="utf-8") as output:
            code = subprocess.run(
                self._command(setting, seed, report),
                env={**_without_settings(), CONFIG_VARIABLE: str(settings)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        seconds = time.perf_counter() - start
        text = log.read_text(encoding="utf-8", errors="replace")
        if code:
            raise NoLossError(f"the script ended with exit code {code}; its output is {log}: {_last_line(text)}")
        return {"deployed": self._loss_in(text, log), "seconds": seconds, **_told_by(report, setting, auto=self.auto)}

    def _command(self, setting: ComparedSetting, seed: int, report: Path) -> list[str]:
        further = setting.training.get(ARGUMENTS, [])
        arguments = [one.replace(SEED, str(seed)) for one in (*self.arguments, *further)]
        mode = ["--plain"] if setting.method == PLAIN else ["--report", str(report)]
        if setting.method == "cast-afterwards":
            mode.append("--cast-afterwards")
        if self.auto and setting.method != PLAIN:
            mode.append("--auto")
        if self.module:
            mode.append("-m")
        return [
            *(sys.executable, "-m", "gws_compile", "run", "--random-seed", str(seed)),
            *(*mode, self.script, *arguments),
        ]

    def _loss_in(self, text: str, log: Path) -> float:
        for pattern in (self.loss,) if self.loss is not None else (HELD_OUT_LOSS, ANY_LOSS):
            found = re.findall(pattern, text, re.IGNORECASE)
            if found:
                try:
                    return float(found[-1].replace(",", ""))
                except ValueError:
                    raise NoLossError(f"--loss {pattern} found {found[-1]!r} in {log}, which is no number") from None
        patterns = self.loss or f"{HELD_OUT_LOSS} and {ANY_LOSS}"
        raise NoLossError(f"no loss in {log}: {patterns} has no match; say with --loss how the script prints it")


def check_script_settings(settings: Sequence[ComparedSetting]) -> None:
    """Hold settings to what a script can be run with.

    Raises:
        UsageError: learned widths, or what is said of the training is something else than further arguments.
    """
    for setting in settings:
        if setting.config.learned is not None or setting.config.tables:
            raise UsageError(
                f"setting {setting.name!r}: learned widths and trained levels are parameters, which an optimizer of "
                "the script would have to be given: use a training function"
            )
        given = setting.training
        texts = given.get(ARGUMENTS, [])
        if set(given) - {ARGUMENTS} or not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            raise UsageError(
                f"setting {setting.name!r}: of a script, {TRAINING} is {{{ARGUMENTS} = [texts]}}, further arguments of "
                f"the script, got {dict(given)}"
            )


def warn_of_equal_seeds(runs: Sequence[Mapping[str, Any]]) -> None:
    """Say so where the seeds make no difference to plain training."""
    plain = [run["deployed"] for run in runs if run["method"] == PLAIN and not run.get("failed")]
    if len(plain) > 1 and len(set(plain)) == 1:
        warnings.warn(
            f"plain training ended with the same loss, {plain[0]}, under all {len(plain)} seeds: the script seeds its "
            "generators itself, so that intervals say nothing. Put {seed} into its arguments where it takes a seed",
            GwsWarning,
            stacklevel=2,
        )


def as_toml(arguments: Mapping[str, Any]) -> str:
    """Arguments of `gws_compile.backend` as a TOML file of settings."""
    return "".join(f"{name} = {_toml(value)}\n" for name, value in arguments.items() if value is not None)


def _toml(value: Any) -> str:
    if isinstance(value, (FloatFormat, IntFormat)):
        return json.dumps(value.name)
    if is_dataclass(value) and not isinstance(value, type):
        return _toml({one.name: given for one in fields(value) if (given := getattr(value, one.name)) != _default(one)})
    if isinstance(value, Mapping):
        pairs = (f"{name} = {_toml(one)}" for name, one in value.items() if one is not None)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if value is None:
        return '"all"'  # a side of a block
    return json.dumps(value)


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _without_settings() -> dict[str, str]:
    """The environment, without variables that would win over the settings that are compared."""
    ours = {CONFIG_VARIABLE, *map(variable, NAMES)}
    if set_ones := sorted(ours & os.environ.keys()):
        warnings.warn(f"{', '.join(set_ones)} has no effect on a comparison", GwsWarning, stacklevel=4)
    return {name: value for name, value in os.environ.items() if name not in ours}


def _told_by(report: Path, setting: ComparedSetting, *, auto: bool) -> dict[str, Any]:
    """Average width and bytes, from the report of ``gws run``."""
    if setting.method == PLAIN:
        return {"average_bits": None, "bytes": None}
    content = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {"weights": [], "graphs": []}
    cast = [one for one in content["weights"] if one["rewritten"]]
    how = "" if auto else "; with --auto its models are compiled as they are called"
    if all(graph["gradients"] for graph in content["graphs"]):
        raise NoLossError(
            "no compiled call had gradients disabled, so that the loss that it prints is not that of weights that are "
            "cast: it has to evaluate the model that it compiles, under torch.no_grad(). The Hugging Face Trainer with "
            f"torch_compile=True evaluates the one inside: leave that out{how}"
        )
    if not cast:
        raise NoLossError(f"no weight was cast, so this was ordinary training{how}")
    return sizes_of(cast)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("gws run:") or "error:" in line]
    return lines[-1].strip() if lines else "(no output)"


def _origin(module: str) -> str | None:
    """The file of a module, found as ``python -m`` finds it; that of its ``__main__`` where it is a package."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
    except ImportError:
        return None
    finally:
        sys.path[:] = before
    return None if spec is None else spec.origin
