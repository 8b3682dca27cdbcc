"""The operands of a node by the names that its operation has for them, whatever the form of the call."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import fx

from gws_compile.torch_internals.signatures import Signature, signatures

# What torch's functions call an operand beside its name in the schema: `input`, and numpy's names.
_ALIASES = {"input": "self", "x": "self", "a": "self", "x1": "self", "x2": "other", "axis": "dim"}

# These still take numbers in front of their tensors, for `beta` and `alpha`.
_LEGACY = frozenset(f"{name}{mark}" for name in ("addmm", "addmv", "addbmm", "baddbmm") for mark in ("", "_"))

_REFLECTED = re.compile(r"__r(add|sub|mul|truediv|floordiv|mod|pow|matmul)__")


class Operand(NamedTuple):
    """A value that a node is given.

    Attributes:
        position: of its parameter in the operation's signature; -1 where nothing tells.
        name: of that parameter, ``self`` for a method's or function's first tensor; empty where nothing tells.
        value: a node, a number, a list of those, and so on.
    """

    position: int
    name: str
    value: Any


def operands(node: fx.Node) -> list[Operand]:
    """What a node is given, by positions and keywords alike, each under the name of its parameter."""
    target: Any = node.target
    args: Sequence[Any] = node.args
    if node.op == "call_method":
        if reflected(target):  # w.__rmatmul__(x) is x @ w
            target, args = reflected(target), (*reversed(args[:2]), *args[2:])
        target = target.removeprefix("__").removesuffix("__") if target.endswith("__") else target
    if (target if isinstance(target, str) else getattr(target, "__name__", "")) in _LEGACY:
        args = [value for value in args if not isinstance(value, (int, float))]
    overloads = signatures(target)
    signature = next((one for one in overloads if _fits(one, args, node.kwargs)), None)
    if signature is None:
        named = [Operand(_first(key), key, value) for key, value in node.kwargs.items()]
        return [Operand(i, "", value) for i, value in enumerate(args)] + named
    return list(_bound(signature, args, node.kwargs))


def reflected(method: str) -> str:
    """The operation of a method that takes its operands the other way round, such as ``__rmatmul__``; else empty."""
    match = _REFLECTED.fullmatch(method)
    return match[1] if match else ""


def _first(key: str) -> int:
    return 0 if _ALIASES.get(key, key) in ("self", "tensors", "tensor") else -1


def _fits(signature: Signature, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    names = {parameter.name for parameter in signature}
    if not all(key in names or _ALIASES.get(key) in names for key in kwargs):
        return False
    for parameter, value in zip(signature, args, strict=False):
        if isinstance(value, (list, tuple)) and parameter.kind in ("tensor", "flag"):
            return False
        if isinstance(value, bool) and parameter.kind in ("tensor", "list"):
            return False
    return True


def _bound(signature: Signature, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Operand]:
    for i, value in enumerate(args):
        variadic = next((j for j, parameter in enumerate(signature[: i + 1]) if parameter.variadic), None)
        # Beyond the last: the sizes of `w.view(2, 8)`.
        position = min(i, len(signature) - 1) if variadic is None else variadic
        yield Operand(position, signature[position].name if signature else "", value)
    names = [parameter.name for parameter in signature]
    for key, value in kwargs.items():
        name = key if key in names else _ALIASES[key]
        yield Operand(names.index(name), name, value)
