"""What a comparison found: rows over seeds, tables, JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .compared_settings import METHODS, PLAIN, ComparedSetting
from .intervals import Interval
from .plots import losses_figure, robustness_figure
from .rows import UNCAST, ComparedRow


@dataclass(frozen=True)
class Comparison:
    """The result of `gws_compile.compare`; ``print(comparison)`` shows its tables.

    Attributes:
        rows: a row for each setting.
        runs: every run, as in its file.
        presets: labels of the grids that the weights of every row were cast to.
    """

    rows: tuple[ComparedRow, ...]
    runs: tuple[Mapping[str, Any], ...]
    presets: tuple[str, ...]

    def __getitem__(self, name: str) -> ComparedRow:
        """The row of a setting.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; there are: {', '.join(row.name for row in self.rows)}")

    def table(self) -> str:
        """The losses in Markdown."""
        return _markdown(
            [
                (
                    row.name,
                    _text(row.trained, row),
                    _text(row.deployed, row),
                    _text(row.minus_plain, row, sign=True),
                    _text(row.minus_cast, row, sign=True),
                    "" if row.average_bits is None else f"{row.average_bits:.2f}",
                    "" if row.bytes is None else f"{row.bytes / 1024:,.0f}",
                    _remark(row),
                )
                for row in self.rows
            ],
            ("setting", "trained form", "deployed form", "- plain", "- cast afterwards", "average b", "KiB", "runs"),
        )

    def methods_table(self) -> str:
        """What each method costs for each format, in Markdown: the deployed loss less that of plain training.

        Empty where no format was trained for by any of the usual methods.
        """
        usual = {(row.grid, row.method): row for row in self.rows if row.method in METHODS and row.grid}
        methods = [method for method in METHODS if any(known == method for _, known in usual)]
        grids = list(dict.fromkeys(grid for grid, _ in usual))
        return _markdown(
            [(grid, *(_cost(usual.get((grid, method))) for method in methods)) for grid in grids],
            ("format", *(METHODS[method] for method in methods)),
        )

    def robustness_table(self) -> str:
        """What casting the weights of each row to each of the presets does to its loss, in Markdown.

        Each cell is the loss behind the cast less that of plain training without any, seed by seed.
        """
        return _markdown(
            [
                (row.name, *(_text(row.casts.get(label), row, sign=True) for label in (UNCAST, *self.presets)))
                for row in self.rows
                if row.casts
            ],
            ("weights of", UNCAST, *self.presets),
        )

    def figures_table(self) -> str:
        """The distance of the weights from their own grid, and the further numbers of the training function."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.figures))
        return _markdown(
            [
                (
                    row.name,
                    _text(row.distances.get(row.grid), row),
                    *(_significant(row.figures.get(name)) for name in names),
                )
                for row in self.rows
                if row.distances or row.figures
            ],
            ("setting", "distance from its grid", *names),
        )

    def to_dict(self) -> dict[str, Any]:
        """Rows and runs for JSON. `gws_compile.ScalingLaw.fit` reads the runs, where their figures have ``tokens``."""
        runs = [
            {**run, "loss": run.get("deployed"), "tokens": run.get("figures", {}).get("tokens")} for run in self.runs
        ]
        return {"presets": list(self.presets), "rows": [asdict(row) for row in self.rows], "runs": runs}

    def plot(self, folder: str | Path) -> list[Path]:
        """Draw ``losses.png`` (deployed loss by format and method) and ``robustness.png`` (loss by preset).

        Returns:
            The files.

        Raises:
            ImportError: matplotlib is missing.
        """
        made = {
            "losses.png": losses_figure(self.rows),
            "robustness.png": robustness_figure(self.rows, (UNCAST, *self.presets)),
        }
        files = []
        for name, figure in made.items():
            if figure is not None:
                files.append(Path(folder) / name)
                figure.savefig(files[-1], dpi=150)
        return files

    def __str__(self) -> str:
        parts = [self.table()]
        if any(row.method in METHODS and row.grid for row in self.rows):
            parts.append(f"Deployed loss less that of plain training:\n\n{self.methods_table()}")
        if any(row.casts for row in self.rows):
            parts.append(
                f"Loss of the weights cast to each preset, less that of plain training:\n\n{self.robustness_table()}"
            )
        if any(row.distances or row.figures for row in self.rows):
            parts.append(self.figures_table())
        parts.append("Means over seeds ± half of the 95 % interval (Student's t); differences are paired by seed.")
        return "\n\n".join(parts)

    __repr__ = __str__


def summarize(
    settings: Sequence[ComparedSetting], runs: Sequence[Mapping[str, Any]], presets: Sequence[str]
) -> Comparison:
    """Rows from runs.

    Args:
        settings: in the order of the rows.
        runs: as `RunFolder.read` gives them; those that failed have ``failed``, a message.
        presets: labels of the grids that all rows are measured on.
    """
    return Comparison(tuple(_rows(settings, runs, tuple(presets))), tuple(runs), tuple(presets))


def _rows(
    settings: Sequence[ComparedSetting], runs: Sequence[Mapping[str, Any]], presets: tuple[str, ...]
) -> Iterator[ComparedRow]:
    plain_of = {_key(one.training): one for one in reversed(settings) if one.method == PLAIN}
    # Of scripts casts are runs of their own.
    own_casts = {(one.grid, _key(one.training)): _of(one, runs) for one in settings if one.method == "cast-afterwards"}
    for setting in settings:
        base = plain_of.get(_key(setting.training)) or plain_of.get(_key({}))
        plain = {} if base is None else {r["seed"]: r for r in _of(base, runs)}
        from_plain = setting.method == "cast-afterwards" and not _of(setting, runs)
        mine = _of(base, runs) if from_plain and base is not None else _of(setting, runs)
        afterwards = {seed: _cast(run, setting.grid) for seed, run in plain.items()}
        afterwards |= {
            run["seed"]: run.get("deployed") for run in own_casts.get((setting.grid, _key(setting.training)), ())
        }
        yield _row(setting, mine, plain, afterwards, presets, from_plain=from_plain, is_base=setting is base)


def _row(
    setting: ComparedSetting,
    mine: Sequence[Mapping[str, Any]],
    plain: Mapping[int, Mapping[str, Any]],
    afterwards: Mapping[int, float | None],
    presets: tuple[str, ...],
    *,
    from_plain: bool,
    is_base: bool,
) -> ComparedRow:
    grid = "" if setting.method == PLAIN else setting.grid
    failed = tuple(f"seed {run['seed']}: {run['failed']}" for run in mine if run.get("failed"))
    ended = [run for run in mine if not run.get("failed")]
    # Of a cast afterwards the loss is that of the plain run, cast.
    deployed = {run["seed"]: _cast(run, grid) if from_plain else run.get("deployed") for run in ended}
    good = {seed: loss for seed, loss in deployed.items() if loss is not None}

    def minus(base: Mapping[int, float | None], losses: Mapping[int, float | None] = good) -> Interval | None:
        both = [(loss, base.get(seed)) for seed, loss in losses.items()]
        return Interval.of([loss - other for loss, other in both if loss is not None and other is not None])

    form = UNCAST if from_plain else "deployed"  # eager calls beside eager ones, compiled beside compiled ones
    of_plain = {seed: run.get(form) for seed, run in plain.items()}
    on_grid = {run["seed"]: _cast(run, grid) for run in ended} if setting.is_of_weights else {}
    if not any(loss is not None for loss in on_grid.values()):
        on_grid = good
    casts = {}
    for label in (UNCAST, *presets):
        pairs = [(_cast(run, label), (plain.get(run["seed"]) or {}).get(UNCAST)) for run in ended]
        found = Interval.of([loss - base for loss, base in pairs if loss is not None and base is not None])
        if found is not None and not from_plain:
            casts[label] = found
    widths = [run["average_bits"] for run in ended if run.get("average_bits") is not None]
    sizes = [run.get("cast_bytes", {}).get(grid) if from_plain else run.get("bytes") for run in ended]
    return ComparedRow(
        name=setting.name,
        method=setting.method,
        grid=grid,
        trained=None if from_plain else Interval.of([r["trained"] for r in ended if r.get("trained") is not None]),
        deployed=Interval.of(list(good.values())),
        minus_plain=None if is_base else minus(of_plain),
        minus_cast=minus(afterwards, on_grid) if grid and setting.method != "cast-afterwards" else None,
        casts=casts,
        distances=_means(ended, "distances"),
        average_bits=sum(widths) / len(widths) if widths else None,
        bytes=_mean([size for size in sizes if size is not None]),
        figures={} if from_plain else _means(ended, "figures"),
        seeds=len(good),
        diverged=len(ended) - len(good),
        failed=failed,
    )


def _of(setting: ComparedSetting, runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [run for run in runs if run["setting"] == setting.name]


def _cast(run: Mapping[str, Any], label: str) -> float | None:
    value = run.get(UNCAST) if label == UNCAST else run.get("casts", {}).get(label)
    return None if value is None else float(value)


def _means(runs: Sequence[Mapping[str, Any]], key: str) -> dict[str, Interval]:
    names = dict.fromkeys(name for run in runs for name in run.get(key, {}))
    found = {name: [run[key][name] for run in runs if run.get(key, {}).get(name) is not None] for name in names}
    return {name: interval for name, values in found.items() if (interval := Interval.of(values)) is not None}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _key(training: Mapping[str, Any]) -> str:
    return repr(sorted(training.items()))


def _remark(row: ComparedRow) -> str:
    parts = [str(row.seeds)]
    if row.diverged:
        parts.append(f"{row.diverged} diverged")
    if row.failed:
        parts.append(f"{len(row.failed)} failed")
    return ", ".join(parts)


def _text(value: Interval | None, row: ComparedRow, *, sign: bool = False) -> str:
    """An interval, and over how many seeds it is where these are fewer than the row has."""
    if value is None:
        return ""
    return value.text(sign=sign) + (f" ({value.count} seeds)" if value.count < row.seeds else "")


def _cost(row: ComparedRow | None) -> str:
    return "" if row is None else _text(row.minus_plain, row, sign=True)


def _significant(value: Interval | None) -> str:
    return "" if value is None else f"{value.mean:.4g}"


def _markdown(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
