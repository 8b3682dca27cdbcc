"""Dynamo's sources read: every form as text, every class of source that torch has, and real models."""

import collections
import dataclasses
import functools
import itertools
import types

import pytest
import torch
import torch._dynamo.source as dynamo_source
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gws_compile.source_names import base_of, is_buffer, is_parameter, parameter_path, prefixes_of
from gws_compile.torch_internals.graphs import placeholder_source

# --- Forms, as text ---------------------------------------------------------------------------------------------------

W = "._parameters['weight']"

FORMS = [
    # Modules: (source, base, path)
    (f"L['self']{W}", "L['self']", ["weight"]),
    (f"L['self']._modules['fc']{W}", "L['self']", ["fc", "weight"]),
    (f"L['self']._modules['blocks']._modules['0']._modules['fc']{W}", "L['self']", ["blocks", "0", "fc", "weight"]),
    (f"L['model']._modules['module']._modules['_orig_mod']{W}", "L['model']", ["module", "_orig_mod", "weight"]),
    ("L['self']._modules['weights']._parameters['0']", "L['self']", ["weights", "0"]),
    ("L['self']._buffers['table']", "L['self']", ["table"]),
    (f"G['model']._modules['fc']{W}", "G['model']", ["fc", "weight"]),
    (f'G["model"]._modules["fc"]{W}', 'G["model"]', ["fc", "weight"]),
    (f"SYNTHETIC_LOCAL['tmp_1']._modules['fc']{W}", "SYNTHETIC_LOCAL['tmp_1']", ["fc", "weight"]),
    # A class with its own __getattr__, or one that sets an attribute on itself.
    (f"L['self'].__dict__['_modules']['fc']{W}", "L['self']", ["fc", "weight"]),
    ("L['self'].__dict__['_parameters']['w']", "L['self']", ["w"]),
    ("L['self'].__dict__['_buffers']['table']", "L['self']", ["table"]),
    (f"L['self'].__dict__['_modules']['a'].__dict__['_modules']['b']{W}", "L['self']", ["a", "b", "weight"]),
    ("L['self']._modules['a'].__dict__['_modules']['b'].__dict__['_parameters']['c']", "L['self']", ["a", "b", "c"]),
    ("L['self'].__dict__['weight']", "L['self']", ["weight"]),
    (f"L['self'].__dict__['layers'][3]{W}", "L['self']", ["layers", "3", "weight"]),
    # Attributes.
    ("L['self'].fc.weight", "L['self']", ["fc", "weight"]),
    ("L['model'].blocks[0].fc.weight", "L['model']", ["blocks", "0", "fc", "weight"]),
    ("L['self'].fc.weight.data", "L['self']", ["fc", "weight"]),
    (f"L['self']._modules['fc']{W}.data", "L['self']", ["fc", "weight"]),
    (f"L['self'].blocks._modules['0']{W}", "L['self']", ["blocks", "0", "weight"]),
    (f"getattr(L['self'], 'a b')._modules['c']{W}", "L['self']", ["a b", "c", "weight"]),
    (f"object.__getattribute__(L['self'], '_modules')['fc']{W}", "L['self']", ["fc", "weight"]),
    ("getattr(L['self'], '_parameters')['w']", "L['self']", ["w"]),
    ("___getattr(L['self'], 'fc').weight", "L['self']", ["fc", "weight"]),
    ("type(L['self']).shared.weight", "L['self']", ["shared", "weight"]),
    (f"dict(type(L['self']).__dict__)['shared']{W}", "L['self']", ["shared", "weight"]),
    (f"L['self'].__class__.__mro__[1].__dict__['shared']{W}", "L['self']", ["shared", "weight"]),
    (f"type(L['self']).__mro__[1].__dict__['shared']{W}", "L['self']", ["shared", "weight"]),
    # Containers: attribute and key.
    (f"L['self'].layers[3]{W}", "L['self']", ["layers", "3", "weight"]),
    (f"L['self'].layers[-1]{W}", "L['self']", ["layers", "-1", "weight"]),
    (f"L['self'].heads['a.b']{W}", "L['self']", ["heads", "a.b", "weight"]),
    (f"L['self'].heads[(1, 'a')]{W}", "L['self']", ["heads", "(1, 'a')", "weight"]),
    (f"L['self'].heads[None][2.5][torch.float32]{W}", "L['self']", ["heads", "None", "2.5", "torch.float32", "weight"]),
    ("L['self'].pair[0]", "L['self']", ["pair", "0"]),
    (f"L['models']['actor']._modules['fc']{W}", "L['models']", ["actor", "fc", "weight"]),
    (f"L['args'][1]._modules['fc']{W}", "L['args']", ["1", "fc", "weight"]),
    (f"L['kwargs']['model']._modules['fc']{W}", "L['kwargs']", ["model", "fc", "weight"]),
    (f"L['state'].model._modules['fc']{W}", "L['state']", ["model", "fc", "weight"]),
    (f"dict.__getitem__(L['d'], 'a')._modules['fc']{W}", "L['d']", ["a", "fc", "weight"]),
    (f"dict.__getitem__(L['d'], list(dict.keys(L['d']))[2]){W}", "L['d']", ["2", "weight"]),
    (f"L['d'][list(dict.keys(L['d']))[2]]{W}", "L['d']", ["2", "weight"]),
    (f"L['d'][list(L['d'].keys())[2]]{W}", "L['d']", ["2", "weight"]),
    (f"list(dict.keys(L['d']))[0]{W}", "L['d']", ["0", "weight"]),
    (f"list(L['modules'])[1]{W}", "L['modules']", ["1", "weight"]),
    (f"list.__getitem__(L['self'].layers, 0){W}", "L['self']", ["layers", "0", "weight"]),
    (f"___tuple_iterator_getitem(L['it'], 1){W}", "L['it']", ["1", "weight"]),
    (f"___dict_getitem(L['d'], 'a'){W}", "L['d']", ["a", "weight"]),
    (f"dict(L['d'])['x']{W}", "L['d']", ["x", "weight"]),
    (f"L['d'].get('x'){W}", "L['d']", ["x", "weight"]),
    (f"dict.get(L['d'], 'x'){W}", "L['d']", ["x", "weight"]),
    ("L['self']._modules.get('fc')._parameters.get('weight')", "L['self']", ["fc", "weight"]),
    ("dict.__getitem__(L['self']._parameters, 'w')", "L['self']", ["w"]),
    # What functional_call takes.
    ("L['params']['blocks.0.fc.weight']", "L['params']", ["blocks.0.fc.weight"]),
    # A variable that is the weight.
    ("L['w']", "L['w']", []),
    ("G['w'].data", "G['w']", []),
    ("L['fn'].__closure__[2].cell_contents", "L['fn'].__closure__[2].cell_contents", []),
    # Resumed frames.
    (f"L['___stack0']._modules['fc']{W}", "L['___stack0']", ["fc", "weight"]),
    (f"L['___stack1'][0]{W}", "L['___stack1']", ["0", "weight"]),
    # Functions: what they are bound to, their closures, defaults, arguments.
    (f"L['fn'].__self__._modules['fc']{W}", "L['fn'].__self__", ["fc", "weight"]),
    (f"L['fn'].__func__.__closure__[0].cell_contents{W}", "L['fn'].__func__.__closure__[0].cell_contents", ["weight"]),
    (f"L['fn'].__wrapped__.__self__.fc{W}", "L['fn'].__wrapped__.__self__", ["fc", "weight"]),
    (f"L['fn'].__closure__[0].cell_contents.fc{W}", "L['fn'].__closure__[0].cell_contents", ["fc", "weight"]),
    (f"L['fn'].__closure__[0].cell_contents['a'][1]{W}", "L['fn'].__closure__[0].cell_contents", ["a", "1", "weight"]),
    (f"G['f'].__defaults__[0]._modules['fc']{W}", "G['f'].__defaults__[0]", ["fc", "weight"]),
    (f"G['f'].__kwdefaults__['model']._modules['fc']{W}", "G['f'].__kwdefaults__['model']", ["fc", "weight"]),
    (f"L['fn'].args[0]._modules['fc']{W}", "L['fn'].args[0]", ["fc", "weight"]),
    (f"G['part'].keywords['model']._modules['fc']{W}", "G['part'].keywords['model']", ["fc", "weight"]),
    (f"G['part'].func._modules['fc']{W}", "G['part'].func", ["fc", "weight"]),
    (f"G['part'].func.__self__._modules['fc']{W}", "G['part'].func.__self__", ["fc", "weight"]),
    (f"L['self'].args[0]{W}", "L['self']", ["args", "0", "weight"]),
    (f"L['self']._modules['func']{W}", "L['self']", ["func", "weight"]),
    # Weak references, other files.
    (f"G['__weakref_3']()._modules['fc']{W}", "G['__weakref_3']()", ["fc", "weight"]),
    (f"L['self'].owner()._modules['fc']{W}", "L['self']", ["owner", "fc", "weight"]),
    (f"L['self'].get_base()._modules['fc']{W}", "L['self']", ["fc", "weight"]),
    (f"G['__import_nets_dot_file'].model.fc{W}", "G['__import_nets_dot_file'].model", ["fc", "weight"]),
    (f"__import__('nets').model.fc{W}", "__import__('nets').model", ["fc", "weight"]),
    # Names with everything in them.
    (f"""L['self']._modules["it's"]{W}""", "L['self']", ["it's", "weight"]),
    (f"L['self']._modules['x[0]']._modules['(a, b)']{W}", "L['self']", ["x[0]", "(a, b)", "weight"]),
    (f"L['self']._modules['a\"b\\'c']._modules['{{d}}']{W}", "L['self']", ["a\"b'c", "{d}", "weight"]),
    (f"L['self']._modules['back\\\\slash\\n']._modules['größe']{W}", "L['self']", ["back\\slash\n", "größe", "weight"]),
    (f"L['self']._modules['_parameters']._modules['__dict__']{W}", "L['self']", ["_parameters", "__dict__", "weight"]),
    ("L['self']._parameters['w-x']", "L['self']", ["w-x"]),
    (f"L['self']._modules['data']._modules['grad']{W}", "L['self']", ["data", "grad", "weight"]),
    ("L['self']._parameters['data']", "L['self']", ["data"]),
    ("L['self']._parameters['grad']", "L['self']", ["grad"]),
    (f"L['self']._modules['{'x' * 300}']{W}", "L['self']", ["x" * 300, "weight"]),
    ("L['self']" + "._modules['a']" * 60 + W, "L['self']", [*["a"] * 60, "weight"]),
]  # fmt: skip


