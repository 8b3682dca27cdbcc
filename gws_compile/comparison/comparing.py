"""Making the runs of a comparison: `compare`."""

from __future__ import annotations

import functools
import inspect
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tqdm import tqdm

from ..config import Config
from .compared_settings import (
    DEFAULT_METHODS,
    PLAIN,
    ComparedSetting,
    ComparisonError,
    names_chosen,
    own_settings,
    usual_settings,
)
from .run_folder import RunFolder, digest_of
from .summary import Comparison, summarize
from .training import TrainingFunction, TrainingFunctionError, train_and_measure

DEFAULT_FORMATS = ("fp8_e4m3", "fp6_e3m2", "fp4_e2m1", "nvfp4", "int4", "int3")
DEFAULT_SEEDS = 3
DEFAULT_FOLDER = "out/compare"

_WAIT_SECONDS = 2.0

Run = Callable[[ComparedSetting, int], Mapping[str, Any]]
"""Makes a run of a setting and a seed."""


def compare(
    train: TrainingFunction,
    *,
    fmts: Iterable[str] = DEFAULT_FORMATS,
    methods: Iterable[str] = DEFAULT_METHODS,
    recipes: Iterable[str] = (),
    settings: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    presets: Iterable[str] | None = None,
    seeds: int | Iterable[int] = DEFAULT_SEEDS,
    training: Mapping[str, Any] = MappingProxyType({}),
    common: Mapping[str, Any] = MappingProxyType({}),
    out: str | Path = DEFAULT_FOLDER,
    progress: bool = True,
) -> Comparison:
    """Train the same model from the same seeds under several settings, and compare what comes of it.

    Plain training is always among the settings. Each run's figures go to a file of their own when it ends, and a run
    that has one is not repeated: a comparison that was stopped goes on where it was, and several processes may work on
    one at the same time.

    Args:
        train: ``train(backend, seed, **training) -> (model, evaluate)``. It seeds torch with ``seed``, builds a model,
            compiles it with ``backend`` (whatever the setting is, plain training too), trains it, and returns the model
            with a function of nothing that calls it on held-out data and gives a mean loss. That function must not
            disable gradients. A third value may hold further numbers by name, such as ``{"tokens": ...}``. With learned
            widths it also gives ``backend.parameters()`` to its optimizer and adds ``backend.bit_loss()`` to the loss.
            A function of a module: what one closes over, but for numbers and texts, does not tell its runs apart.
        fmts: formats to train for, as ``fmt`` of `gws_compile.backend`.
        methods: how: ``"cast-afterwards"`` (plain training, whose weights are cast at the end), ``"straight-through"``,
            ``"rounded-normal"``, ``"uniform"``, ``"no-master"``, ``"learned"`` (widths with the format's on average).
        recipes: also trained with, as ``recipe`` of `gws_compile.backend`.
        settings: also trained with: arguments of `gws_compile.backend` by the name of the setting; the key
            ``"training"`` has arguments for ``train``. One with that key alone is plain training.
        presets: formats that the weights of every run are cast to at the end; ``fmts`` when None, and then runs are not
            made again for a format that is added later.
        seeds: how many, from 0, or which.
        training: arguments for ``train``, in all settings.
        common: arguments of `gws_compile.backend` in all settings, such as ``{"exclude": [...]}``.
        out: folder of the runs; also gets ``comparison.json`` and ``comparison.md``.
        progress: show a bar.

    Returns:
        The rows, with tables and plots.

    Raises:
        ComparisonError: a bad setting, or runs of another comparison in the folder; a ValueError.
        TrainingFunctionError: ``train`` returned something else; a TypeError. What ``train`` itself raises under plain
            training comes out; under other settings the run counts as failed, and the others go on.
    """
    fmts = list(fmts)
    made = listed(fmts, methods, recipes, settings, common)
    grids = {one.grid: one.config for one in made if one.grid and one.method != PLAIN}
    wanted = _presets(fmts if presets is None else list(presets), common)
    folder = RunFolder(Path(out), _identity(train, training))

    def casts_of(setting: ComparedSetting) -> dict[str, Config]:
        own = grids if setting.method == PLAIN else {setting.grid: setting.config} if setting.grid else {}
        return {**wanted, **own}

    def run(setting: ComparedSetting, seed: int) -> Mapping[str, Any]:
        arguments = {**training, **setting.training}
        return train_and_measure(train, setting, seed, casts_of(setting), arguments) | _described(setting)

    trained = [one for one in made if one.method != "cast-afterwards"]

    def needed(setting: ComparedSetting) -> list[str]:
        # Only plain training must have them all: it stands for the casts afterwards.
        return list(casts_of(setting)) if presets is not None or setting.method == PLAIN else []

    runs = make_runs(trained, seeds_of(seeds), folder, run, needed, progress=progress)
    return write(folder, summarize(made, runs, list(wanted)))


def listed(
    fmts: Iterable[str],
    methods: Iterable[str],
    recipes: Iterable[str],
    settings: Mapping[str, Mapping[str, Any]],
    common: Mapping[str, Any],
) -> list[ComparedSetting]:
    """The settings of a comparison, plain training first.

    Raises:
        ComparisonError: a bad one, or two of one name.
    """
    if unfit := [name for name in ("seed", "noise") if name in common]:
        raise ComparisonError(f"common: {unfit[0]} is not the same in all settings; accepted are the other arguments")
    made = [*usual_settings(fmts, methods, recipes, common), *own_settings(settings, common)]
    names = [one.name for one in made]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ComparisonError(f"two settings have the name {twice[0]!r}: give one of them another")
    return made


