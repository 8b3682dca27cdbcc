"""Runs that a law is fitted to: what a file says of them."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..numerics.formats import FloatFormat
from ..numerics.integers import IntFormat
from ..warning import GwsWarning
from .quantities import Block, check_block, positive

_METHODS = ("plain", "straight-through")
"""Of a comparison's runs those that the law is about."""

DEFAULT_BLOCK = 128
"""Elements to a scale, of a run that does not say it."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        params: N.
        tokens: D.
        loss: the last loss, in nats a token.
        fmt: what it was rounded to; None for no quantization.
        block: elements to a scale.
    """

    params: float
    tokens: float
    loss: float
    fmt: FloatFormat | None = None
    block: Block = DEFAULT_BLOCK


def read_runs(path: str | Path) -> list[Any]:
    """The runs of a JSON file: a list, or an object with ``runs``.

    Raises:
        ValueError: it holds neither, or is no JSON.
        OSError: it cannot be read.
    """
    try:
        return _listed(json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_runs(runs: Iterable[Run | dict[str, Any]] | dict[str, Any]) -> list[Run]:
    """Check runs, and leave out those that the law is not about, with a warning that counts them.

    Left out are runs in integer or unknown formats and in presets, and runs whose loss is not finite.

    Args:
        runs: as `gws_compile.ScalingLaw.fit` takes them. ``block`` is a number, ``"channel"``, or rows and columns of a
            block, which count as that many elements to a scale.

    Raises:
        ValueError: a run that lacks something, or has a value that is none.
    """
    listed = _listed(runs)
    kept, left = [], Counter[str]()
    for number, run in enumerate(listed):
        if isinstance(run, Run):
            run = {field.name: getattr(run, field.name) for field in fields(run)}
        if not isinstance(run, dict):
            raise ValueError(f"run {number} is {run!r}; accepted: an object with params, tokens, loss, fmt and block")
        reason = _left_out(run)
        if reason is None:
            kept.append(_checked(number, run))
        else:
            left[reason] += 1
    if left:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left.items())
        warnings.warn(
            f"{sum(left.values())} of {len(listed)} runs are left out of the fit: {reasons}", GwsWarning, stacklevel=4
        )
    return kept


def _listed(content: Any) -> list[Any]:
    if isinstance(content, dict):
        if "runs" not in content:
            raise ValueError("an object without the key 'runs'; accepted: a list of runs, or an object with 'runs'")
        content = content["runs"]
    if isinstance(content, str) or not isinstance(content, Iterable):
        raise ValueError(f"the runs are {content!r}; accepted: a list of objects")
    return list(content)


def _left_out(run: dict[str, Any]) -> str | None:
    """Why a run is none of the law's."""
    fmt, loss = run.get("fmt"), run.get("loss", 0.0)
    if loss is None:
        return "without a loss"
    if isinstance(loss, float) and not math.isfinite(loss):
        return f"with loss {loss}"
    if run.get("method") not in (None, *_METHODS):
        return "of other methods than a straight-through cast"
    if fmt is None or isinstance(fmt, FloatFormat):
        return None
    if isinstance(fmt, IntFormat) or (isinstance(fmt, str) and IntFormat.reads(fmt)):
        return f"in the integer format {fmt if isinstance(fmt, str) else fmt.name}"
    try:
        FloatFormat.parse(fmt)
    except ValueError:
        return f"in {fmt!r}, which is no float format"
    return None


def _checked(number: int, run: dict[str, Any]) -> Run:
    for key in ("params", "tokens", "loss"):
        if key not in run:
            raise ValueError(f"run {number} has no {key!r}; it has {', '.join(map(str, run)) or 'nothing'}")
    try:
        return Run(
            positive("params", run["params"]),
            positive("tokens", run["tokens"]),
            positive("loss", run["loss"]),
            None if run.get("fmt") is None else FloatFormat.parse(run["fmt"]),
            _block(run.get("block")),
        )
    except ValueError as error:
        raise ValueError(f"run {number}: {error}") from None


def _block(block: Any) -> Block:
    if block is None:
        return DEFAULT_BLOCK
    if isinstance(block, list | tuple) and len(block) == 2 and all(type(side) is int and side > 0 for side in block):
        return check_block(block[0] * block[1])
    return check_block(block)