@pytest.mark.parametrize(("source", "base", "path"), FORMS)
def test_forms(source, base, path):
    assert parameter_path(source) == tuple(path)
    assert base_of(source) == base
    prefixes = prefixes_of(source)
    assert prefixes[-1] == source
    assert base in prefixes
    assert all(inner in outer for inner, outer in itertools.pairwise(prefixes))


NOT_UNDERSTOOD = [
    "",
    "L",
    "x",
    "3",
    "L[",
    "L[0]",
    "<ephemeral: view>",
    "random_value_0",
    "L['self'].layers[1:3].weight",
    "(0, L['self'].weight)",
    "L['self'].weight + 1",
    "L['self'].weight.size()[0]",
    "L['self'].weight.stride()[0]",
    "L['self'].weight.storage_offset()",
    "L['self'].weight.item()",
    "L['self'].weight.__neg__()",
    "L['self'].__dict__",
    "L['self'].__dict__.weight",
    "L['self'].shaped(3)",
    "___from_numpy(L['x'])",
    "___as_tensor(L['x'])",
    "cast_symbool_to_symint_guardless(L['x'])",
    "\0",
    "(" * 500 + "L['self']" + ")" * 500,
]


@pytest.mark.parametrize("source", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_none(source):
    assert parameter_path(source) is None
    assert not is_parameter(source)
    assert not is_buffer(source)


@pytest.mark.parametrize(
    "source",
    [
        "L['self'].param_groups[0]['params'][3].grad",
        "L['self']._modules['fc']._parameters['weight'].grad",
        "L['self']._modules['fc']._parameters['weight']._local_tensor",
        "L['self']._modules",
        "L['self']._modules.fc",
        "L['self']._modules[list(dict.keys(L['self']._modules))[0]]._parameters['weight']",
    ],
)
def test_what_is_no_weight_has_no_path(source):
    assert parameter_path(source) is None
    assert base_of(source) == "L['self']"


@pytest.mark.parametrize(
    ("source", "parameter", "buffer"),
    [
        ("L['self']._parameters['w']", True, False),
        ("L['self'].__dict__['_parameters']['w']", True, False),
        ("L['self'].__dict__['_modules']['a']._parameters['w'].data", True, False),
        ("dict.__getitem__(L['self']._parameters, 'w')", True, False),
        ("L['self']._buffers['w']", False, True),
        ("L['self'].__dict__['_buffers']['w']", False, True),
        ("L['self']._modules['w']", False, False),
        ("L['self']['_parameters']['w']", False, False),
        ("L['self'].fc.weight", False, False),
        ("L['self']._parameters['w'].grad", False, False),
        ("L['_parameters']['w']", False, False),
        ("L['w']", False, False),
    ],
)
def test_what_a_module_has_registered(source, parameter, buffer):
    assert is_parameter(source) == parameter
    assert is_buffer(source) == buffer


def test_the_way_to_a_weight():
    source = "L['d']['m'].__dict__['_modules']['fc']._parameters['weight']"
    assert prefixes_of(source) == (
        "L['d']",
        "L['d']['m']",
        "L['d']['m'].__dict__",
        "L['d']['m'].__dict__['_modules']",
        "L['d']['m'].__dict__['_modules']['fc']",
        "L['d']['m'].__dict__['_modules']['fc']._parameters",
        source,
    )
    assert prefixes_of("x") == ()
    assert base_of("x") == "x"


# --- The classes of torch's sources -----------------------------------------------------------------------------------

CHAINED = {
    # Of ``SOURCE(L['self'])._parameters['weight']``: the arguments behind the base, and the path.
    "AttrProxySource": ((), ["weight"]),
    "AttrSource": (("fc",), ["fc", "weight"]),
    "CallFunctionNoArgsSource": ((), ["weight"]),
    "CellContentsSource": (("cell_contents",), ["weight"]),
    "ConstDictKeySource": ((1,), ["1", "weight"]),
    "ContextVarGetSource": ((), ["get", "weight"]),
    "DefaultsSource": ((0,), ["weight"]),
    "DictGetItemSource": (("a",), ["a", "weight"]),
    "DictSubclassGetItemSource": (("a",), ["a", "weight"]),
    "FSDPNNModuleSource": ((), ["weight"]),
    "GenericAttrSource": (("fc",), ["fc", "weight"]),
    "GetItemSource": ((3,), ["3", "weight"]),
    "ListGetItemSource": ((3,), ["3", "weight"]),
    "NNModuleSource": ((), ["weight"]),
    "NonSerializableSetGetItemSource": ((1,), ["1", "weight"]),
    "OptimizerSource": ((), ["weight"]),
    "ParamBufferSource": (("fc",), ["fc", "weight"]),
    "SkipGuardSource": ((), ["weight"]),
    "TupleIteratorGetItemSource": ((2,), ["2", "weight"]),
    "TypeSource": ((), ["weight"]),
    "UnspecializedBuiltinNNModuleSource": ((), ["weight"]),
    "UnspecializedNNModuleSource": ((), ["weight"]),
    "UnspecializedParamBufferSource": (("fc",), ["fc", "weight"]),
    "WeakRefCallSource": ((), ["weight"]),
    "CallMethodItemSource": ((), None),
    "ConvertIntSource": ((), None),
    "DataclassFieldsSource": ((), None),
    "DynamicScalarSource": ((True,), None),
    "FlattenScriptObjectSource": ((), None),
    "FloatTensorSource": ((), None),
    "IndexedSource": ((0,), None),
    "NamedTupleFieldsSource": ((), None),
    "NegateSource": ((), None),
    "NumpyTensorSource": ((), None),
    "ScriptObjectQualifiedNameSource": ((), None),
    "SubclassAttrListSource": ((), None),
}

OTHERS = {
    # Parts of ways that are written out in FORMS: of a class, a function's closure and code, a gradient.
    *("ClosureSource", "CodeSource", "GradSource", "TypeDictSource", "TypeMROSource"),
    # Where a way begins.
    *("GlobalSource", "GlobalWeakRefSource", "ImportSource", "LocalSource", "SyntheticLocalSource"),
    # To no weight.
    *("BackwardStateSource", "ConstantSource", "CurrentStreamSource", "EphemeralSource", "GlobalStateSource"),
    *("LocalCellSource", "RandomValueSource", "ShapeEnvSource", "TempLocalSource", "TensorPropertySource"),
    "TorchFunctionModeStackSource",
    # From torch 2.15 on: a reversed list that is held by its iterator; a collective's result.
    *("ListReverseIteratorBackingListSource", "UnwrapCollectiveTensorSource"),
}  # fmt: skip

BASES = {"ChainedSource", "Source"}


def source_classes():
    """Every class of source that this torch has, by name."""
    found = {name: value for name, value in vars(dynamo_source).items() if isinstance(value, type)}
    return {name: value for name, value in found.items() if issubclass(value, dynamo_source.Source)}


def written(source):
    """The source as text: an attribute of newer torch, a method of older."""
    return source.name() if callable(source.name) else source.name


def test_every_class_of_source_is_known():
    """A version of torch that brings a new one is to be looked at."""
    assert sorted(source_classes().keys() - CHAINED.keys() - OTHERS - BASES) == []


@pytest.mark.parametrize("name", CHAINED)
def test_classes_of_sources(name):
    arguments, path = CHAINED[name]
    kind = source_classes().get(name)
    if kind is None:
        pytest.skip(f"not in torch {torch.__version__}")
    local = dynamo_source.LocalSource("self")
    source = dynamo_source.AttrSource(kind(local, *arguments), "_parameters")
    text = written(dynamo_source.DictGetItemSource(source, "weight"))
    assert parameter_path(text) == (None if path is None else tuple(path))
    assert is_parameter(text) == (path is not None)


# --- Real models ------------------------------------------------------------------------------------------------------


def recorded(function, *args, model, **kwargs):
    """Source, and the name in the model, of each Parameter that graphs of a compiled function take."""
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    found = []

    def backend(gm, example_inputs):
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
            if isinstance(value, torch.Tensor) and id(value) in names:
                found.append((placeholder_source(node), names[id(value)]))
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend)
    compiled(*args, **kwargs)
    return found


