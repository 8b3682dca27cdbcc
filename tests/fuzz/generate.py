"""Draws a case from a seed, and keeps cases to what torch itself can do."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from .case import (
    COMPILED,
    ODDITIES,
    RECOMPUTED,
    Action,
    Assign,
    Case,
    Evaluate,
    Learned,
    Part,
    Replace,
    Resume,
    SetData,
    Settings,
    Train,
    changed,
)
from .parts import KINDS

T = TypeVar("T")

FORMATS = ("fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2", "fp12_e4m7", "bf16", "e3m4", "e5m10")

EXACT: tuple[tuple[str, tuple[int | None, int | None], str], ...] = (
    ("fp8_e4m3", (1, None), "amax"),
    ("fp6_e3m2", (None, None), "amax"),
    ("fp8_e5m2", (5, 3), "amax"),
    ("fp4_e2m1", (16, 16), "nvfp4"),
    ("fp4_e2m1", (1, 16), "nvfp4"),
    ("int4", (1, 8), "amax"),
    ("int8", (None, 4), "amax"),
    ("int2", (4, 8), "ceil"),
    ("int5", (32, 32), "floor"),
)
"""Format, block and scale of exact scales and of integers; of fixed widths."""

GLOBS = ("*qkv*", "*lora_*", "*conv*", "*up.weight", "*experts", "*table*", "*fc.weight", "*weight")


def generate(seed: int) -> Case:
    """The case of a seed, always the same."""
    return valid(_Draw(random.Random(seed)).case(seed))


class _Draw:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def maybe(self, share: float) -> bool:
        return self.rng.random() < share

    def one(self, values: Sequence[T]) -> T:
        return self.rng.choice(values)

    def rarely(self, share: float, values: Sequence[T], usual: T) -> T:
        return self.one(values) if self.maybe(share) else usual

    def case(self, seed: int) -> Case:
        parts: list[Part] = []
        for i in range(self.rng.choice((1, 2, 2, 3, 3, 4))):
            parts.append(self.part(parts[:i]))
        rerun = any(part.around == "rerun" for part in parts)  # which torch cannot trace from outside
        return Case(
            seed=seed,
            parts=tuple(parts),
            actions=self.actions(),
            settings=self.settings(),
            compiled=self.one(COMPILED[2:]) if rerun else self.rarely(0.5, COMPILED, "whole"),
            container=self.rarely(0.3, ("module", "layers"), "parts"),
            oddity=self.rarely(0.2, ODDITIES, "plain"),
            loop=self.maybe(0.5),
            dtype=self.rarely(0.2, ("bfloat16",), "float32"),
            autocast=self.maybe(0.15),
            input_grad=self.maybe(0.5),
            prepare=self.maybe(0.5),
        )

    def part(self, earlier: list[Part]) -> Part:
        kind = self.one(tuple(KINDS))
        found = Part(
            kind,
            self.one(KINDS[kind].forms),
            around=self.rarely(0.4, ("no_grad", "enable_grad", "checkpoint", "reentrant", "rerun"), "plain"),
            broken=self.maybe(0.1),
            oddity=self.rarely(0.2, ODDITIES, "plain"),
            frozen=self.maybe(0.1),
        )
        if not earlier or not self.maybe(0.25):
            return found
        other = self.rng.randrange(len(earlier))
        found = replace(found, kind=earlier[other].kind, form=earlier[other].form)
        return replace(found, **{self.one(("again", "tied")): other})

    def actions(self) -> tuple[Action, ...]:
        actions = tuple(self.action(i) for i in range(self.rng.choice((2, 3, 3, 4, 5))))
        trains = any(isinstance(action, Train) for action in actions)
        return actions if trains and isinstance(actions[-1], Train | Evaluate) else (*actions, Train())

    def action(self, number: int) -> Action:
        if self.maybe(0.5 if number > 0 else 0.1):
            kind: type[Any] = self.one((Evaluate, Evaluate, Assign, Replace, SetData, Resume))
            if kind is not Evaluate:
                return kind()  # type: ignore[no-any-return]
            mode = self.rarely(0.3, ("inference_mode",), "no_grad")
            return Evaluate(mode, training=self.maybe(0.3), copy=self.maybe(0.4))
        return Train(
            micro_batches=self.one((1, 1, 2, 3)),
            together=self.maybe(0.3),
            noise=not self.maybe(0.15),
            steps=self.one((1, 1, 1, 2)),
            functional=self.maybe(0.15),
        )

    def settings(self) -> Settings:
        learned = None
        if self.maybe(0.3):
            init, target = self.one(((6.0, 4.0), (5.0, 3.0), (4.0, 7.0), (2.5, 2.0)))
            formats = self.rarely(0.5, (("fp4_e2m1", "fp8_e4m3"), ("fp6_e3m2", "e3m4", "bf16")), None)
            learned = Learned(self.one(("block", "weight")), init, target, formats)
        settings = Settings(
            fmt=self.rarely(0.8, FORMATS, None),
            bits=self.rarely(0.3, (2.0, 3.5, 5.0, 10.0), None),
            learned=learned,
            noise=self.rarely(0.3, ("uniform", "uniform", "none"), "rounded_normal"),
            block=self.rarely(0.7, ((4, 8), (5, 3), (1, 16), (16, 1)), (32, 32)),
            scale=self.rarely(0.3, ("ceil", None), "floor"),
            include=self.rarely(0.15, tuple((glob,) for glob in GLOBS), None),
            exclude=self.rarely(0.15, ((), *((glob,) for glob in GLOBS)), None),
            seed=self.rarely(0.5, (1, 2**40 + 7, 2**64 - 1), 0),
            resample=self.rarely(0.3, ("forward",), "step"),
            backward=self.rarely(0.3, ("recompute",), "save"),
            inner=self.rng.choices(("eager", "aot_eager", "inductor"), (50, 44, 6))[0],
        )
        if learned is not None or not self.maybe(0.35):
            return settings
        fmt, block, scale = self.one(EXACT)
        return replace(settings, fmt=fmt, block=block, scale=scale, bits=None)


def valid(case: Case) -> Case:
    """The case without what means nothing, or what torch cannot do with any backend; most cases stay as they are."""
    parts = tuple(_valid_part(i, part, case) for i, part in enumerate(case.parts))
    case = replace(case, parts=parts)
    if any(part.around in RECOMPUTED for part in parts) and any(map(_breaks, parts)):
        case = replace(case, loop=False)  # a frame with a break in a loop is left whole, and a checkpoint with it
    case = replace(case, settings=_valid_settings(case))
    # What is called again in backward is called once forward is over: needs gradients of its input.
    recomputed = "blocks" in case.compiled and any(part.around in RECOMPUTED for part in parts)
    actions = tuple(_valid_action(action, case, recomputed) for action in case.actions)
    input_grad = case.input_grad or any(_needs_input_grad(part) for part in parts)
    prepare = case.prepare and case.settings.learned is not None
    return replace(case, actions=actions, input_grad=input_grad, prepare=prepare)


def _valid_part(index: int, part: Part, case: Case) -> Part:
    for name in ("again", "tied"):
        other = getattr(part, name)
        if other is None:
            continue
        there = other < index and case.parts[other].again is None and case.parts[other].kind == part.kind
        there = there and case.parts[other].form == part.form
        if not there or (name == "tied" and not KINDS[part.kind].main) or (name == "tied" and part.again is not None):
            part = replace(part, **{name: None})
    if part.again is not None:
        # It is the same module, with what is set on it.
        first = case.parts[part.again]
        part = replace(part, oddity=first.oddity, broken=first.broken, frozen=first.frozen)
    around = part.around
    if around in RECOMPUTED and KINDS[part.kind].computes_buffers:
        around = "plain"
    if around == "rerun" and KINDS[part.kind].draws:
        around = "reentrant"  # which keeps the generator's state for backward
    if around == "rerun" and (case.compiled in ("whole", "in place") or case.autocast):
        around = "reentrant"  # torch cannot trace such a function; nor does it keep autocast for backward
    if around in RECOMPUTED and KINDS[part.kind].draws and case.compiled in ("whole", "in place"):
        # Torch's own "eager" backend does not keep the generator's state for a checkpoint that it has traced.
        around = "plain" if case.settings.inner == "eager" else around
    part = replace(part, around=around)
    if around in RECOMPUTED and case.compiled in ("whole", "in place") and _breaks(part):
        # torch calls a checkpoint that it cannot trace as a whole eagerly, and traces nothing inside.
        part = replace(part, around="plain")
    return part


def _needs_input_grad(part: Part) -> bool:
    # Torch refuses to trace a checkpoint of attention or dropout that no gradient flows through.
    random = part.kind in ("attention", "torch module", "dropout")
    return part.around in ("reentrant", "rerun") or (part.around == "checkpoint" and random)


def _breaks(part: Part) -> bool:
    """Whether there is a graph break in a part, or what is one inside of a checkpoint."""
    return part.broken or part.oddity == "sets" or part.form == "break inside"


def _valid_settings(case: Case) -> Settings:
    settings = case.settings
    if settings.learned is not None:
        noise = "rounded_normal" if settings.noise == "none" else settings.noise
        settings = replace(settings, noise=noise, bits=None)
    if settings.inner == "inductor" and any(KINDS[part.kind].draws for part in case.parts):
        settings = replace(settings, inner="aot_eager")  # Inductor has a generator of its own
    if settings.resample == "forward" and not _one_graph(case):
        settings = replace(settings, resample="step")
    return settings


def _one_graph(case: Case) -> bool:
    """Whether every training forward is one call of one graph, each of which draws under ``resample="forward"``."""
    if case.compiled not in ("whole", "in place") or case.oddity != "plain":
        return False
    calm = ("plain", "no_grad", "checkpoint")
    return all(part.around in calm and part.form != "enabled inside" and not _breaks(part) for part in case.parts)


def _valid_action(action: Action, case: Case, recomputed: bool) -> Action:
    if isinstance(action, Train):
        if action.micro_batches == 1:
            action = replace(action, together=False)
        if recomputed:
            # functional_call has taken its tensors out again when backward calls the module.
            action = replace(action, functional=False)
    if isinstance(action, Evaluate):
        if case.compiled in ("in place", "blocks"):
            action = replace(action, copy=False)  # torch drops what Module.compile has compiled
        if any(part.around == "enable_grad" or part.form == "enabled inside" for part in case.parts):
            action = replace(action, mode="no_grad")  # enable_grad means nothing there
    return action


def features(case: Case) -> set[str]:
    """What there is in a case, by name."""
    found = {f"compiled {case.compiled}", f"container {case.container}", f"dtype {case.dtype}"}
    found |= {f"model class {case.oddity}", "autocast" if case.autocast else "no autocast"}
    found |= {f"loop {case.loop}", f"input requires grad {case.input_grad}", f"prepare {case.prepare}"}
    for part in case.parts:
        kind = part.kind
        found |= {f"kind {kind}", f"form {kind}: {part.form}", f"around {part.around}", f"{kind} in {part.around}"}
        found |= {f"class {part.oddity}"}
        found |= {name for name in ("broken", "frozen") if getattr(part, name)}
        found |= {name for name in ("again", "tied") if getattr(part, name) is not None}
        found |= {f"{kind} with learned widths"} if case.settings.learned is not None else set()
        found |= {f"{kind} tied"} if part.tied is not None else set()
    settings = case.settings
    for name in changed(settings):
        found |= {name, f"{name} {getattr(settings, name)}"}
    found.add(f"inner {settings.inner}")
    trains = [action for action in case.actions if isinstance(action, Train)]
    if settings.learned is not None:
        found |= {f"granularity {settings.learned.granularity}", *changed(settings.learned)}
        found |= {"trained widths"} if len(trains) > 1 else set()
    for action in case.actions:
        found.add(type(action).__name__)
        found |= {f"{type(action).__name__} {name}" for name in changed(action)}
    for before, action in zip((None, *case.actions), case.actions, strict=False):
        pair = f"{type(action).__name__} behind {type(before).__name__}"
        found |= {pair, f"{pair} with learned widths"} if settings.learned is not None else {pair}
    return found