def seeds_of(seeds: int | Iterable[int]) -> list[int]:
    """The seeds.

    Raises:
        ComparisonError: none, or no ints.
    """
    found = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not found or not all(isinstance(seed, int) and seed >= 0 for seed in found) or len(set(found)) < len(found):
        raise ComparisonError(f"seeds must be how many, 1 or more, or different ints of 0 or more, got {seeds!r}")
    return found


def make_runs(
    settings: Sequence[ComparedSetting],
    seeds: Sequence[int],
    folder: RunFolder,
    run: Run,
    casts_of: Callable[[ComparedSetting], Sequence[str]],
    *,
    progress: bool,
) -> list[Mapping[str, Any]]:
    """Make what is not made yet, setting by setting; wait for what other processes are making.

    Args:
        settings: what is trained with.
        seeds: of each.
        folder: takes the runs.
        run: makes one.
        casts_of: labels of the casts that a setting's run must have.
        progress: show a bar.

    Returns:
        All runs, those that failed too.
    """
    waiting = [(setting, seed) for setting in settings for seed in seeds]
    made: dict[tuple[str, int], Mapping[str, Any]] = {}
    for setting, seed in waiting:  # all of them first: what is wrong with the folder is said before anything is trained
        known = folder.read(setting, seed, casts_of(setting))
        if known is not None:
            made[setting.name, seed] = known
    with tqdm(total=len(waiting), initial=len(made), unit="run", disable=not progress) as bar:
        waiting = [(setting, seed) for setting, seed in waiting if (setting.name, seed) not in made]
        while waiting:
            busy = []
            for setting, seed in waiting:
                bar.set_description(f"{setting.name}, seed {seed}")
                one = folder.make(setting, seed, casts_of(setting), lambda s=setting, n=seed: _guarded(run, s, n))  # type: ignore[misc]
                if one is None:
                    busy.append((setting, seed))
                else:
                    made[setting.name, seed] = one
                    bar.update()
            waiting = busy
            if waiting:
                bar.set_description("waiting for another process")
                time.sleep(_WAIT_SECONDS)
    return [made[setting.name, seed] for setting in settings for seed in seeds]


def write(folder: RunFolder, comparison: Comparison) -> Comparison:
    """Write the tables and the JSON of a comparison."""
    folder.write_json(folder.path / "comparison.json", comparison.to_dict())
    (folder.path / "comparison.md").write_text(f"{comparison}\n", encoding="utf-8")
    return comparison


def _guarded(run: Run, setting: ComparedSetting, seed: int) -> Mapping[str, Any]:
    """A run; one that raises is a run that failed, unless the plain one does, without which there is nothing."""
    try:
        return run(setting, seed)
    except TrainingFunctionError:
        raise
    except Exception as error:
        if setting.name == PLAIN:
            raise
        traceback.print_exc(file=sys.stderr)
        return {"failed": f"{type(error).__name__}: {error}"}


def _presets(presets: Sequence[str], common: Mapping[str, Any]) -> dict[str, Config]:
    """Settings of the casts to the presets by the labels of their grids."""
    chosen = names_chosen(common)
    found = {}
    for preset in presets:
        setting = ComparedSetting(f"preset {preset}", "", {**chosen, "fmt": preset, "noise": "none"}, common=chosen)
        found[setting.grid] = setting.config
    return found


def _described(setting: ComparedSetting) -> dict[str, Any]:
    """What else is known of a run: its format as `gws_compile.ScalingLaw.fit` takes it, and versions."""
    weights = setting.config.weights
    rows, columns = weights.block
    fmt, block = weights.name, None if rows is None or columns is None else [rows, columns]
    if weights.learned:
        fmt = "learned"
    elif rows is None or (columns is None and rows != 1):
        fmt += f", {weights.block_text}"  # which the law is not about
    elif columns is None:
        block = "channel"  # type: ignore[assignment]
    return {
        "fmt": None if setting.method == PLAIN else fmt,
        "block": block,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _identity(train: TrainingFunction, training: Mapping[str, Any]) -> dict[str, Any]:
    """What all runs of a comparison have in common: runs of another function are not mixed with these."""
    bound: dict[str, Any] = {}
    while isinstance(train, functools.partial):
        bound = {**{f"argument {n}": one for n, one in enumerate(train.args)}, **train.keywords, **bound}
        train = train.func
    code = getattr(train, "__code__", None)
    names = code.co_freevars if code is not None else ()
    for name, cell in zip(names, getattr(train, "__closure__", None) or (), strict=False):
        if isinstance(cell.cell_contents, (bool, int, float, str, tuple, type(None))):
            bound[name] = cell.cell_contents
    return {
        "of": f"{getattr(train, '__module__', '')}.{getattr(train, '__qualname__', type(train).__name__)}",
        "bound": {name: repr(value) for name, value in bound.items()},
        "training": {name: repr(value) for name, value in training.items()},
        "source": digest_of(_source(train)),
    }


def _source(train: TrainingFunction) -> str | None:
    """The file that has the training function."""
    try:
        return inspect.getsourcefile(inspect.unwrap(train))
    except TypeError:  # made by a call
        return None
