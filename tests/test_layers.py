"""The order of the layers, as the imports of the sources have it, and what is private to torch."""

from pathlib import Path

import pytest
from support import layers
from support.layers import LAYERS, PACKAGE, ROOT, TORCH_ROOM, Arrow, module

MODULES = layers.read_modules()
ARROWS = [arrow for one in MODULES.values() for arrow in layers.arrows_of(one, MODULES)]

TOP_LEVEL_MODULES = {"__init__", "__main__", "api", "config", "figures", "source_names", "warning", "weight_names"}
TOP_LEVEL_FOLDERS = set().union(*LAYERS) - TOP_LEVEL_MODULES - {"passes"}

TAKEN = {"advise", "backend", "explain", "sample", "quantize", "operator"}
"""Names of public functions, which a submodule of that name would replace, and of a module of the standard library."""


def listed(found: list[str]) -> str:
    return "\n".join(["", *found])


def names_in(folder: Path) -> tuple[set[str], set[str]]:
    """The modules and the folders."""
    folders = {entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name != "__pycache__"}
    return {file.stem for file in folder.glob("*.py")}, folders


def test_the_whole_package_is_read():
    assert {PACKAGE, f"{PACKAGE}.api", f"{PACKAGE}.passes", f"{PACKAGE}.passes.weights", TORCH_ROOM} <= set(MODULES)
    assert Arrow(PACKAGE, f"{PACKAGE}.api", 1) in [Arrow(a.importer, a.imported, 1) for a in ARROWS]


def test_imports_go_down():
    found = layers.against_the_layers(ARROWS)
    assert not found, listed(found)


def test_no_modules_import_each_other():
    found = layers.circles(ARROWS)
    assert not found, listed(found)


def test_private_torch_lies_in_its_room():
    outside = [one for name, one in MODULES.items() if not f"{name}.".startswith(f"{TORCH_ROOM}.")]
    found = [use for one in outside for use in layers.private_uses(one)]
    assert not found, listed(found)


def test_the_top_level_takes_no_public_name():
    modules, folders = names_in(ROOT / PACKAGE)
    found = sorted((modules | folders | {"passes"}) & TAKEN)
    assert not found, f"{found}: gws_compile has public functions, or Python a module, of these names"


def test_the_top_level_holds_only_its_modules():
    modules, folders = names_in(ROOT / PACKAGE)
    assert modules == TOP_LEVEL_MODULES
    assert folders <= TOP_LEVEL_FOLDERS, f"{sorted(folders - TOP_LEVEL_FOLDERS)}: in none of the layers"


# --- The reading itself, on made-up sources --------------------------------------------------------------------------

KNOWN = [
    "gws_compile",
    "gws_compile.api",
    "gws_compile.compiler",
    "gws_compile.compiler.backend",
    "gws_compile.passes",
    "gws_compile.passes.weights",
    "gws_compile.numerics.noise",
    "gws_compile.torch_internals",
    "gws_compile.torch_internals.lookup",
    "gws_compile.warning",
]


@pytest.mark.parametrize(
    ("source", "imported"),
    [
        ("import gws_compile", "gws_compile"),
        ("import gws_compile.compiler.backend as b", "gws_compile.compiler.backend"),
        ("from gws_compile.compiler import backend", "gws_compile.compiler.backend"),
        ("from gws_compile.compiler import something", "gws_compile.compiler"),
        ("from gws_compile import passes", "gws_compile.passes"),
        ("from . import weights", "gws_compile.passes.weights"),
        ("from . import rewrite", "gws_compile.passes"),
        ("from .weights import Weight", "gws_compile.passes.weights"),
        ("from .. import api", "gws_compile.api"),
        ("from ..numerics.noise import Noise", "gws_compile.numerics.noise"),
        ("def f():\n    from ..compiler import backend", "gws_compile.compiler.backend"),
        ("if TYPE_CHECKING:\n    from ..api import backend", "gws_compile.api"),
        ("importlib.import_module('gws_compile.api')", "gws_compile.api"),
    ],
)
def test_every_form_of_import_is_seen(source, imported):
    one = module("gws_compile.passes.find_reads", source)
    assert [arrow.imported for arrow in layers.arrows_of(one, KNOWN)] == [imported]


