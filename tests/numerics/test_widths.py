"""Learned widths: from a parameter to a width, a format and an amplitude, and the gradient's way back."""

import pytest
import torch

from gws_compile import LearnedBits
from gws_compile.numerics.primitives import TorchPrimitives
from gws_compile.numerics.widths import WidthRule, amplitude, width_gradient

pytestmark = pytest.mark.usefixtures("fresh")

P = TorchPrimitives()
RULE = LearnedBits().rule


def test_amplitude():
    """``a * 2**(1 - b)`` to 4e-6 for every b, exact for whole b."""
    b = torch.cat([torch.linspace(2, 24, 100_001), torch.arange(2, 25).float()])
    amax = torch.rand(b.shape) + 0.5
    got = amplitude(P, b, amax).double()
    exact = amax.double() * 2.0 ** (1 - b.double())
    assert ((got - exact).abs() / exact).max() < 4e-6
    assert torch.equal(got[-23:], exact[-23:])


def test_widths():
    """``target + b_i (init - target)`` within min and max, and back."""
    parameter = torch.tensor([1.0, 0.0, 0.5, -2.0, 5.0, 3.0])
    assert RULE.widths(parameter).tolist() == [6.0, 4.0, 5.0, 2.0, 10.0, 10.0]
    rule = LearnedBits(init=5.3, target=7.7, max=12).rule
    widths = torch.linspace(2, 12, 1001)
    assert (rule.widths(rule.parameter(widths)) - widths).abs().max() < 4e-6
    assert WidthRule.parse(rule.spec) == rule


@pytest.mark.parametrize(
    ("width", "fmt"),
    [(2.0, "fp4_e2m1"), (3.0, "fp4_e2m1"), (3.0005, "fp4_e2m1"), (3.01, "fp6_e3m2"), (4.5, "fp8_e4m3"),
     (5.0, "fp8_e4m3"), (5.1, "fp12_e4m7"), (9.0, "fp12_e4m7"), (9.1, "bf16"), (10.0, "bf16")],
)  # fmt: skip
def test_the_cheapest_format_that_reaches_a_width(width, fmt):
    assert RULE.formats[int(RULE.index(torch.tensor(width)))].name == fmt


def test_gradients_lead_back_into_the_range():
    """Beyond min or max only the gradient whose descent step goes back passes."""
    rule = LearnedBits(init=6, target=4, min=3, max=8).rule
    parameter = torch.tensor([-1.0, -1.0, 3.0, 3.0, 1.0, 1.0])  # widths 2, 2, 10, 10, 6, 6
    gradient = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    got = width_gradient(P, gradient, parameter, rule)
    assert got.tolist() == [0.0, -2.0, 2.0, 0.0, 2.0, -2.0]
    rising = LearnedBits(init=4, target=6, min=3, max=8).rule  # b falls as b_i rises
    got = width_gradient(P, gradient[:2], torch.tensor([2.0, 2.0]), rising)  # width 2
    assert got.tolist() == [0.0, 2.0]
