"""The operator ``gws::round_operand``."""

import itertools

import pytest
import torch
from support.operator import CLOCK, KEY
from support.recipe_oracle import rounded

import gws_compile
from gws_compile import Operand
from gws_compile.ops import round_operand as operator  # noqa: F401  registers it
from gws_compile.ops.sample_arguments import OPERATOR_VERSION, RoundArguments


def arguments(x, operand, *, rows=False, batch_dims=0, place=0, switch=0, clock=CLOCK):
    drawn = operand.rounding == "stochastic"
    return RoundArguments(
        x=x,
        key=KEY if drawn else None,
        clock=clock if drawn or switch else None,
        batch_dims=batch_dims,
        fmt=operand.element.spec,
        block=operand.side_block(rows=rows),
        scale=operand.rule,
        rounding=operand.rounding,
        place=place,
        switch=switch,
    ).call()


def call(*args, **settings):
    return torch.ops.gws.round_operand(*arguments(*args, **settings))


OPERANDS = (
    Operand("mxfp8"),
    Operand("mxfp4", scale="ceil", rounding="stochastic"),
    Operand("nvfp4"),
    Operand("nvfp4", rounding="stochastic"),
    Operand("fp8_block"),
    Operand("fp8_tensor"),
    Operand("fp8_e5m2", block=(1, None), scale="amax", rounding="stochastic"),
    Operand("fp8_e4m3", scale="unit"),
    Operand("bf16", scale="none", rounding="stochastic"),
    Operand("int4_group", block=(1, 64)),
)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("operand", "dtypes"),
    [
        *((one, DTYPES[i % 3 : i % 3 + 1]) for i, one in enumerate(OPERANDS)),
        *(pytest.param(one, DTYPES, marks=pytest.mark.slow) for one in OPERANDS),
    ],
    ids=lambda one: one.text if isinstance(one, Operand) else str(len(one)),
)
def test_compiled_equals_eager(operand, dtypes):
    """Both sides, partial blocks, transposed operands, batches, dynamic shapes: bit for bit."""
    torch.manual_seed(0)
    layouts = [(torch.randn(70, 96), 0), (torch.randn(2, 40, 4, 6).permute(1, 0, 2, 3), 0)]
    if len(dtypes) > 1:
        layouts += [(torch.randn(96, 70).t(), 0), (torch.randn(3, 32, 64), 1)]
    for (values, dims), rows in itertools.product(layouts, (False, True)):
        for dtype in dtypes:
            x = values.to(dtype)
            given = arguments(None, operand, rows=rows, batch_dims=dims, place=5)[1:]

            def run(x, given=given):
                return torch.ops.gws.round_operand(x, *given)

            torch._dynamo.reset()
            if x.ndim == 2:
                torch._dynamo.mark_dynamic(x, [0, 1])
            got = torch.compile(run)(x)
            assert torch.equal(got, run(x)), (tuple(x.shape), rows, dtype)
            assert got.stride() == run(x).stride() == x.stride()


@pytest.mark.parametrize("operand", [one for one in OPERANDS if one.rounding == "nearest"], ids=lambda one: one.text)
def test_to_nearest_it_is_the_public_reference(operand):
    """`gws_compile.quantize` of the matrix whose rows are summed along; and the definition, in float64."""
    torch.manual_seed(0)
    x = torch.randn(64, 128) * torch.logspace(-3, 2, 128)
    got = call(x, operand)
    assert torch.equal(call(x.t().contiguous(), operand, rows=True), got.t())
    assert torch.equal(got, rounded(x, operand))
    if operand.rule in ("floor", "ceil", "amax", "nvfp4"):
        reference = gws_compile.quantize(x, operand.element, operand.sides, operand.rule)
        assert torch.equal(got, reference)


def test_the_gradient_goes_straight_through():
    x = torch.randn(8, 32, requires_grad=True)
    upstream = torch.randn(8, 32)
    call(x, Operand("mxfp4")).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_switched_off_it_is_the_operand():
    """A bit of the clock's fifth word, eager and compiled, both ways in one graph."""
    x = torch.randn(8, 64)
    on, off = CLOCK, torch.tensor([7, -1, 0, 0, 2], dtype=torch.int32)

    given = arguments(None, Operand("mxfp4"), switch=2)[3:]

    def run(x, clock):
        return torch.ops.gws.round_operand(x, None, clock, *given)

    compiled = torch.compile(run, fullgraph=True)
    for function in (run, compiled):
        assert torch.equal(function(x, off), x)
        assert torch.equal(function(x, on), call(x, Operand("mxfp4")))
    assert torch.equal(run(x, torch.tensor([7, -1, 0, 0, 13], dtype=torch.int32)), call(x, Operand("mxfp4")))


def test_unit_scale_is_one_for_all_values():
    """Probabilities times 448, whatever the largest; a NaN stays alone."""
    p = torch.rand(4, 64)
    p[0, 3] = float("nan")
    got = call(p, Operand("fp8_e4m3", scale="unit"))
    wanted = (p * 448).to(torch.float8_e4m3fn).float() * torch.tensor(1 / 448)
    assert torch.equal(got.nan_to_num(9), wanted.nan_to_num(9))


def test_opcheck():
    for operand in OPERANDS[:4]:
        x = torch.randn(16, 64, requires_grad=True)
        torch.library.opcheck(torch.ops.gws.round_operand.default, arguments(x, operand))


def test_errors():
    x = torch.randn(4, 32)
    mode = torch._subclasses.FakeTensorMode()
    fake, double = mode.from_tensor(x), mode.from_tensor(x.double())
    with mode:
        with pytest.raises(TypeError, match=r"takes torch.float32, torch.bfloat16, torch.float16, got torch.float64"):
            torch.ops.gws.round_operand(*arguments(double, Operand("mxfp8")))
        with pytest.raises(RuntimeError, match=f"is at version {OPERATOR_VERSION}, the graph was made for 1"):
            torch.ops.gws.round_operand(*arguments(fake, Operand("mxfp8"))[:-1], 1)
