"""Random cases against the oracle, and what they cover.

A seed that fails prints a program; ``python -m tests.fuzz --seed N`` runs it alone.
"""

from __future__ import annotations

import itertools

import pytest

from . import case as values
from .case import AROUND, COMPILED, ODDITIES, RECOMPUTED, Settings, source
from .check import failure_of, smallest_failure
from .generate import FORMATS, features, generate
from .parts import KINDS

ALL, CHUNK = 1000, 50


WANTED = {f"kind {kind}" for kind in KINDS} | {f"around {around}" for around in AROUND}
WANTED |= {f"compiled {compiled}" for compiled in COMPILED} | {f"class {oddity}" for oddity in ODDITIES}
WANTED |= {"again", "tied", "frozen", "broken", "autocast", "dtype bfloat16", "input requires grad False"}
WANTED |= {"fmt", "bits", "learned", "block", "include", "exclude", "seed", "noise uniform", "noise none"}
WANTED |= {"resample forward", "backward recompute", "scale ceil", "scale None", "granularity weight"}
WANTED |= {"granularity block", "formats", "inner eager", "inner aot_eager", "inner inductor", "prepare True"}
WANTED |= {"Train micro_batches", "Train together", "Train noise", "Train steps", "Train functional"}
WANTED |= {"Evaluate", "Evaluate mode", "Evaluate training", "Evaluate copy"}
WANTED |= {"Assign", "Replace", "SetData", "Resume", "trained widths"}
"""Features of cases, see `generate.features`."""


def _light(count):
    """Small cases: parts times actions are most of what one costs. The first that have all of `WANTED`, and others."""
    found = {seed: features(case) for seed, case in enumerate(map(generate, range(ALL))) if _cost(case) <= 6}
    missing, needed = set(WANTED), []
    for seed, features_of_it in found.items():
        if missing & features_of_it:
            needed.append(seed)
            missing -= features_of_it
    others = [seed for seed in found if seed not in needed]
    return sorted(needed + others[: count - len(needed)])


def _cost(case):
    return len(case.parts) * len(case.actions)


LIGHT = _light(50)


@pytest.mark.parametrize("seed", LIGHT)
def test_random_case(seed):
    failure = smallest_failure(generate(seed))
    assert failure is None, f"seed {seed} fails: {failure}"


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, ALL, CHUNK))
def test_many_random_cases(first):
    failures = {seed: failure_of(generate(seed)) for seed in range(first, first + CHUNK)}
    failed = [f"seed {seed} fails: {failure}" for seed, failure in failures.items() if failure is not None]
    assert not failed, "\n".join(failed)


# What the cases cover


def _found(seeds):
    return set().union(*(features(generate(seed)) for seed in seeds))


def test_the_light_cases_have_everything_in_them():
    assert len(LIGHT) == 50
    missing = WANTED - _found(LIGHT)
    assert not missing


def test_all_cases_have_every_form_and_the_pairs_that_matter():
    wanted = {f"form {kind}: {form}" for kind, block in KINDS.items() for form in block.forms}
    wanted |= {f"fmt {fmt}" for fmt in FORMATS if fmt != Settings().fmt}
    actions = ("Train", "Evaluate", "Assign", "Replace", "SetData", "Resume")
    for first, second in itertools.product(actions, actions):
        wanted |= {f"{second} behind {first}", f"{second} behind {first} with learned widths"}
    for kind, block in KINDS.items():
        left_out = RECOMPUTED if block.computes_buffers else ("rerun",)  # which is rare
        wanted |= {f"{kind} in {around}" for around in AROUND if around not in left_out}
        wanted |= {f"{kind} with learned widths", f"{kind} tied"} if block.main else {f"{kind} with learned widths"}
    missing = wanted - _found(range(ALL))
    assert not missing


def test_cases_are_values():
    for case in map(generate, range(200)):
        assert eval(source(case), vars(values)) == case
        assert generate(case.seed) == case
