"""Each private name of torch is where the installed version has it, and each function says what it relies on."""

import ast
import importlib
import subprocess
import sys

import pytest
import torch
from support import layers
from torch import nn

from gws_compile.torch_internals import inductor, lookup
from gws_compile.torch_internals.compilers import is_compiled, unwrapped
from gws_compile.torch_internals.fake_tensors import map_tensors

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


def test_a_missing_name_is_told_with_the_versions():
    with pytest.raises(
        lookup.UnsupportedTorchError, match=r"uses torch\._dynamo\.no_such.*checked on torch 2\.11 and 2\.13"
    ):
        lookup.find("torch._dynamo", "no_such")
    with pytest.raises(lookup.UnsupportedTorchError, match=r"uses torch\._no_such\.name"):
        lookup.find("torch._no_such", "name")


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
