"""Weight names: what of a qualified name is whose, from Dynamo's sources to a checkpoint's unique names.

A unique name is ``stage1.blocks.0.fc.weight#2``: the pipeline stage, where there is one, the qualified name in the
module, and a number, where several Parameters have that name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Set
from fnmatch import fnmatchcase

_REGISTERED = re.compile(r"_(?:modules|parameters|buffers)\[(?:'([^']*)'|\"([^\"]*)\")\]")
_PARAMETER = re.compile(r"_parameters\[(?:'[^']*'|\"[^\"]*\")\](?:\.data)?$")
_STAGE = re.compile(r"stage\d+")
_ROOT = re.compile(r"^[LG]\[['\"](?:self|fn|mod|model)['\"]\]\.?")

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Components that ``torch.compile``, FSDP and checkpoint wrappers put into a name, anywhere."""


def is_parameter_source(source: str) -> bool:
    """Whether a source, such as ``L['self']._modules['fc']._parameters['weight']``, is a module's parameter."""
    return _PARAMETER.search(source) is not None


def qualified_name(source: str) -> str:
    """The parameter's name as ``Module.named_parameters`` would give it, relative to the compiled module.

    Names that wrappers insert are removed: ``_orig_mod``, ``_fsdp_wrapped_module`` and ``_checkpoint_wrapped_module``
    anywhere, the ``module`` of DistributedDataParallel in front.
    """
    parts = [a or b for a, b in _REGISTERED.findall(source)]
    return clean(".".join(parts)) if parts else _ROOT.sub("", source)


def clean(name: str) -> str:
    """A parameter's name without what `qualified_name` says that wrappers insert."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def first_match(name: str, patterns: tuple[str, ...]) -> str | None:
    """The first of the globs that matches the name."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def ends_in(name: str, known: Set[str]) -> bool:
    """Whether a name, or its end, is among the known: graphs of blocks know names relative to the block."""
    parts = name.split(".")
    return any(".".join(parts[i:]) in known for i in range(len(parts)))


def numbered(name: str, count: int) -> str:
    """The name of the Parameter that is the ``count``-th, from 0, to have ``name``: the first keeps it as it is."""
    return f"{name}#{count}" if count else name


def first_free(name: str, taken: Container[str]) -> str:
    """The first of ``name``, ``name#1``, ``name#2``, ... that is not taken."""
    return next(n for n in (numbered(name, count) for count in itertools.count()) if n not in taken)


def without_number(name: str) -> str:
    """A unique name without the number of `numbered`."""
    return name.partition("#")[0]


def stage_prefix(index: int) -> str:
    """What stands before the names of a pipeline stage's weights: each rank holds other stages, with modules alike."""
    return f"stage{index}."


def stage_prefix_of(name: str) -> str:
    """The `stage_prefix` that a unique name begins with; empty where it has none."""
    stage = name.partition(".")[0]
    return f"{stage}." if _STAGE.fullmatch(stage) else ""


def without_stage(name: str) -> str:
    """A unique name without its `stage_prefix`: as the stage's module knows the weight."""
    return name.removeprefix(stage_prefix_of(name))
