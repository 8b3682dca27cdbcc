"""Views of a weight: those that depend on its values, those that look at its memory, tables whose rows are read."""

import contextlib
import warnings

import pytest
import torch
from support.graphs import Reader, reasons
from torch import nn
from torch.nn import functional as F

import gws_compile

FMT = "fp4_e2m1"
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
INDEX = torch.tensor([2, 0, 2, 5])


pytestmark = pytest.mark.usefixtures("reset")


def dense():
    return torch.randn(8, 8)


def second_half_of_a_buffer():
    return torch.randn(128)[64:].view(8, 8)


def every_second_column():
    return torch.randn(8, 16)[:, ::2]


def transposed():
    return torch.randn(8, 8).t()


STORAGE_VIEWS = {
    "as_strided": lambda x, w: x @ w.as_strided((8, 8), (1, 8)),
    "as_strided, function": lambda x, w: x @ torch.as_strided(w, size=(8, 8), stride=(8, 1)),
    "as_strided, offset": lambda x, w: x @ w.as_strided((4, 4), (1, 4), 9).repeat(2, 2),
    "as_strided, operator": lambda x, w: x @ torch.ops.aten.as_strided(w, [8, 8], [1, 8]),
    "as_strided_copy": lambda x, w: x @ torch.as_strided_copy(w, (8, 8), (1, 8)),
    "as_strided_scatter": lambda x, w: x @ torch.as_strided_scatter(w, torch.zeros(8), (8,), (9,)),
    "of a view": lambda x, w: x @ w[:4].as_strided((8, 8), (1, 8)),
    "view of other bits": lambda x, w: x @ w.view(torch.int32).view(torch.float32),
}


@pytest.mark.filterwarnings("ignore::gws_compile.GwsWarning")
@pytest.mark.parametrize(
    ("view", "weight", "inner"),
    [
        (view, weight, inner)
        for view in STORAGE_VIEWS
        for weight, inner in [
            (dense, "aot_eager"),
            (second_half_of_a_buffer, "aot_eager"),
            (second_half_of_a_buffer, "inductor"),
            (every_second_column, "aot_eager"),
            (transposed, "aot_eager"),
        ]
        # torch itself takes none but contiguous tensors there
        if view != "as_strided_scatter" or weight in (dense, second_half_of_a_buffer)
    ],
)
def test_a_view_of_the_memory_takes_the_weight_itself(view, weight, inner):
    """A sample lies in memory in its own way: there the view would be of something else, or of nothing."""
    read = STORAGE_VIEWS[view]
    model = Reader(weight(), read)
    plain = torch.compile(Reader(model.weight.detach(), read), backend=inner)(X)
    backend = gws_compile.backend(FMT, inner=inner)
    out = torch.compile(model, backend=backend)(X)
    assert torch.equal(out, plain)
    assert out.requires_grad == plain.requires_grad
    ((name, reason),) = reasons(backend).items()
    assert name == "weight"
    assert reason.endswith("looks at how it lies in memory, where a sample lies in another way")


@pytest.mark.filterwarnings("ignore::gws_compile.GwsWarning")
def test_a_weight_whose_memory_is_also_looked_at_is_not_sampled():
    """It would be sampled in one read, and not in the other."""
    backend = gws_compile.backend(FMT, inner="aot_eager")
    model = Reader(dense(), lambda x, w: F.linear(x, w) + x @ w.as_strided((8, 8), (1, 8)))
    out = torch.compile(model, backend=backend)(X)
    assert torch.equal(out, F.linear(X, model.weight) + X @ model.weight.as_strided((8, 8), (1, 8)))
    assert "looks at how it lies in memory" in reasons(backend)["weight"]


VALUE_VIEWS = {
    "transpose": lambda w: w.t(),
    "permute": lambda w: w.view(2, 4, 8).permute(2, 0, 1).flatten(1),
    "slice": lambda w: F.pad(w[2:6, :], (0, 0, 2, 2)),
    "cat": lambda w: torch.cat([w[4:], w[:4]]),
    "flip": lambda w: w.flip(0),
    "roll": lambda w: w.roll(1, 0),
    "unfold": lambda w: w.unfold(0, 4, 4).flatten(0, 1).reshape(8, 8),
    "diagonal": lambda w: w.expand(2, 8, 8).diagonal(dim1=0, dim2=1).t().repeat(4, 1),
    "negation": lambda w: -w,
    "gathered rows": lambda w: w[INDEX].repeat(2, 1),
    "index_select": lambda w: w.index_select(1, INDEX).repeat(1, 2),
    "gather": lambda w: w.gather(0, INDEX.view(4, 1).expand(4, 8)).repeat(2, 1),
    "take_along_dim": lambda w: torch.take_along_dim(w, INDEX.view(4, 1), 0).repeat(2, 1),
}


