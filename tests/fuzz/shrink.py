"""Makes a failing case small: fewer parts and actions, simpler values, as long as it still fails alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from .case import Case, Part, Settings, Train, changed
from .generate import valid

SIMPLE_PARTS = (Part("linear", "fc, no bias"), Part("linear", "fc"), Part("product", "linear"))
"""What a part is replaced by, from the simplest."""


def shrink(case: Case, fails: Callable[[Case], bool], *, tries: int = 300) -> Case:
    """The smallest case that is found to fail.

    Args:
        case: fails.
        fails: whether a case fails as it does.
        tries: how many cases are run at most.
    """
    seen = {case}
    progress = True
    while progress:
        progress = False
        for smaller in _simpler(case):
            smaller = valid(smaller)
            if smaller in seen or _weight(smaller) >= _weight(case):
                continue
            seen.add(smaller)
            if len(seen) > tries:
                return case
            if fails(smaller):
                case, progress = smaller, True
                break
    return case


def _weight(case: Case) -> tuple[int, int, tuple[int, ...]]:
    """What shrinking makes less: the size, then the numbers in it, then how far parts are from the simplest."""
    numbers = sum(a.micro_batches + a.steps for a in case.actions if isinstance(a, Train))
    plain = [Part(part.kind, part.form) for part in case.parts]
    ranks = tuple(SIMPLE_PARTS.index(p) if p in SIMPLE_PARTS else len(SIMPLE_PARTS) for p in plain)
    return case.size(), numbers, ranks


def _simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing less, the largest things first."""
    for i in range(len(case.actions)):
        if len(case.actions) > 1:
            yield replace(case, actions=case.actions[:i] + case.actions[i + 1 :])
    for i in range(len(case.parts)):
        if len(case.parts) > 1:
            yield _without_part(case, i)
    if case.settings != Settings():
        yield replace(case, settings=Settings())
    for name in ("compiled", "container", "oddity", "loop", "dtype", "autocast", "input_grad", "prepare", "seed"):
        yield replace(case, **{name: _default(Case, name)})
    for simpler in _fields(case.settings):
        yield replace(case, settings=simpler)
    for i, part in enumerate(case.parts):
        for simpler in (*_fields(part), *(replace(part, kind=p.kind, form=p.form) for p in SIMPLE_PARTS)):
            yield replace(case, parts=(*case.parts[:i], simpler, *case.parts[i + 1 :]))
    for i, action in enumerate(case.actions):
        for simpler in (Train(), *_fields(action)):
            yield replace(case, actions=(*case.actions[:i], simpler, *case.actions[i + 1 :]))


def _without_part(case: Case, index: int) -> Case:
    """A part less; the others' indices move, and what refers to it goes on by itself."""
    parts = []
    for part in case.parts[:index] + case.parts[index + 1 :]:
        moved: dict[str, Any] = {}
        for name in ("again", "tied"):
            other = getattr(part, name)
            if other is not None:
                moved[name] = None if other == index else other - (other > index)
        parts.append(replace(part, **moved))
    return replace(case, parts=tuple(parts))


def _fields(value: Any) -> Iterator[Any]:
    """The value with one field at its default."""
    for name in changed(value):
        if name not in ("kind", "form"):
            yield replace(value, **{name: _default(type(value), name)})


def _default(cls: type[Any], name: str) -> Any:
    one = next(field for field in dataclasses.fields(cls) if field.name == name)
    return one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
