"""What the tests say on each version of torch: keeps the results of a run, and writes docs/torch-versions.md.

`make test-torch TORCH=2.15.0` calls it behind a run of the tests. A run of the same tests, torch and Python takes the
place of the one before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import torch
from tabulate import tabulate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "torch-versions.json"
PAGE = ROOT / "docs" / "torch-versions.md"
DEFAULT_SUITE = "the default suite"

_HEAD = """# Versions of torch

Written by `make test-torch TORCH=...`, which runs the tests in an environment of its own with that torch, from the
results in [benchmarks/results/torch-versions.json](../benchmarks/results/torch-versions.json). All runs are on a CPU;
"+cu" is a build with CUDA, on a machine without a GPU.

"""


@dataclass(frozen=True)
class Run:
    """One run of the tests.

    Attributes:
        torch: its version.
        python: its version.
        tests: what was run: the default suite, or pytest's arguments.
        date: of the run, as 2026-01-31.
        passed: how many tests passed.
        failed: those that failed, by their names.
        skipped: the reasons, and how many tests each left out.
        again: of the passed ones, those that failed at first and were run once more.
    """

    torch: str
    python: str
    tests: str
    date: str
    passed: int
    failed: tuple[str, ...]
    skipped: dict[str, int]
    again: tuple[str, ...] = ()

    def key(self) -> tuple[tuple[int, ...], str, str]:
        """What tells runs apart, and their order."""
        numbers = tuple(int(part) for part in self.torch.partition("+")[0].split(".") if part.isdigit())
        return numbers, self.python, self.tests


def read_run(results: Path, tests: str) -> Run:
    """A run of this process's torch and Python, from pytest's JUnit file."""
    passed, failed, skipped = 0, [], Counter[str]()
    for case in ElementTree.parse(results).iter("testcase"):
        skip = case.find("skipped")
        if skip is not None:
            skipped[str(skip.get("message"))] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            failed.append(_name(case))
        else:
            passed += 1
    return Run(
        torch=torch.__version__,
        python=platform.python_version(),
        tests=tests,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        passed=passed,
        failed=tuple(sorted(failed)),
        skipped=dict(sorted(skipped.items())),
    )


def run_again(run: Run, results: Path) -> Run:
    """The run, where some of the tests that failed ran once more (``pytest --last-failed``) and passed."""
    cases = list(ElementTree.parse(results).iter("testcase"))
    passed = {_name(case) for case in cases if not len(case)}
    mended = tuple(name for name in run.failed if name in passed)
    left = tuple(name for name in run.failed if name not in passed)
    return replace(run, passed=run.passed + len(mended), failed=left, again=mended)


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}.{case.get('name')}"


def read_kept(path: Path = RESULTS) -> list[Run]:
    """The runs that are kept."""
    if not path.exists():
        return []
    names = ("failed", "again")
    return [Run(**{**run, **{n: tuple(run.get(n, ())) for n in names}}) for run in json.loads(path.read_text())]


def page(runs: Sequence[Run]) -> str:
    """The page of these runs."""
    rows = [
        [run.torch, run.python, run.tests, run.date, run.passed, len(run.failed), sum(run.skipped.values())]
        for run in sorted(runs, key=Run.key, reverse=True)
    ]
    table = tabulate(rows, ["torch", "Python", "tests", "date", "passed", "failed", "skipped"], tablefmt="github")
    parts = [_HEAD, table, "\n"]
    for run in sorted(runs, key=Run.key, reverse=True):
        if not (run.failed or run.skipped or run.again):
            continue
        parts += [f"\n## {run.torch}, Python {run.python}: {run.tests}\n\n"]
        parts += [f"- failed: `{name}`\n" for name in run.failed]
        parts += [f"- passed when it ran once more: `{name}`\n" for name in run.again]
        parts += [f"- {count} skipped: {reason}\n" for reason, count in run.skipped.items()]
    return "".join(parts)


def keep(run: Run, path: Path = RESULTS, to: Path = PAGE) -> None:
    """Keep a run, and write the page."""
    runs = sorted([*(kept for kept in read_kept(path) if kept.key() != run.key()), run], key=Run.key)
    path.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    to.write_text(page(runs))


def main() -> None:
    """Read a run and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="pytest's JUnit file")
    parser.add_argument("tests", nargs="*", help="what pytest was given; the default suite without")
    parser.add_argument("--again", type=Path, help="JUnit file of a second run, of the tests that failed")
    given, others = parser.parse_known_args()
    run = read_run(given.results, " ".join([*given.tests, *others]) or DEFAULT_SUITE)
    if given.again:
        run = run_again(run, given.again)
    keep(run)
    print(f"torch {run.torch}: {run.passed} passed, {len(run.failed)} failed, {sum(run.skipped.values())} skipped")


if __name__ == "__main__":
    main()
