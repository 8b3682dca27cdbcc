"""What the package's sources say about its modules: who imports whom, and who uses private names."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

PACKAGE = "gws_compile"

FOLDERS = {PACKAGE: ROOT / PACKAGE, f"{PACKAGE}.passes": ROOT / "passes"}
"""Package -> the folder that its sources lie in."""

LAYERS: Sequence[frozenset[str]] = [
    frozenset({"__init__", "api", "__main__"}),
    frozenset({"integrations"}),
    frozenset({"command_line"}),
    frozenset({"comparison"}),
    frozenset({"compiler"}),
    frozenset({"deploy"}),
    frozenset({"report"}),
    frozenset({"learned_levels"}),
    frozenset({"learned_bits"}),
    frozenset({"runtime"}),
    frozenset({"passes"}),
    frozenset({"codegen"}),
    frozenset({"ops"}),
    frozenset({"levels"}),
    frozenset({"config"}),
    frozenset({"recipes"}),
    frozenset({"advice"}),
    frozenset({"settings"}),
    frozenset({"source_names", "weight_names"}),
    frozenset({"numerics"}),
    frozenset({"torch_internals"}),
    frozenset({"figures", "warning"}),
]
"""Folders and loose modules of the package, from the top: each imports from its own layer and from those below."""

TORCH_ROOM = f"{PACKAGE}.torch_internals"
"""The only package that may use private torch."""

_PRIVATE_PATH = re.compile(r"torch(\.\w+)*\._\w+(\.\w+)*")


@dataclass(frozen=True)
class Module:
    """One source file.

    Attributes:
        name: as it is imported.
        tree: its syntax.
        is_package: whether it is an ``__init__.py``.
    """

    name: str
    tree: ast.Module
    is_package: bool = False


@dataclass(frozen=True)
class Arrow:
    """One module imports another, at a line."""

    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: imports {self.imported}"


def module(name: str, source: str, *, is_package: bool = False) -> Module:
    """A module from its text."""
    return Module(name, ast.parse(source), is_package)


def read_modules(folders: Mapping[str, Path] = FOLDERS) -> dict[str, Module]:
    """Every module of the package by its name."""
    found = {}
    for package, folder in folders.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            found[name] = module(name, file.read_text(), is_package=is_package)
    return found


def arrows_of(one: Module, known: Collection[str]) -> list[Arrow]:
    """The known modules that a module imports: at its top, in functions, for type checkers, by ``import_module``.

    Python imports a module's packages with it; these count only where they are named themselves.
    """
    found = []
    for node in ast.walk(one.tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _base(one, node)
            targets = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
            targets = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for target in targets:
            imported = _longest_known(target, known)
            if imported is not None and imported != one.name:
                found.append(Arrow(one.name, imported, node.lineno))
    return found


def against_the_layers(arrows: Iterable[Arrow]) -> list[str]:
    """The imports of a module that lies above the importer, or in no layer."""
    ranks = {name: rank for rank, names in enumerate(LAYERS) for name in names}
    wrong = []
    for arrow in arrows:
        importer, imported = _room(arrow.importer), _room(arrow.imported)
        for room in (importer, imported):
            if room not in ranks:
                wrong.append(f"{arrow}; {room} is in none of the layers")
        if importer in ranks and imported in ranks and ranks[imported] < ranks[importer]:
            wrong.append(f"{arrow}, but {imported} lies above {importer}")
    return wrong


def circles(arrows: Iterable[Arrow]) -> list[str]:
    """Modules that import each other in a circle; one circle for each import that would have to go."""
    graph: dict[str, set[str]] = {}
    for arrow in arrows:
        graph.setdefault(arrow.importer, set()).add(arrow.imported)
    found = []
    while True:
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            circle = error.args[1]
            # Each module in graphlib's list is imported by the next.
            graph[circle[1]].discard(circle[0])
            found.append(" <- ".join(circle))
        else:
            return found


def private_uses(one: Module) -> list[str]:
    """Where a module reaches into what is private to torch or to another object.

    A name is private if it begins with one underscore. A module may use those of ``self`` and ``cls``, of its own
    classes, and ``sys._getframe``.
    """
    own = {"self", "cls"} | {node.name for node in ast.walk(one.tree) if isinstance(node, ast.ClassDef)}
    docstrings = set(_docstrings(one.tree))
    found = []
    for node in ast.walk(one.tree):
        use = _private_use(one, node, own, docstrings)
        if use:
            found.append((getattr(node, "lineno", 0), use))
    return [f"{one.name}, line {line}: {use}" for line, use in sorted(found)]


def _private_use(one: Module, node: ast.AST, own: Collection[str], docstrings: Collection[int]) -> str | None:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names if any(map(_is_private, alias.name.split(".")))]
        return f"imports {', '.join(names)}" if names else None
    if isinstance(node, ast.ImportFrom):
        base = _base(one, node)
        paths = [f"{base}.{alias.name}" for alias in node.names]
        wrong = [
            path for path in paths if any(map(_is_private, path.split("."))) or path == f"{TORCH_ROOM}.lookup.find"
        ]
        return f"imports {', '.join(wrong)}" if wrong else None
    if isinstance(node, ast.Attribute) and _is_private(node.attr):
        allowed = _is_own(node.value, own) or ast.unparse(node) == "sys._getframe"
        return None if allowed else f"reads {ast.unparse(node)}"
    if isinstance(node, ast.Call) and _last_name(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
        name = node.args[1] if len(node.args) > 1 else None
        if isinstance(name, ast.Constant) and _is_private(str(name.value)) and not _is_own(node.args[0], own):
            return f"calls {ast.unparse(node)}"
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
        return f"has the path {node.value!r}" if _PRIVATE_PATH.fullmatch(node.value) else None
    return None


def _is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def _is_own(value: ast.expr, own: Collection[str]) -> bool:
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    return isinstance(value, ast.Name) and value.id in own


def _docstrings(tree: ast.Module) -> Iterator[int]:
    """The identities of the strings that stand alone, as docstrings do."""
    return (id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr))


def _base(one: Module, node: ast.ImportFrom) -> str:
    """The module that ``from ... import`` names, absolute."""
    if node.level == 0:
        return node.module or ""
    parts = one.name.split(".") if one.is_package else one.name.split(".")[:-1]
    parts = parts[: len(parts) - (node.level - 1)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _last_name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _longest_known(target: str, known: Collection[str]) -> str | None:
    parts = target.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in known), None)


def _room(name: str) -> str:
    """The folder, or the loose module, on the package's top level."""
    return [*name.split("."), "__init__"][1]
