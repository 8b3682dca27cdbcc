"""Whether a case fails, what a failure says, and the cases that failed, made small."""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from .case import Case, source
from .compare import Mismatch
from .script import run
from .shrink import shrink


@dataclass(frozen=True)
class Failure:
    """A case that fails.

    Attributes:
        case: which.
        what: what kind of failure: what differs, or the type of the exception and where it comes from.
        text: the message.
    """

    case: Case
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.text}\n\n{reproduction(self.case)}"


def failure_of(case: Case, runs: Callable[[Case], None] = run) -> Failure | None:
    """Run a case; None where it is right."""
    try:
        runs(case)
    except Mismatch as error:
        return Failure(case, error.what, str(error))
    except Exception as error:
        # Dynamo tells what it raises for in the type alone, with the cause in the first line.
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(case, f"{type(error).__name__} in {last.name}", "".join(traceback.format_exception(error)[-6:]))
    return None


def smallest_failure(case: Case, runs: Callable[[Case], None] = run) -> Failure | None:
    """Run a case; where it fails, the smallest one that fails alike."""
    failure = failure_of(case, runs)
    if failure is None:
        return None

    def fails_alike(smaller: Case) -> bool:
        found = failure_of(smaller, runs)
        return found is not None and found.what == failure.what

    return failure_of(shrink(case, fails_alike), runs) or failure


def reproduction(case: Case) -> str:
    """A Python program that runs the case, from the root of the repository."""
    names = "Assign, Case, Evaluate, Learned, Part, Replace, Resume, SetData, Settings, Train"
    imports = f"from tests.fuzz.case import {names}\nfrom tests.fuzz.script import run\n"
    return f"{imports}\nrun(\n{textwrap.indent(source(case), '    ')}\n)\n"
