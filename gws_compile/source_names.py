"""What Dynamo's sources say of a weight: the expressions by which a traced frame reaches it.

A source is a Python expression over the frame's locals ``L`` and globals ``G``, such as
``L['self']._modules['fc']._parameters['weight']``, so it is read with Python's own grammar. Dynamo writes one way to a
weight in many forms: ``L['self'].__dict__['_modules']['fc']`` where a class has its own ``__getattr__`` or sets
attributes in its forward, ``dict.__getitem__(L['d'], 'a')``, ``G['step'].__closure__[0].cell_contents``, and more.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Literal

_REGISTRIES = ("_modules", "_parameters", "_buffers")
_SCOPES = ("L", "G", "SYNTHETIC_LOCAL")
_VARIABLE = re.compile(rf"(?:{'|'.join(_SCOPES)})\[(['\"])(.*)\1\]")
_IMPORTS = ("G['__import_", "__import__(")
_CLASS_ATTRIBUTES = ("__class__", "__mro__")
_OF_FUNCTIONS = ("__self__", "__func__", "__wrapped__", "cell_contents")
"""Attributes of functions and cells, behind which another object begins."""

_DEFAULTS = ("__defaults__", "__kwdefaults__")
_OF_PARTIALS = ("args", "keywords")
_COPIES = ("dict", "list", "tuple", "type", "iter")
_VIEWS = ("keys", "values", "get_base")
_NO_REFERENCES = ("item", "size", "stride", "storage_offset", "_type", "qualified_name")


class _UnknownFormError(Exception):
    """A form of source that is not read."""


_Kind = Literal["attribute", "item", "place", "call"]


@dataclass(frozen=True)
class _Step:
    """One access.

    Attributes:
        kind: an attribute, an item by its key, one by its key's place among the keys, or a call that leads to the same
            object or to a copy of it.
        key: the attribute's name, the item's key or place; the function's name of a call.
        expression: the source as far as here.
    """

    kind: _Kind
    key: str
    expression: str

    def is_attribute(self, *names: str) -> bool:
        """Whether it is an attribute of one of these names."""
        return self.kind == "attribute" and self.key in names


@dataclass(frozen=True)
class _Source:
    """A source as it is written.

    Attributes:
        variable: a local or global variable, or an imported module.
        steps: what is done with it, in this order.
    """

    variable: str
    steps: tuple[_Step, ...]

    @property
    def start(self) -> int:
        """How many of the steps lead to the base."""
        start = 0
        for i in range(len(self.steps)):
            if self._begins_anew(i, start):
                start = i + 1
        return start

    def _begins_anew(self, i: int, start: int) -> bool:
        """Whether another object's attributes follow a step, where all but ``start`` steps led to the last such."""
        step, before = self.steps[i], self.steps[i - 1] if i else None
        if step.is_attribute(*_OF_FUNCTIONS) or (before is not None and before.is_attribute(*_DEFAULTS)):
            return True
        # A module's own ``self`` is no partial, though it may have a list that is called ``args``.
        may_be_partial = start > 0 or self.variable != "L['self']"
        if i == start + 1 and before is not None:
            return may_be_partial and before.is_attribute(*_OF_PARTIALS)
        is_weak_reference = step.kind == "call" and step.key == "()"
        is_of_other_file = i == 0 and self.variable.startswith(_IMPORTS) and step.kind == "attribute"
        return i == start and (is_weak_reference or is_of_other_file or (may_be_partial and step.is_attribute("func")))


def parameter_path(source: str) -> tuple[str, ...] | None:
    """The components of a weight's qualified name, as ``named_parameters`` has them, relative to `base_of` the source.

    Of a plain container or attribute they are the attribute's name and the key: ``("layers", "3", "weight")`` for the
    list ``layers`` of a module, which ``named_parameters`` does not know. A key with dots in it, such as one of the
    mapping that ``functional_call`` takes, is one component.

    Args:
        source: a buffer's is read as well.

    Returns:
        No component where the base is the weight itself, a variable; None for a source that is not understood, or that
        leads to something else, such as a gradient or a part of a tensor subclass.
    """
    read = _read(source)
    steps = None if read is None else _without_detours(read.steps[read.start :])
    if steps is None:
        return None
    if steps and steps[-1] == ("attribute", "data"):
        steps = steps[:-1]
    if steps and steps[-1] == ("attribute", "grad"):
        return None
    path: list[str] = []
    while steps:
        (kind, key), steps = steps[0], steps[1:]
        if kind == "attribute" and key in _REGISTRIES:
            if not steps or steps[0][0] != "item" or (key != "_modules" and len(steps) > 1):
                return None
            (_, key), steps = steps[0], steps[1:]
        path.append(key)
    return tuple(path)


def base_of(source: str) -> str:
    """The expression that a `parameter_path` is relative to, such as ``L['self']`` or ``G['step'].__self__``.

    It is the variable that the source begins with. Where that is a function, it is what the function is bound to, or
    has in its closure, its defaults or, of a ``functools.partial``, its arguments; where it is an imported module, a
    variable in it. A source that is not understood is its own base.
    """
    read = _read(source)
    if read is None:
        return source
    return read.steps[read.start - 1].expression if read.start else read.variable


def prefixes_of(source: str) -> tuple[str, ...]:
    """The expressions of all objects on the way to the weight, from the variable to the source itself.

    The first of them that is a module is the outermost module that the source leads through: whatever holds it, a dict,
    a dataclass, a partial. Empty for a source that is not understood.
    """
    read = _read(source)
    return () if read is None else (read.variable, *(step.expression for step in read.steps))


