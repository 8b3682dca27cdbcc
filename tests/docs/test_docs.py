"""The documentation does what it says: its code runs, its listings are what the code gives, its links lead somewhere.

``EXPECTTEST_ACCEPT=1`` writes the listings anew. How a page marks its blocks is said in `support.pages`.

By default graphs are not compiled to machine code: AOTAutograd alone stands in for Inductor. ``-m slow`` compiles.
"""

import ast
import contextlib
import io
import os
import re
import shlex
import textwrap
import tomllib

import pytest
import torch
from support import messages
from support.pages import PAGES, ROOT, Block, anchors, blocks, links, prose, quotes, read

import gws_compile
from gws_compile.command_line.cli import COMMANDS
from gws_compile.command_line.options import Parser, text_of
from gws_compile.command_line.settings_text import CONFIG_VARIABLE, NAMES, checked, from_file, variable
from gws_compile.config import Config
from gws_compile.settings.arguments import SETTINGS
from gws_compile.torch_internals import compilers

LISTED = torch.__version__.startswith("2.13.")  # AOTAutograd's listings differ from version to version
ACCEPT = os.environ.get("EXPECTTEST_ACCEPT") == "1"
RUN = ("python", "sh", "toml", "text")


def names(page):
    return str(page.relative_to(ROOT))


def pages_with(*languages):
    return [p for p in PAGES if any(b.language in languages for b in blocks(read(p)))]


def to_check(page, *languages):
    return [b for b in blocks(read(page)) if b.language in languages and "not run" not in b.comments]


# --- Python -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def _outside(request, monkeypatch, tmp_path):
    """Another folder, no settings from outside, and no generated code."""

    def without_inductor(gm, example_inputs, *, mode, options, graph_pass):
        if graph_pass is not None:
            return compilers.aot_compile(gm, example_inputs, lambda graph, _: graph.forward, graph_pass)
        return compilers.named_compile("aot_eager", gm, example_inputs)

    if request.param == "aot_eager":
        monkeypatch.setattr(compilers, "inductor_compile", without_inductor)
    monkeypatch.chdir(tmp_path)
    for key in [k for k in os.environ if k.startswith("GWS_")]:
        monkeypatch.delenv(key)
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.usefixtures("_outside")
# docs/seeing.md works on files that its own blocks make: tests/docs/test_seeing.py
@pytest.mark.parametrize("page", [p for p in pages_with("python") if p.name != "seeing.md"], ids=names)
def test_python(page):
    namespace, printed, listings = {"__name__": f"docs.{page.stem}"}, io.StringIO(), []

    def run(text: str, line: int) -> None:
        code = compile("\n" * (line - 1) + text, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)

    for block in to_check(page, "python", "text"):
        if "before" in block.comments:
            run(textwrap.dedent(block.comments["before"]), block.line)
        if block.language == "python":
            run(block.text, block.line)
            continue
        if "shows" in block.comments:
            shown = str(eval(block.comments["shows"], namespace))
        else:
            shown, printed = printed.getvalue(), io.StringIO()
        listings.append((block, "\n".join(line.rstrip() for line in shown.strip("\n").splitlines())))
    if ACCEPT:
        accept(page, listings)
    elif LISTED:
        for block, shown in listings:
            assert block.text == shown, f"{names(page)}:{block.line}: EXPECTTEST_ACCEPT=1 writes it anew"


def accept(page, listings: list[tuple[Block, str]]) -> None:
    """Write the listings into the page, from the last to the first."""
    lines = read(page).splitlines()
    for block, shown in reversed(listings):
        start = block.line - 1
        lines[start : start + len(block.text.splitlines())] = shown.splitlines()
    page.write_text("\n".join(lines) + "\n")


