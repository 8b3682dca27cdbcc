"""Qualified weight names from the sources that Dynamo gives graph inputs."""

from __future__ import annotations

import re
from collections.abc import Set
from fnmatch import fnmatchcase

_REGISTERED = re.compile(r"_(?:modules|parameters|buffers)\[(?:'([^']*)'|\"([^\"]*)\")\]")
_PARAMETER = re.compile(r"_parameters\[(?:'[^']*'|\"[^\"]*\")\](?:\.data)?$")
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