@pytest.mark.parametrize("weight", [dense, every_second_column])
@pytest.mark.parametrize("view", VALUE_VIEWS)
def test_a_view_of_the_values_is_one_of_the_sample(view, weight):
    """Sampled first and then viewed: a table that is looked up by index and then multiplied by is a weight."""
    through = VALUE_VIEWS[view]
    model = Reader(weight(), lambda x, w: x @ through(w))
    backend = gws_compile.backend(FMT, inner="aot_eager")
    out = torch.compile(model, backend=backend, fullgraph=True)(X)
    out.square().sum().backward()
    assert reasons(backend) == {"weight": "matmul"}
    sample = gws_compile.sample(model.weight.detach(), FMT, name="weight").requires_grad_()
    expected = X @ through(sample)
    expected.square().sum().backward()
    assert torch.equal(out, expected)
    assert torch.equal(model.weight.grad, sample.grad)


def attributes_that_are_views():
    """Everything that this torch offers without arguments on a tensor and that keeps its memory: names, and whether
    they are called.

    Read off the installed torch, so that what a new version brings is tested without being listed here.
    """
    found = {}
    for name in dir(torch.Tensor):
        if name.startswith("_") or name.endswith("_") or name == "dequantize":  # writes; has no derivative when traced
            continue
        weight = dense().requires_grad_()
        # What wants arguments, another dtype or a device, or has no derivative, raises.
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            value = getattr(weight, name)
            if called := not isinstance(value, torch.Tensor):
                value = value()
            if value.shape == weight.shape and value.dtype == weight.dtype and value.data_ptr() == weight.data_ptr():
                found[name] = called
    return found


ATTRIBUTES = attributes_that_are_views()


def test_the_views_of_this_torch_are_found():
    known = {"T": False, "mT": False, "H": False, "adjoint": True, "t": True, "contiguous": True, "detach": True}
    assert known.items() <= ATTRIBUTES.items()
    assert "clone" not in ATTRIBUTES


@pytest.mark.parametrize(("name", "called"), ATTRIBUTES.items())
def test_every_view_that_this_torch_offers_is_looked_through(name, called):
    def spell(w):
        return getattr(w, name)() if called else getattr(w, name)

    model = Reader(dense(), lambda x, w: x @ spell(w))
    backend = gws_compile.backend(FMT, inner="aot_eager", noise="none")
    out = torch.compile(model, backend=backend, fullgraph=True)(X)
    assert reasons(backend) == {"weight": "matmul"}
    assert torch.equal(out, X @ spell(gws_compile.quantize(model.weight.detach(), FMT)))


def test_rows_of_an_embedding_are_looked_up_in_the_weight_itself():
    backend = gws_compile.backend(FMT, inner="aot_eager")
    model = Reader(dense(), lambda x, w: F.linear(F.embedding(INDEX, w), x))
    out = torch.compile(model, backend=backend)(X)
    assert torch.equal(out, F.linear(F.embedding(INDEX, model.weight), X))
    assert reasons(backend) == {"weight": "embedding look-up"}


@pytest.mark.filterwarnings("ignore::gws_compile.GwsWarning")
@pytest.mark.parametrize("spell", [lambda x, w: x[:, :8] @ w, lambda x, w: torch.fft.rfft(x, 15)[:, :8] @ w])
def test_a_complex_weight_is_in_the_report(spell):
    weight = torch.randn(8, 8, dtype=torch.complex64)
    backend = gws_compile.backend(FMT, inner="aot_eager")
    model = Reader(weight, lambda x, w: spell(x, w).abs())
    x = X if "fft" in str(spell.__code__.co_names) else X.to(torch.complex64)
    out = torch.compile(model, backend=backend)(x)
    assert torch.equal(out, spell(x, weight).abs())
    assert reasons(backend) == {"weight": "complex64 weights are not sampled"}


class Scaled(torch.Tensor):
    """A weight of two parts, which knows linear layers alone, as quantized weights are."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __repr__(self):
        return "Scaled"

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, w, bias = (*args, None)[:3]
            return F.linear(x, w.codes.to(x.dtype) * w.scale, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"Scaled: {func}")


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_tensor_subclass_is_left_alone_with_a_reason(inner):
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(8, 8)
            self.a, self.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
            codes = torch.randint(-9, 9, (8, 8), dtype=torch.int8)
            self.base.weight = nn.Parameter(Scaled(codes, torch.rand(8, 1)), requires_grad=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    model = Lora()
    backend = gws_compile.backend(FMT, inner=inner)
    out = torch.compile(model, backend=backend)(X)
    out.sum().backward()
    found = reasons(backend)
    assert (found["a.weight"], found["b.weight"]) == ("linear", "linear")
    assert found["base.weight"] == "of class Scaled: of tensor subclasses only DTensor is sampled"
    base = F.linear(X, model.base.weight.codes.float() * model.base.weight.scale, model.base.bias)
    a, b = (gws_compile.sample(getattr(model, n).weight.detach(), FMT, name=f"{n}.weight") for n in "ab")
    torch.testing.assert_close(out, base + F.linear(F.linear(X, a), b))
