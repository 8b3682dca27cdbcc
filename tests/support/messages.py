"""The package's messages, read from its source: what the documentation has to explain."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator

from .pages import ROOT

SOURCES = [*(ROOT / "gws_compile").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]


def warnings() -> list[list[str]]:
    """The fixed parts of every `GwsWarning` in the code."""
    return [parts for path in SOURCES for parts in _warnings(ast.parse(path.read_text()))]


def reasons() -> list[list[str]]:
    """The fixed parts of every reason for which a weight is left alone."""
    found = [["a DTensor with", ": only Shard and Replicate are sampled"]]  # an exception's text lies in between
    assert all(part in fixed_text() for part in found[0])
    for path in (
        ROOT / "passes" / "find_reads.py",
        ROOT / "passes" / "select_weights.py",
        ROOT / "passes" / "insert_samples.py",
        ROOT / "gws_compile" / "report" / "untraced.py",
    ):
        tree = ast.parse(path.read_text())
        for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and _is_reason(n)]:
            returned = [n.value for n in ast.walk(function) if isinstance(n, ast.Return) and n.value is not None]
            found += [parts for value in returned if (parts := _fixed(value, {}))]
        found += [
            _fixed(n.value, {})
            for n in tree.body
            if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)
        ]
    return found


def fixed_text() -> str:
    """Every string constant of the package, and the warnings that are put together of several."""
    constants = [" ".join(parts) for parts in warnings()]
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                constants.append(" ".join(node.value.split()))
    return "\n".join(constants)


def _is_reason(function: ast.FunctionDef) -> bool:
    return function.returns is not None and ast.unparse(function.returns) in ("str", "str | None")


def _warnings(tree: ast.Module) -> Iterator[list[str]]:
    for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
        assigned = [
            (target.id, n.value)
            for n in ast.walk(function)
            if isinstance(n, ast.Assign)
            for target in n.targets
            if isinstance(target, ast.Name)
        ]
        once = Counter(name for name, _ in assigned)
        local = {name: value for name, value in assigned if once[name] == 1}
        parameters = {a.arg for a in function.args.args}
        for call in [n for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]:
            is_warning = any(isinstance(a, ast.Name) and a.id == "GwsWarning" for a in call.args)
            if not is_warning and call.func.attr not in ("_say", "_refuse_or_say"):
                continue
            message = call.args[0]
            if isinstance(message, ast.Name) and message.id in parameters:
                continue  # `_say` itself
            parts = _fixed(message, local)
            assert parts, f"line {call.lineno}: a warning without a fixed part"
            yield parts


def _fixed(value: ast.expr, local: dict[str, ast.expr]) -> list[str]:
    """The constant parts of a text that are long enough to know it by."""
    if isinstance(value, ast.Constant):
        return [part] if isinstance(value.value, str) and len(part := " ".join(value.value.split())) > 3 else []
    if isinstance(value, ast.JoinedStr):
        return [part for v in value.values for part in _fixed(v, local)]
    if isinstance(value, ast.IfExp):
        return [part for v in (value.body, value.orelse) for part in _fixed(v, local)]
    if isinstance(value, ast.FormattedValue):
        return _fixed(value.value, local)
    if isinstance(value, ast.Name) and value.id in local:
        return _fixed(local[value.id], {k: v for k, v in local.items() if k != value.id})
    return []


def pieces(quote: str) -> list[str]:
    """A quoted message without what stands for its variable parts, written as ``…``."""
    return [piece.strip() for piece in re.split(r"…", quote) if piece.strip()]
