"""Weight names: what of a qualified name is whose, from Dynamo's sources to a checkpoint's unique names.

A unique name is ``stage1.blocks.0.fc.weight#2``: the pipeline stage, where there is one, the qualified name in the
module, and a number, where several Parameters have that name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Container
from fnmatch import fnmatchcase

from .source_names import parameter_path

_STAGE = re.compile(r"stage\d+")
_VARIABLE = re.compile(r"^[LG]\[(['\"])(.*)\1\]$")

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Components that ``torch.compile``, FSDP, checkpoint wrappers and Lightning Fabric put into a name, anywhere."""

_WRAPPERS_OF_MODULE = ("DistributedDataParallel", "DataParallel", "AveragedModel", "DeepSpeedEngine")
"""Classes whose child ``module`` is what they wrap; a child of another class may well be called so."""


def is_wrapper_component(module: object, child: str) -> bool:
    """Whether a module has put the name of its child into a qualified name, as a wrapper does."""
    if child in WRAPPERS:
        return True
    return child == "module" and any(
        kind.__name__ in _WRAPPERS_OF_MODULE and kind.__module__.partition(".")[0] in ("torch", "deepspeed")
        for kind in type(module).__mro__
    )


def qualified_name(source: str) -> str:
    """A weight's name as one of Dynamo's sources has it, where no module is at hand that holds it.

    Relative to the object that the source begins with, without the components that wrappers insert. A variable's own
    name where the weight is a variable; the source itself where it is not understood.
    """
    path = parameter_path(source)
    if path is None:
        return source
    return ".".join(part for part in path if part not in WRAPPERS) or _VARIABLE.sub(r"\2", source)


def first_match(name: str | tuple[str, ...], patterns: tuple[str, ...]) -> str | None:
    """The first of the globs that matches the name, or one of the names."""
    names = (name,) if isinstance(name, str) else name
    return next((pattern for pattern in patterns if any(fnmatchcase(one, pattern) for one in names)), None)


def numbered(name: str, count: int) -> str:
    """The name of the Parameter that is the ``count``-th, from 0, to have ``name``: the first keeps it as it is."""
    return f"{name}#{count}" if count else name


def first_free(name: str, taken: Container[str]) -> str:
    """The first of ``name``, ``name#1``, ``name#2``, ... that is not taken."""
    return next(n for n in (numbered(name, count) for count in itertools.count()) if n not in taken)


def without_number(name: str) -> str:
    """A unique name without the number of `numbered`."""
    return name.partition("#")[0]


def without_stage(name: str) -> str:
    """A unique name without the `stage_prefix` that it begins with."""
    return name.removeprefix(stage_prefix_of(name))


def stage_prefix(index: int) -> str:
    """What stands before the names of a pipeline stage's weights: each rank holds other stages, with modules alike."""
    return f"stage{index}."


def stage_prefix_of(name: str) -> str:
    """The `stage_prefix` that a unique name begins with; empty where it has none."""
    stage = name.partition(".")[0]
    return f"{stage}." if _STAGE.fullmatch(stage) else ""
