"""Named recipes, a file each: which operands of a layer's products are rounded, how, and whose recipe that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..numerics.elements import ElementFormat
from ..settings.nearest import nearest
from ..settings.recipe import Recipe
from .exmy import exmy
from .fp8_block import fp8_block
from .fp8_tensor import fp8_tensor
from .mxfp4 import mxfp4
from .mxfp8 import mxfp8
from .nvfp4 import nvfp4

NAMED: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {one.__name__: one for one in (mxfp8, mxfp4, nvfp4, fp8_block, fp8_tensor)}
)
"""The recipes by name, but for ``"exmy"``, which is one of a format."""

RECIPES = (*NAMED, "exmy")
"""The names."""


def as_recipe(value: object, fmt: str | ElementFormat | None) -> Recipe | None:
    """What a user has given as ``recipe``.

    Args:
        value: a `Recipe`, a name, or None.
        fmt: the format that was given beside it, of which ``"exmy"`` is made.

    Raises:
        ValueError: it is none of them, or ``"exmy"`` without a format.
    """
    if value is None or isinstance(value, Recipe):
        return value
    if value == "exmy":
        return exmy(fmt)
    if isinstance(value, str):
        if value not in NAMED:
            raise ValueError(f"recipe {value!r} is not known: {nearest(value, RECIPES)}")
        return NAMED[value]()
    raise ValueError(f"recipe must be a Recipe, one of {', '.join(map(repr, RECIPES))}, or None, got {value!r}")