def test_relative_imports_of_a_package_begin_in_it():
    one = module("gws_compile.passes", "from .weights import Weight\nfrom ..api import backend", is_package=True)
    assert [arrow.imported for arrow in layers.arrows_of(one, KNOWN)] == [
        "gws_compile.passes.weights",
        "gws_compile.api",
    ]


def test_other_packages_are_no_arrows():
    one = module("gws_compile.passes.find_reads", "import torch\nfrom collections import abc\nx = 'gws_compile.api'")
    assert layers.arrows_of(one, KNOWN) == []


@pytest.mark.parametrize(
    ("importer", "imported", "wrong"),
    [
        ("passes.find_reads", "compiler.backend", True),
        ("numerics.noise", "config", True),
        ("warning", "numerics.noise", True),
        ("compiler.backend", "passes", False),
        ("passes.find_reads", "passes.weights", False),
        ("torch_internals.dynamo", "warning", False),
        ("config", "weight_names", False),
        ("compiler.backend", "shed", True),
    ],
)
def test_an_arrow_upwards_is_flagged(importer, imported, wrong):
    found = layers.against_the_layers([Arrow(f"gws_compile.{importer}", f"gws_compile.{imported}", 7)])
    assert bool(found) == wrong
    assert all("line 7" in message for message in found)


def test_the_package_itself_lies_on_top():
    assert layers.against_the_layers([Arrow("gws_compile.api", "gws_compile", 1)]) == []
    assert layers.against_the_layers([Arrow("gws_compile.config", "gws_compile", 1)])


def test_a_circle_is_flagged():
    there = [Arrow("a", "b", 1), Arrow("b", "c", 1), Arrow("a", "c", 1)]
    assert layers.circles(there) == []
    (circle,) = layers.circles([*there, Arrow("c", "a", 1)])
    assert circle.split(" <- ")[0] == circle.split(" <- ")[-1]
    assert len(layers.circles([*there, Arrow("b", "a", 1), Arrow("d", "e", 1), Arrow("e", "d", 1)])) == 2


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "import torch.utils._pytree as pytree",
        "from torch.utils._pytree import tree_map",
        "from torch import _C",
        "from torch._inductor.ir import Pointwise",
        "def f():\n    from torch import _dynamo",
        "from .weights import _hidden",
        "torch._dynamo.reset()",
        "torch._C._is_tracing()",
        "torch.ops.gws.sample_weight.default._schema",
        "value._local_tensor",
        "self.module._call_impl",
        "self._module._call_impl",
        "value._x = 1",
        "Elsewhere._make()",
        "getattr(value, '_local_tensor', None)",
        "setattr(value, '_x', 1)",
        "find('torch._guards', 'CompileContext')",
        "importlib.import_module('torch._inductor.ir')",
        "from gws_compile.torch_internals.lookup import find",
        "from ..torch_internals.lookup import find",
    ],
)
def test_a_private_use_is_flagged(source):
    found = layers.private_uses(module("gws_compile.passes.fold", source))
    assert found
    assert all(use.startswith("gws_compile.passes.fold, line ") for use in found)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nfrom torch import fx",
        "from __future__ import annotations",
        "from ..torch_internals.lookup import UnsupportedTorchError",
        "self._x = cls._y",
        "super()._x()",
        "class Own:\n    def f(self):\n        return Own._made",
        "getattr(self, '_x')",
        "getattr(value, '__self__', None)",
        "value.__dict__",
        "sys._getframe(1)",
        "_helper(value)",
        "'''A docstring may say torch._dynamo.'''",
        "path = 'torch.nn.functional'",
        "message = 'call torch._dynamo.reset() after that'",
    ],
)
def test_what_is_allowed_is_not_flagged(source):
    assert layers.private_uses(module("gws_compile.passes.fold", source)) == []