def check(found, count, prefix=""):
    """The path of every source is its name in the model, behind what leads to the model."""
    assert len(found) == count, found
    for source, name in found:
        path = parameter_path(source)
        assert path is not None, source
        assert ".".join(path) == prefix + name, source
        assert is_parameter(source) or path[-1] == name.rpartition(".")[2]


class Net(nn.Module):
    """Nine Parameters, in all kinds of containers of torch."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)
        self.w = nn.Parameter(torch.eye(4))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU()) for _ in range(2))
        self.heads = nn.ModuleDict({"it's": nn.Linear(4, 4, bias=False), 'x[0]"': nn.Linear(4, 4, bias=False)})
        self.list = nn.ParameterList([nn.Parameter(torch.eye(4))])
        self.dict = nn.ParameterDict({"a b": nn.Parameter(torch.eye(4))})

    def forward(self, x):
        x = self.fc(x) @ self.w
        for block in self.blocks:
            x = block(x)
        for head in self.heads.values():
            x = head(x)
        return x @ self.list[0] @ self.dict["a b"]


ALL = 8


class OwnGetattr(Net):
    def __getattr__(self, name):
        return super().__getattr__(name)


class SetsAttributes(Net):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class Recomputed(Net):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Broken(Net):
    """A graph break: the rest is a resumed frame, which has its own locals."""

    def forward(self, x):
        x = self.fc(x) @ self.w
        torch._dynamo.graph_break()
        for block in self.blocks:
            x = block(x)
        torch._dynamo.graph_break()
        for head in self.heads.values():
            x = head(x)
        return x @ self.list[0] @ self.dict["a b"]


class BrokenGetattr(Broken, OwnGetattr):
    pass


class OwnCall(Net):
    __slots__ = ("_extra",)

    def __call__(self, *args):
        return super().__call__(*args)


class Parts(nn.Module):
    """A model inside a model, reached by a property and by ``get_submodule``."""

    def __init__(self):
        super().__init__()
        self.inner = OwnGetattr()

    @property
    def alias(self):
        return self.inner.fc

    def forward(self, x):
        x = self.alias(x) @ dict(self.inner.named_parameters())["w"]
        x = self.get_submodule("inner.blocks.0")(self.inner._modules["blocks"][1](x))
        for parameter in self.inner.heads.parameters():
            x = x @ parameter
        return x @ self.inner.get_parameter("list.0") @ self.inner.dict["a b"]


@pytest.mark.parametrize("kind", [Net, OwnGetattr, SetsAttributes, Recomputed, Broken, BrokenGetattr, OwnCall, Parts])
def test_models(kind):
    model = kind()
    check(recorded(model, torch.ones(4, 4), model=model), ALL)
    check(recorded(model.forward, torch.ones(4, 4), model=model), ALL)


def test_hooks():
    model = Net()
    model.heads["it's"].register_forward_hook(lambda module, args, out: out @ module.weight)
    model.register_forward_pre_hook(lambda module, args: (args[0] @ module.w,))
    check(recorded(model, torch.ones(4, 4), model=model), ALL + 1)  # the outermost module's hook is a frame of its own


def test_parametrizations():
    model = Net()
    nn.utils.parametrizations.weight_norm(model.fc)
    nn.utils.parametrizations.orthogonal(model.blocks[0][0])
    found = recorded(model, torch.ones(4, 4), model=model)
    check(found, ALL + 1)
    assert "blocks.0.0.parametrizations.weight.original" in [name for _, name in found]


def test_a_tied_weight_is_named_by_one_of_its_places():
    model = Net()
    model.heads["it's"].weight = model.fc.weight
    sources = [source for source, name in recorded(model, torch.ones(4, 4), model=model) if name.endswith("weight")]
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is model.fc.weight]
    assert [".".join(path) in names for path in map(parameter_path, sources)].count(True) == 1


class Unregistered(nn.Module):
    """Plain containers, which ``named_parameters`` does not know."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(4, 4, bias=False) for _ in range(4)]
        self.heads = {"a.b": nn.Linear(4, 4, bias=False), 3: nn.Linear(4, 4, bias=False)}
        self.pair = (nn.Parameter(torch.eye(4)), None)
        self.__dict__["hidden"] = nn.Linear(4, 4, bias=False)
        setattr(self, "a list", [nn.Linear(4, 4, bias=False)])

    def forward(self, x):
        for module in (self.layers[3], self.heads["a.b"], self.heads[3], self.hidden, getattr(self, "a list")[0]):
            x = module(x)
        return x @ self.pair[0]


