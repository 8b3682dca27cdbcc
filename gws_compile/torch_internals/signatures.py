"""The parameters of torch's operations, by name, as their schemas or Python's signatures have them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, Literal

import torch

from .lookup import find

_PACKET: type[Any] = type(torch.ops.aten.add)
_OVERLOAD: type[Any] = type(torch.ops.aten.add.Tensor)


@dataclass(frozen=True)
class Parameter:
    """A parameter of an operation.

    Attributes:
        name: such as ``mat2``; the first operand of most is ``self``.
        kind: what an argument has to be to fit: a tensor, a list, a flag, or anything.
        variadic: it takes all positional arguments that are left.
    """

    name: str
    kind: Literal["tensor", "list", "flag", "any"] = "any"
    variadic: bool = False


Signature = tuple[Parameter, ...]


def signatures(target: Any) -> tuple[Signature, ...]:
    """The signatures of what a node calls, one for each overload; none where nothing tells.

    Relies on ``torch._C._jit_get_schemas_for_operator``, and on the ``_schema`` of an operator of ``torch.ops``.
    Checked on torch 2.11 to 2.15.

    Args:
        target: a function, an operator of ``torch.ops``, or the name of a tensor's method.
    """
    if isinstance(target, str):
        return _named(target)
    if isinstance(target, _OVERLOAD):
        return (_of_schema(target._schema),)
    if isinstance(target, _PACKET):
        return tuple(_of_schema(getattr(target, name)._schema) for name in target.overloads())
    if isinstance(target, FunctionType):
        return _of_python(target)
    return _named(getattr(target, "__name__", "")) or _of_python(target)


def namespace_of(target: Any) -> str:
    """The library that an operator of ``torch.ops`` is of, such as ``aten``; empty for what is none.

    Relies on ``OpOverload.namespace`` and ``OpOverloadPacket._qualified_op_name``. Checked on torch 2.11 to 2.15.
    """
    if isinstance(target, _OVERLOAD):
        return str(target.namespace)
    if isinstance(target, _PACKET):
        return str(target._qualified_op_name).partition("::")[0]
    return ""


@cache
def _named(name: str) -> tuple[Signature, ...]:
    schemas = find("torch._C", "_jit_get_schemas_for_operator")(f"aten::{name}")
    return tuple(_of_schema(schema) for schema in schemas)


def _of_schema(schema: Any) -> Signature:
    return tuple(Parameter(argument.name, _kind(argument.type)) for argument in schema.arguments)


def _kind(kind: Any) -> Literal["tensor", "list", "flag", "any"]:
    if kind.kind() == "OptionalType":
        kind = kind.getElementType()
    kinds: dict[str, Literal["tensor", "list", "flag"]]
    kinds = {"TensorType": "tensor", "ListType": "list", "BoolType": "flag"}
    return kinds.get(kind.kind(), "any")


def _of_python(function: Any) -> tuple[Signature, ...]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without one
        return ()
    return (
        tuple(Parameter(p.name, variadic=p.kind is p.VAR_POSITIONAL) for p in parameters if p.kind != p.VAR_KEYWORD),
    )
