"""The fuzzer itself: mistakes that it has to find, and failing cases that it has to make small."""

from __future__ import annotations

import importlib

import pytest
import torch

from . import script
from .case import Case, Evaluate, Part, Settings, Train
from .check import failure_of, reproduction, smallest_failure
from .generate import features, generate
from .naming import Draws
from .reads import Reads, _Straight
from .shrink import shrink

OPERATOR = importlib.import_module("gws_compile.ops.sample_weight")


def draw_does_not_go_on(monkeypatch):
    monkeypatch.setattr(Draws, "optimizer_stepped", lambda self: None)


def draw_goes_on_with_each_forward(monkeypatch):
    forward = Draws.forward
    monkeypatch.setattr(Draws, "forward", lambda self: (forward(self), setattr(self, "pending", True)))


def noise_where_no_gradients_flow(monkeypatch):
    hat = Reads.hat

    def noisy(self, w, **kwargs):
        with torch.enable_grad():
            return hat(self, w, **kwargs)

    monkeypatch.setattr(Reads, "hat", noisy)


def noise_in_detached_reads(monkeypatch):
    monkeypatch.setattr(Reads, "cast", lambda self, w: self.hat(w).detach())


def frozen_weight_left_alone(monkeypatch):
    cast = Reads._cast
    monkeypatch.setattr(Reads, "_cast", lambda self, name, w, flat: cast(self, name, w, flat) if w.requires_grad else w)


def tied_weight_named_by_its_last_place(monkeypatch):
    def names_of(root, prefix):
        named = root.named_parameters(remove_duplicate=False)
        return {id(p): name.removeprefix(prefix).replace("_orig_mod.", "") for name, p in named}

    monkeypatch.setattr(script, "names_of", names_of)


def gradient_doubled(monkeypatch):
    monkeypatch.setattr(_Straight, "backward", staticmethod(lambda ctx, grad: (2 * grad, None)))


def widths_gradient_without_logarithm(monkeypatch):
    gradient = Reads.width_gradient

    def wrong(self, *args):
        result, size = gradient(self, *args)
        return result / 0.6931, size

    monkeypatch.setattr(Reads, "width_gradient", wrong)


def widths_stay_at_their_start(monkeypatch):
    parameter = Reads.parameter
    monkeypatch.setattr(Reads, "parameter", lambda self, name, w: torch.ones_like(parameter(self, name, w)))


def last_bit_of_a_sample(monkeypatch):
    kernel = OPERATOR.sample_eager
    monkeypatch.setattr(
        OPERATOR, "sample_eager", lambda *args, **given: torch.nextafter(x := kernel(*args, **given), x + 1)
    )


MISTAKES = {
    draw_does_not_go_on: ("kind linear", {"sample", "names"}),
    draw_goes_on_with_each_forward: ("Train micro_batches", {"sample"}),
    noise_where_no_gradients_flow: ("around no_grad", {"sample", "names"}),
    noise_in_detached_reads: ("kind detached", {"sample", "names"}),
    frozen_weight_left_alone: ("frozen", {"sample"}),
    tied_weight_named_by_its_last_place: ("tied", {"sample"}),
    gradient_doubled: ("kind linear", {"gradient"}),
    widths_gradient_without_logarithm: ("learned", {"width gradient"}),
    widths_stay_at_their_start: ("trained widths", {"sample"}),
    last_bit_of_a_sample: ("kind linear", {"sample"}),
}
"""Mistakes in the oracle, or in the package: which cases show them, and what differs first."""


def first_failure(feature):
    light = (case for case in map(generate, range(1000)) if len(case.parts) * len(case.actions) <= 4)
    cases = (case for case in light if feature in features(case) and case.settings.inner == "eager")
    return next(failure for failure in map(failure_of, cases) if failure is not None)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_finds_a_mistake(monkeypatch, mistake):
    mistake(monkeypatch)
    feature, differs = MISTAKES[mistake]
    assert first_failure(feature).what in differs


@pytest.mark.parametrize(
    ("mistake", "actions"), [(draw_does_not_go_on, (Train(), Train())), (noise_where_no_gradients_flow, (Evaluate(),))]
)
def test_makes_a_failing_case_small(monkeypatch, mistake, actions):
    mistake(monkeypatch)
    case = Case(
        parts=(Part("mlp", "gelu", around="checkpoint"), Part("sliced", "chunk", oddity="getattr")),
        actions=(Train(micro_batches=2), Evaluate(), Train(steps=2)),
        settings=Settings(fmt="fp6_e3m2", backward="recompute"),
        compiled="in place",
    )
    small = smallest_failure(case)
    assert small.case == Case(parts=(Part("linear", "fc, no bias"),), actions=actions)
    assert small.what == "sample"
    assert "Part(kind='linear', form='fc, no bias')" in reproduction(small.case)


def test_an_error_is_right_only_where_it_is_promised(monkeypatch):
    case = Case(parts=(Part("region", "other weight", around="reentrant"),), compiled="blocks")
    assert failure_of(case) is None
    monkeypatch.setattr(script._Run, "refuses", lambda self, micro, action: False)
    assert failure_of(case).what == "sample"
    monkeypatch.setattr(script._Run, "refuses", lambda self, micro, action: True)
    assert failure_of(Case(parts=(Part("linear", "fc"),))).what == "refusal"


def test_keeps_what_makes_it_fail():
    def fails(case):
        there = any(part.kind == "experts" and part.around == "checkpoint" for part in case.parts)
        return there and any(isinstance(action, Train) and action.micro_batches > 1 for action in case.actions)

    found = next(case for case in map(generate, range(1000)) if fails(case) and len(case.parts) > 2)
    small = shrink(found, fails)
    assert len(small.parts) == len(small.actions) == 1
    assert small.settings == Settings()
    assert fails(small)