class UnregisteredGetattr(Unregistered):
    def __getattr__(self, name):
        return super().__getattr__(name)


@pytest.mark.parametrize("kind", [Unregistered, UnregisteredGetattr])
def test_plain_containers(kind):
    model = kind()
    known = nn.ModuleDict({str(i): layer for i, layer in enumerate(layers_of(model))})
    known.pair = model.pair[0]
    paths = [parameter_path(source) for source, _ in recorded(model, torch.ones(4, 4), model=known)]
    assert paths == [
        ("layers", "3", "weight"),
        ("heads", "a.b", "weight"),
        ("heads", "3", "weight"),
        ("hidden", "weight"),
        ("a list", "0", "weight"),
        ("pair", "0"),
    ]


def layers_of(model):
    return [model.layers[3], *model.heads.values(), model.hidden, getattr(model, "a list")[0]]


MODEL = Net()


@dataclasses.dataclass
class State:
    model: nn.Module
    models: list


class Trainer:
    __slots__ = ("model",)

    def __init__(self):
        self.model = MODEL

    def run(self, x):
        return self.model(x)


class DictOfOwn(dict):
    pass


class ListOfOwn(list):
    pass


Pair = collections.namedtuple("Pair", "model other")


def on_global(x):
    return MODEL(x)


def on_default(x, model=MODEL):
    return model(x)


