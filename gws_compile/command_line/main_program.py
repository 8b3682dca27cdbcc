"""Running a program as ``python train.py`` and ``python -m package.module`` do: `run_script` and `run_module`."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any


class NotFoundError(Exception):
    """There is no such program."""


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a file as the main program; what it raises, ``SystemExit`` included, comes out.

    Args:
        path: of the file.
        arguments: of the program.

    Raises:
        NotFoundError: no such file.
    """
    full = os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118  (as Python does: links and ".." are kept)
    try:
        with io.open_code(full) as file:
            source = file.read()
    except OSError as error:
        raise NotFoundError(f"can't open file {full!r}: {error.strerror}") from None
    sys.argv = [path, *arguments]
    _first_on_path(str(Path(path).resolve().parent))
    main = _main_module(full, SourceFileLoader("__main__", full), None)
    with _raising_as_own():
        exec(compile(source, full, "exec", dont_inherit=True), vars(main))


def run_module(name: str, arguments: Sequence[str]) -> None:
    """Run a module, or the ``__main__`` of a package, as the main program.

    Args:
        name: of the module.
        arguments: of the program.

    Raises:
        NotFoundError: no such module.
    """
    _first_on_path(str(Path.cwd()))
    with _raising_as_own():
        spec = _find_spec(name)
        if spec.submodule_search_locations is not None:
            spec = _find_spec(f"{name}.__main__")
        get_code = getattr(spec.loader, "get_code", None)
        if get_code is None:
            raise NotFoundError(f"No code object available for {name}")
        sys.argv = [spec.origin or name, *arguments]
        main = _main_module(spec.origin, spec.loader, spec)
        exec(get_code(spec.name), vars(main))


def _find_spec(name: str) -> ModuleSpec:
    try:
        spec = importlib.util.find_spec(name)  # imports the parents
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise NotFoundError(f"No module named {error.name!r}") from None
        raise
    if spec is None:
        raise NotFoundError(f"No module named {name}")
    return spec


def _first_on_path(folder: str) -> None:
    """Put the program's folder where the interpreter has put this program's, unless it was told not to."""
    if not sys.flags.safe_path:
        sys.path[0] = folder


def _main_module(file: str | None, loader: Any, spec: ModuleSpec | None) -> ModuleType:
    """A fresh ``__main__``, in place of this program's; multiprocessing finds by it what a new process imports."""
    main = ModuleType("__main__")
    values = {
        "__file__": file,
        "__builtins__": sys.modules["builtins"],
        "__loader__": loader,
        "__spec__": spec,
        "__package__": None if spec is None else spec.parent,
        "__annotations__": {},
    }
    vars(main).update({key: value for key, value in values.items() if key != "__file__" or value is not None})
    _kept.append(sys.modules["__main__"])
    sys.modules["__main__"] = main
    return main


_kept: list[ModuleType] = []  # a module whose last reference goes is emptied


@contextmanager
def _raising_as_own() -> Iterator[None]:
    """Let what the program raises out as it would come out of the program alone."""
    try:
        yield
    except (SystemExit, NotFoundError):
        raise
    except BaseException as error:
        _leave_ours_out(error, set())
        _print_without_ours(error, error.__traceback__)
        raise


def _leave_ours_out(error: BaseException | None, done: set[int]) -> None:
    """Take our frames out of the traceback of an error, and of those that led to it.

    Those between the program's frames, and before the first of them (all of them, where it did not come to run: a
    syntax error). What we raise ourselves keeps those that show where.
    """
    if error is None or id(error) in done:
        return
    done.add(id(error))
    entries = []
    entry = error.__traceback__
    while entry is not None:
        entries.append(entry)
        entry = entry.tb_next
    raised_here = bool(entries) and _module_of(entries[-1]) not in (__name__, "") and _is_ours(entries[-1])
    kept = [e for e in entries if _module_of(e) != __name__ and (raised_here or not _is_ours(e))]
    following = None
    for entry in reversed(kept):
        entry.tb_next = following
        following = entry
    error.__traceback__ = following
    _leave_ours_out(error.__cause__, done)
    _leave_ours_out(error.__context__, done)


def _module_of(entry: TracebackType) -> str:
    return str(entry.tb_frame.f_globals.get("__name__", ""))


def _is_ours(entry: TracebackType) -> bool:
    return _module_of(entry).partition(".")[0] == __name__.partition(".")[0]


def _print_without_ours(error: BaseException, traceback: TracebackType | None) -> None:
    """Have the interpreter, which prints the error when it has come out of this program too, leave our frames out.

    The error is raised on, not printed here, so that whatever else follows from it is the interpreter's own: the exit
    code, and the signal that ends a program after Ctrl-C. A hook that the program has set is called as it would be.
    """
    hook = sys.excepthook

    def excepthook(kind: type[BaseException], value: BaseException, seen: TracebackType | None) -> None:
        if value is error:
            value.__traceback__ = seen = traceback
        hook(kind, value, seen)

    sys.excepthook = excepthook
