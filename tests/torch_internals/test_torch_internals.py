"""Each private name of torch is where the installed version has it, and each function says what it relies on."""

import ast
import importlib
import re
import subprocess
import sys

import pytest
import torch
from support import layers
from support.private_tables import private_tables
from torch import nn

import gws_compile
from gws_compile.torch_internals import dynamo, inductor, lookup, private_names
from gws_compile.torch_internals.compilers import is_compiled, unwrapped
from gws_compile.torch_internals.fake_tensors import map_tensors
from gws_compile.torch_internals.private_names import PRIVATE_ATTRIBUTES, PRIVATE_NAMES

MODULES = {name: one for name, one in layers.read_modules().items() if name.startswith(layers.TORCH_ROOM + ".")}
FUNCTIONS = {
    f"{name}.{node.name}": node
    for name, one in MODULES.items()
    for node in one.tree.body
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
}


def names_found(tree):
    """The arguments of every ``find(module, name)``."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "find"]
    given = [[argument.value for argument in call.args if isinstance(argument, ast.Constant)] for call in calls]
    return {tuple(pair) for pair in given if len(pair) == 2}


FOUND = {pair for one in MODULES.values() for pair in names_found(one.tree)}


def test_every_name_is_there():
    assert ("torch._guards", "detect_fake_mode") in FOUND
    importlib.import_module("torch._inductor.lowering")  # imports the others in an order in which that is possible
    missing = [f"{path}.{name}" for path, name in sorted(FOUND) if not hasattr(importlib.import_module(path), name)]
    assert missing == []


def test_every_function_says_what_it_relies_on():
    touching = {
        name: node
        for name, node in FUNCTIONS.items()
        if names_found(node) or layers.private_uses(layers.Module(name, ast.Module([node], [])))
    }
    assert f"{layers.TORCH_ROOM}.graphs.checkpoint_body" in touching
    text = {name: " ".join((ast.get_docstring(node) or "").split()) for name, node in touching.items()}
    checked = f"Checked on torch {lookup.CHECKED_VERSIONS}."
    assert [name for name, docstring in text.items() if "Relies on " not in docstring or checked not in docstring] == []


def attributes_of(tree):
    """The private attributes that are read, written or asked for by name."""
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    asked = {
        str(call.args[1].value)
        for call in calls
        if ast.unparse(call.func) in ("getattr", "hasattr") and isinstance(call.args[1], ast.Constant)
    }
    return {name for name in read | asked if name.startswith("_") and not name.startswith("__")} - {"_C", "_fields"}


def test_the_list_has_every_private_name():
    """A new use needs its line: what is lost without it, and what public name there is."""
    assert {f"{path}.{name}" for path, name in FOUND} == set(PRIVATE_NAMES)
    found = set().union(*(attributes_of(one.tree) for one in MODULES.values()))
    own = {node.name for one in MODULES.values() for node in ast.walk(one.tree) if isinstance(node, ast.FunctionDef)}
    assert found - own - {"_getframe"} == set(PRIVATE_ATTRIBUTES)
    imported = {use for one in MODULES.values() for use in layers.private_uses(one) if "imports torch" in use}
    assert all("OpOverload" in use or "FakeTensorMode" in use for use in imported)  # for the type checker


def test_the_page_has_the_list():
    page = (layers.ROOT / "docs" / "torch.md").read_text()
    assert private_tables() in page, "run python tests/support/private_tables.py"


def test_a_missing_name_is_told_with_its_feature_and_the_versions(monkeypatch):
    use = private_names.PrivateName("drawing pictures")
    names = {"torch._dynamo.no_such": use, "torch._no_such.name": use}
    monkeypatch.setattr(lookup, "PRIVATE_NAMES", names)
    match = r"uses torch\._dynamo\.no_such for this: drawing pictures\. torch .* checked on torch 2\.11 to 2\.15"
    with pytest.raises(lookup.UnsupportedTorchError, match=match):
        lookup.find("torch._dynamo", "no_such")
    with pytest.raises(lookup.UnsupportedTorchError, match=r"uses torch\._no_such\.name"):
        lookup.find("torch._no_such", "name")


def test_what_only_tells_is_spared(monkeypatch):
    """A run does not end for the cause of a recompilation that a report would name."""
    called = []

    def gone(path, name):
        called.append(name)
        raise lookup.UnsupportedTorchError(f"uses {name}")

    monkeypatch.setattr(dynamo, "find", gone)
    with pytest.warns(gws_compile.GwsWarning, match="uses CompileContext. It goes on without"):
        assert dynamo.compilation() == ("", "")
    assert dynamo.compilation() == ("", "")  # said once
    with pytest.warns(gws_compile.GwsWarning, match="uses dynamo_timed. It goes on without"), dynamo.timed("name"):
        called.append("body")
    assert called == ["CompileContext", "CompileContext", "dynamo_timed", "body"]
    lookup._warn_once.cache_clear()


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.1+cu132", "2.15.0a0+git1234"])
def test_known_versions_are_no_news(version):
    lookup.warn_of_newer_torch(version)


@pytest.mark.parametrize("version", ["2.16.0+cu132", "3.0.0"])
def test_a_newer_torch_is_said_once(version):
    lookup.warn_of_newer_torch.cache_clear()
    with pytest.warns(gws_compile.GwsWarning, match=rf"checked on torch 2\.11 to 2\.15, this is {re.escape(version)}"):
        lookup.warn_of_newer_torch(version)
    lookup.warn_of_newer_torch(version)


def test_a_lowering_needs_every_name_from_the_start(monkeypatch):
    """What is missing is told when the lowering is registered, not while a graph is compiled."""
    used = {(path, name) for path, names in inductor._USED.items() for name in names}
    assert used == names_found(MODULES[inductor.__name__].tree)

    def find(path, name):
        if name == "Scatter":
            raise lookup.UnsupportedTorchError(name)
        return lookup.find(path, name)

    monkeypatch.setattr(inductor, "find", find)
    with pytest.raises(lookup.UnsupportedTorchError, match="Scatter"):
        inductor.register_lowering(torch.ops.aten.add.Tensor, None)


def test_importing_the_package_imports_no_inductor(tmp_path):
    program = "import sys, gws_compile; print([m for m in sys.modules if m.startswith('torch._inductor')])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.strip() == "[]"


def test_indices():
    assert inductor.flatten([1, 2], [3, 4]) == 6
    assert inductor.unflatten(6, [3, 4]) == [1, 2]
    assert inductor.unflatten(7, [9]) == [7]
    assert inductor.product([3, 4]) == 12
    assert inductor.ceildiv(7, 2) == 4
    assert [inductor.block_index(i, 7, 2) for i in range(7)] == [0, 0, 1, 1, 2, 2, 3]
    assert [inductor.block_index(i, 6, 2) for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert inductor.modular(11, 2, 3) == 2


def test_map_tensors_keeps_the_nest():
    one = torch.ones(2)
    assert map_tensors(lambda value: value.shape, ((one, 3), {"x": [one]})) == ((one.shape, 3), {"x": [one.shape]})


def test_unwrapped_goes_through_wrappers():
    model = nn.Linear(2, 2)
    compiled = torch.compile(model, backend="eager")
    assert unwrapped(compiled) is model
    assert unwrapped(model) is model
    assert is_compiled(compiled)
    assert not is_compiled(model)