def on_keyword_default(x, *, models=(MODEL,)):
    return models[0](x)


def on_closure(model):
    return lambda x: model(x)


def calling(function):
    return lambda x: function(x)


HOLDERS = [
    # A function, its further arguments, and what stands before the model's own names.
    ("global", on_global, (), ""),
    ("default", on_default, (), ""),
    ("default of a called one", calling(on_default), (), ""),
    ("keyword default", on_keyword_default, (), "0."),
    ("keyword default of a called one", calling(on_keyword_default), (), "0."),
    ("closure", on_closure(MODEL), (), ""),
    ("closure of a called one", calling(on_closure(MODEL)), (), ""),
    ("bound method", calling(MODEL.forward), (), ""),
    ("bound method as an argument", lambda x, f: f(x), (MODEL.forward,), ""),
    ("partial", functools.partial(lambda model, x: model(x), MODEL), (), ""),
    ("partial that is called", calling(functools.partial(lambda model, x: model(x), MODEL)), (), ""),
    ("partial by keyword", calling(functools.partial(lambda x, model: model(x), model=MODEL)), (), ""),
    ("partial of a method", calling(functools.partial(MODEL.forward)), (), ""),
    ("argument", lambda x, model: model(x), (MODEL,), ""),
    ("arguments", lambda *args: args[1](args[0]), (MODEL,), "1."),
    ("dataclass", lambda x, state: state.model(x), (State(MODEL, []),), "model."),
    ("list in a dataclass", lambda x, state: state.models[0](x), (State(nn.ReLU(), [MODEL]),), "models.0."),
    ("namedtuple", lambda x, pair: pair[0](x), (Pair(MODEL, None),), "model."),
    ("namespace", lambda x, held: held.model(x), (types.SimpleNamespace(model=MODEL),), "model."),
    ("method of an object", Trainer().run, (), "model."),
    ("dict", lambda x, d: d["a"](x), ({"a": MODEL},), "a."),
    ("dict of lists", lambda x, d: d["a"][1](x), ({"a": [None, MODEL]},), "a.1."),
    ("ordered dict", lambda x, d: d["a"](x), (collections.OrderedDict(a=MODEL),), "a."),
    ("default dict", lambda x, d: d["a"](x), (collections.defaultdict(list, a=MODEL),), "a."),
    ("own dict", lambda x, d: d["a"](x), (DictOfOwn(a=MODEL),), "0."),
    ("key of a dict", lambda x, d: [key(x) for key in d], ({MODEL: 1},), "0."),
    ("set", lambda x, s: [model(x) for model in s], ({MODEL},), "0."),
    ("own list", lambda x, models: models[0](x), (ListOfOwn([MODEL]),), "0."),
    ("deque", lambda x, models: models[0](x), (collections.deque([MODEL]),), "0."),
    ("iterator of a tuple", lambda x, models: next(models)(x), (iter((MODEL, MODEL)),), "0."),
]  # fmt: skip