# --- Commands and settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("sh"), ids=names)
def test_shell(page):
    for block in to_check(page, "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                check_variable(*words.pop(0).split("=", 1))
            if words:
                check_command(words)


def check_variable(key: str, value: str) -> None:
    if key.startswith("GWS_") and key != CONFIG_VARIABLE:
        known = {variable(name): name for name in NAMES}
        checked(known[key], value, key)


def check_command(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        targets = set(re.findall(r"^(\w+):", read(ROOT / "Makefile"), re.MULTILINE))
        assert {w for w in rest if "=" not in w} <= targets, words
    elif program == "pip":
        extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
        named = {e for extra in re.findall(r"\[([\w,]+)\]", " ".join(rest)) for e in extra.split(",")}
        assert named <= extras.keys(), words
    elif program == "torchrun":
        while rest[0].startswith("--nproc-per-node"):
            rest = rest[1 if "=" in rest[0] else 2 :]
        check_command(["python", *rest])
    elif program == "gws":
        check_gws(rest)
    elif program in ("python", ".venv/bin/python"):
        check_python(rest)
    else:
        assert program in ("cd", "git", "export", "lm_eval", "tlparse"), words


def check_gws(arguments: list[str]) -> None:
    parser = Parser(prog="gws", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_to(commands)
    parsed, unknown = parser.parse_known_args(arguments)
    assert not unknown, arguments
    for setting in SETTINGS:
        text = text_of(setting, getattr(parsed, setting.name, None))
        if text is not None:
            checked(setting.name, text, setting.name)


def check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "gws_compile"]:
        check_gws(words[2:])
    elif words[:2] == ["-m", "pytest"]:
        for word in words[2:]:
            assert word.startswith("-") or not word.endswith(".py") or (ROOT / word).exists(), words
    elif words[0] == "-m":
        assert words[1] == "pip", words
    elif words[0] != "train.py":  # the reader's own
        program = ROOT / words[0]
        assert program.exists(), words
        if program.parts[-2] in ("examples", "benchmarks"):
            source = "".join(read(path) for path in program.parent.glob("*.py"))
            for option in [word.partition("=")[0] for word in words[1:] if word.startswith("--")]:
                assert f'"{option}"' in source, words


@pytest.mark.parametrize("page", pages_with("toml"), ids=names)
def test_toml(page, tmp_path):
    for block in to_check(page, "toml"):
        path = tmp_path / "gws.toml"
        path.write_text(block.text)
        assert Config.make(**from_file(path))


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_blocks_are_of_a_known_kind(page):
    """Nothing goes unchecked by a slip of the language's name."""
    found = blocks(read(page))
    assert {b.language for b in found} <= {*RUN, "mermaid"}
    assert all(b.comments["not run"] for b in found if "not run" in b.comments)
    if "python" not in {b.language for b in found}:
        assert all("not run" in b.comments for b in found if b.language == "text")


# --- Links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links(page):
    for link in links(read(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(read(target)), link


def test_every_page_can_be_reached():
    reached, pending = set(), [ROOT / "README.md"]
    while pending:
        page = pending.pop()
        reached.add(page)
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(read(page))}
        pending += [t for t in targets if t.suffix == ".md" and t.exists() and t not in reached]
    assert set(PAGES) <= reached


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_names_exist(page):
    """Files and tests that a page names in its prose, and what it calls of the package."""
    text = prose(read(page))
    code = re.findall(r"`([^`\n]+)`", text)
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert [c for c in code if re.fullmatch(r"test_\w+", c) and c not in tests] == []
    paths = [c for c in code if re.fullmatch(r"(tests|examples|benchmarks|passes|gws_compile|docs)/[\w./-]+\.\w+", c)]
    assert [path for path in paths if not (ROOT / path).exists() and path != "gws_compile/passes/operations.py"] == []
    public = {name for c in code for name in re.findall(r"\bgws_compile\.([A-Za-z_]+)", c)}
    modules = {path.stem for path in (ROOT / "gws_compile").iterdir()}
    assert {name for name in public if not hasattr(gws_compile, name)} <= modules
    methods = {name for c in code for name in re.findall(r"\b(?:pqt|Backend)\.([A-Za-z_]+)", c)}
    assert {n for n in methods if not hasattr(gws_compile.Backend(Config.make()), n)} == set()


# --- Messages ---------------------------------------------------------------------------------------------------------

DEBUGGING = ROOT / "docs" / "debugging.md"


def explains(text: str, parts: list[str]) -> bool:
    place = 0
    for piece in re.split(r"\{\d\}", "{0}".join(parts)):
        place = text.find(piece, place)
        if place < 0:
            return False
    return True


def test_every_warning_is_explained():
    quoted = quotes(read(DEBUGGING))
    found = messages.warnings()
    assert len(found) >= 13  # the source is read at all
    assert [parts for parts in found if not any(explains(quote, parts) for quote in quoted)] == []


def test_every_reason_is_explained():
    rows = [" ".join(row.replace("`", "").split()) for row in read(DEBUGGING).splitlines() if row.startswith("| ")]
    found = messages.reasons()
    assert len(found) >= 19
    assert [parts for parts in found if not any(explains(row, parts) for row in rows)] == []


def test_every_explained_message_is_the_codes():
    source = messages.fixed_text()
    quoted = quotes(read(DEBUGGING))
    assert len(quoted) >= 13
    assert [piece for quote in quoted for piece in messages.pieces(quote) if piece not in source] == []


# --- The rest ---------------------------------------------------------------------------------------------------------


def test_the_changelog_has_this_version():
    version = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["version"]
    assert version == gws_compile.__version__
    assert f"## [{version}]" in read(ROOT / "CHANGELOG.md")


def test_the_first_line_of_each_example_says_what_it_shows():
    table = read(ROOT / "examples" / "README.md")
    for path in sorted((ROOT / "examples").glob("*.py")):
        first = (ast.get_docstring(ast.parse(read(path))) or "").partition("\n")[0]
        assert len(first) > 20, path.name
        assert first.rstrip(".:") != first, path.name  # a whole sentence
        if '__name__ == "__main__"' in read(path):
            assert f"examples/{path.name}" in table, path.name