def cell_of(source: str) -> tuple[str, int] | None:
    """The function, and the number of its closure's cell, where a source is what such a cell contains."""
    read = _read(source)
    if read is None or len(read.steps) < 3:
        return None
    cells, cell, contents = read.steps[-3:]
    if not (cells.is_attribute("__closure__") and cell.kind == "item" and contents.is_attribute("cell_contents")):
        return None
    function = read.steps[-4].expression if len(read.steps) > 3 else read.variable
    return (function, int(cell.key)) if cell.key.isdecimal() else None


def last_name(source: str) -> str:
    """What the object is called that a source leads to: its variable, the attribute or the key that it stands under.

    Empty for a source that is not understood, and for an imported module.
    """
    read = _read(source)
    steps = [] if read is None else [step for step in read.steps if step.kind != "call"]
    if steps:
        return steps[-1].key
    variable = None if read is None else _VARIABLE.fullmatch(read.variable)
    return "" if variable is None else variable[2]


def is_parameter(source: str) -> bool:
    """Whether a source ends in what a module has registered as a Parameter, be it one or what stands in for it."""
    return _registry_of(source) == "_parameters"


def is_buffer(source: str) -> bool:
    """Whether a source ends in a buffer of a module."""
    return _registry_of(source) == "_buffers"


def _registry_of(source: str) -> str | None:
    read = _read(source)
    steps = _without_detours(read.steps) if read is not None else None
    if steps and steps[-1] == ("attribute", "data"):
        steps = steps[:-1]
    if not steps or len(steps) < 2 or steps[-1][0] != "item" or steps[-2][0] != "attribute":
        return None
    return steps[-2][1]


def _without_detours(steps: tuple[_Step, ...]) -> list[tuple[str, str]] | None:
    """Kind and key of each access, without calls and classes, and ``__dict__['x']`` as the attribute ``x``.

    None where a ``__dict__`` or a list of classes is no way to anything.
    """
    direct: list[tuple[str, str]] = []
    rest = [(step.kind, step.key) for step in steps if step.kind != "call"]
    while rest:
        (kind, key), rest = rest[0], rest[1:]
        if kind == "attribute" and key in ("__dict__", "__mro__"):
            if not rest or rest[0][0] != "item":
                return None
            direct += [("attribute", rest[0][1])] if key == "__dict__" else []
            rest = rest[1:]
        elif kind != "attribute" or key not in _CLASS_ATTRIBUTES:
            direct.append((kind, key))
    return direct


def _read(source: str) -> _Source | None:
    """A source, taken apart; None for one that is not understood."""
    try:
        node = ast.parse(source, mode="eval").body
        steps: list[_Step] = []
        while not _is_variable(node):
            inner, kind, key = _peeled(node)
            steps.append(_Step(kind, key, _text(source, node)))
            node = inner
        return _Source(_text(source, node), tuple(reversed(steps)))
    except (_UnknownFormError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _text(source: str, node: ast.expr) -> str:
    return ast.get_source_segment(source, node) or ast.unparse(node)


def _is_variable(node: ast.expr) -> bool:
    """``L['x']``, ``G['x']`` or ``__import__('x')``."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in _SCOPES:
        return isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "__import__"


_Peeled = tuple[ast.expr, _Kind, str]


def _peeled(node: ast.expr) -> _Peeled:
    """The last access of an expression: what it is done to, its kind and its key.

    Raises:
        _UnknownFormError: it is no access.
    """
    if isinstance(node, ast.Attribute):
        return node.value, "attribute", node.attr
    if isinstance(node, ast.Subscript):
        return node.value, *_key(node.slice)
    if isinstance(node, ast.Call) and not node.keywords:
        return _peeled_call(node, node.args)
    raise _UnknownFormError


def _peeled_call(node: ast.Call, arguments: list[ast.expr]) -> _Peeled:
    """The same of a call: a function of the object and a key, a method, a copy, a weak reference.

    Functions are known by how their names end, since Dynamo has several of each: ``dict.__getitem__``,
    ``___tuple_iterator_getitem``, ``getattr``, ``object.__getattribute__``.
    """
    called = ast.unparse(node.func)
    name = called.rpartition(".")[2]
    by_key = name.endswith("getitem") or name in ("__getitem__", "get")
    if len(arguments) >= 2 and (by_key or name.endswith(("getattr", "__getattribute__"))):
        if by_key:
            return arguments[0], *_key(arguments[1])
        if isinstance(arguments[1], ast.Constant) and isinstance(arguments[1].value, str):
            return arguments[0], "attribute", arguments[1].value
    if len(arguments) == 1 and called in (*_COPIES, *(f"dict.{view}" for view in _VIEWS)):
        return arguments[0], "call", called
    if len(arguments) == 1 and by_key and isinstance(node.func, ast.Attribute):
        return node.func.value, *_key(arguments[0])
    if not arguments and isinstance(node.func, ast.Attribute) and name in _VIEWS:
        return node.func.value, "call", name
    if not arguments and name not in _NO_REFERENCES and not name.startswith("__"):
        return node.func, "call", "()"
    raise _UnknownFormError


def _key(node: ast.expr) -> tuple[_Kind, str]:
    """Kind and key of an item: its place, where the key is itself looked up by its place among the keys.

    Raises:
        _UnknownFormError: it is a slice.
    """
    if isinstance(node, ast.Slice):
        raise _UnknownFormError
    if isinstance(node, ast.Constant):
        return "item", str(node.value)
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).startswith("list("):
        return "place", _key(node.slice)[1]
    return "item", ast.unparse(node)