@pytest.mark.parametrize(("function", "args", "prefix"), [one[1:] for one in HOLDERS], ids=[one[0] for one in HOLDERS])
def test_what_holds_a_model(function, args, prefix):
    found = recorded(function, torch.ones(4, 4), *args, model=MODEL)
    check(found, ALL, prefix)
    for source, _ in found:
        assert prefixes_of(source)[-1] == source


def test_keyword_arguments():
    model = Net()

    def call(x, *, net):
        return net(x)

    def call_any(x, **given):
        return given["net"](x)

    check(recorded(call, torch.ones(4, 4), model=model, net=model), ALL)
    check(recorded(call_any, torch.ones(4, 4), model=model, net=model), ALL, "net.")


def test_resumed_frames_begin_at_what_lies_on_the_stack():
    """A module that had been looked up before the break is on the stack; its name begins there."""

    def broken(x):
        torch._dynamo.graph_break()
        return x

    class OnStack(Net):
        def forward(self, x):
            return self.fc(broken(x)) + self.blocks[1](broken(x))

    model = OnStack()
    found = recorded(model, torch.ones(4, 4), model=model)
    assert {name for _, name in found} == {"fc.weight", "blocks.1.0.weight"}
    on_stack = [(source, name) for source, name in found if base_of(source).startswith("L['___stack")]
    assert on_stack
    for source, name in found:
        assert f".{name}".endswith("." + ".".join(parameter_path(source)))


def test_functional_call():
    """The tensors are those of the mapping, under its keys; of a compiled module they stand in its places."""
    model = Net()
    given = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    holder = nn.Module()
    names = {}
    for i, (name, tensor) in enumerate(given.items()):
        holder.register_parameter(str(i), nn.Parameter(tensor))
        names[id(tensor)] = name
    found = []

    def backend(gm, example_inputs):
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
            if id(value) in names:
                found.append((placeholder_source(node), names[id(value)]))
        return gm.forward

    torch._dynamo.reset()
    inside = torch.compile(lambda tensors, x: functional_call(model, tensors, (x,)), backend=backend)
    inside(given, torch.ones(4, 4))
    assert len(found) == ALL
    assert [parameter_path(source) for source, _ in found] == [(name,) for _, name in found]
    assert not any(is_parameter(source) for source, _ in found)
    for kind in (Net, OwnGetattr):
        found.clear()
        outside = torch.compile(kind(), backend=backend)
        functional_call(outside, {f"_orig_mod.{name}": tensor for name, tensor in given.items()}, (torch.ones(4, 4),))
        assert len(found) == ALL
        assert [".".join(parameter_path(source)) for source, _ in found] == [name for _, name in found]
        assert all(is_parameter(source) for source, _ in found)


def test_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["fc"], r=2))
    found = recorded(model, torch.ones(4, 4), model=model)
    check(found, ALL + 2)
    assert "base_model.model.fc.lora_A.default.weight" in [name for _, name in found]


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_wrappers(one_process):
    model = torch.optim.swa_utils.AveragedModel(OwnGetattr())
    check(recorded(model, torch.ones(4, 4), model=model), ALL)
    model = Net()
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    found = recorded(model, torch.ones(4, 4), model=model)
    assert {path for source, _ in found if "blocks" in (path := parameter_path(source))} == {
        ("blocks", "0", "_checkpoint_wrapped_module", "0", "weight"),
        ("blocks", "1", "0", "weight"),
    }
    for kind in (Net, OwnGetattr):
        model = DistributedDataParallel(kind())  # compiles what it wraps
        check(recorded(model, torch.ones(4, 4), model=model.module), ALL)


@pytest.mark.parametrize("kind", [Net, OwnGetattr])
def test_fully_sharded(one_process, kind):
    """Graphs take the whole weights, which have gone from the module behind the call: the names alone are compared."""
    model = kind()
    names = sorted(name for name, _ in model.named_parameters())
    fully_shard(model)
    found = []

    def backend(gm, example_inputs):
        sources = [placeholder_source(node) for node in gm.graph.find_nodes(op="placeholder")]
        found.extend(source for source in sources if is_parameter(source))
        return gm.forward

    torch._dynamo.reset()
    model.compile(backend=backend)
    model(torch.ones(4, 4))
    assert sorted(".".join(parameter_path(source)) for source in found) == names
