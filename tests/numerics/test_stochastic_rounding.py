"""Stochastic rounding: one of the two neighbours, and the value as the mean."""

import math

import numpy as np
import pytest
import torch
from support.recipe_oracle import rounded, scales_of

from gws_compile import Operand
from gws_compile.numerics.keys import key_words
from gws_compile.numerics.noise import random_word
from gws_compile.numerics.primitives import TorchPrimitives
from gws_compile.ops.sample_arguments import RoundArguments

DRAWS = 4096
KEY = (123456789, -987654321)

OPERANDS = {
    "e2m1 floor": Operand("fp4_e2m1"),
    "e2m1 ceil": Operand("fp4_e2m1", scale="ceil"),
    "nvfp4": Operand("nvfp4"),
    "e4m3 amax": Operand("fp8_e4m3", scale="amax"),
    "e5m2 tensor": Operand("fp8_e5m2", block=(None, None), scale="amax"),
    "int4": Operand("int4"),
    "int2": Operand("int2"),
    "e3m2 alone": Operand("e3m2", scale="none"),
    "bf16": Operand("bf16", scale="none"),
}


def draw(x, operand, step, place=3):
    """``gws::round_operand``, stochastic, of a matrix whose columns are summed over."""
    given = RoundArguments(
        x=x,
        key=torch.tensor(KEY, dtype=torch.int32),
        clock=torch.tensor([step, 0, 0, 0, 0], dtype=torch.int32),
        batch_dims=0,
        fmt=operand.element.spec,
        block=operand.side_block(rows=False),
        scale=operand.rule,
        rounding="stochastic",
        place=place,
        switch=0,
    )
    return torch.ops.gws.round_operand(*given.call())


def words(step, count, place=3):
    """The words that a place draws, as int32 bits."""
    mixed = tuple(
        torch.tensor(k ^ p, dtype=torch.int32) for k, p in zip(KEY, key_words(0, f"place {place}"), strict=True)
    )
    index = torch.arange(count, dtype=torch.int32)
    return random_word(TorchPrimitives(), index, mixed, torch.tensor(step, dtype=torch.int32)).numpy().view(np.uint32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPERANDS)
def test_draws_are_those_of_the_definition(name, dtype):
    """Bit for bit, in float64: the bits that the grid does not have, a random number added, the sum cut."""
    operand = OPERANDS[name]
    torch.manual_seed(0)
    x = (torch.randn(24, 64) * torch.logspace(-3, 1, 64)).to(dtype)
    x[0, :32] = 0
    for step in (0, 7):
        got = draw(x, operand, step)
        if operand.element.scaled:
            assert torch.equal(got, rounded(x, operand, words(step, x.numel())))


@pytest.mark.parametrize("name", OPERANDS)
def test_each_draw_is_a_neighbour_and_the_mean_is_the_value(name):
    """The mean of 4,096 draws lies within five standard errors; what lies on the grid does not move."""
    operand = OPERANDS[name]
    torch.manual_seed(1)
    x = torch.randn(1, 64) * torch.logspace(-2, 0, 64)
    draws = torch.cat([draw(x, operand, step) for step in range(DRAWS)]).double()
    inverse, scale = (torch.from_numpy(np.ascontiguousarray(s)).double() for s in scales_of(x.numpy(), operand))
    fmt = operand.element
    # In units of the scale; what a block's scale saturates is the largest value in every draw.
    q = (x.float() * inverse.float()).double().clamp(-fmt.max, fmt.max)
    levels = (draws / scale).abs()
    exponent = torch.from_numpy(np.maximum(np.frexp(q.abs().numpy())[1] - 1, fmt.emin))
    unit = 2.0 ** (exponent - fmt.mantissa_bits).double()
    if name == "bf16":
        unit = 2.0 ** (torch.from_numpy(np.frexp(q.abs().numpy())[1]) - 1 - 7).double()
    low = torch.floor(q.abs() / unit) * unit
    tolerance = 1e-3 * unit
    is_low, is_high = ((levels - low).abs() <= tolerance), ((levels - low - unit).abs() <= tolerance)
    assert (is_low | is_high).all()
    share = (q.abs() - low) / unit
    spread = torch.sqrt(share * (1 - share) / DRAWS)
    assert ((is_high & ~is_low).double().mean(0) - share[0]).abs().le(5 * spread[0] + 1e-6).all()


def test_places_steps_and_elements_draw_different_words():
    """No two of a thousand elements, three steps and three places share more words than chance has it."""
    drawn = np.concatenate([words(step, 1000, place) for step in range(3) for place in (2, 3, 4)])
    expected = len(drawn) * (len(drawn) - 1) / 2 / 2**32
    assert len(drawn) - len(np.unique(drawn)) <= math.ceil(expected + 5 * math.sqrt(expected))


def test_saturated_values_and_broken_blocks():
    x = torch.tensor([[7.9, 7.0, -7.9, 0.1] * 8, [1.0, float("nan"), 2.0, 3.0] * 8, [float("inf")] + [1.0] * 31])
    got = draw(x, OPERANDS["e2m1 floor"], 0)
    assert got[0, 0] == 6 and got[0, 1] == 6 and got[0, 2] == -6  # noqa: PT018
    assert got[1:].isnan().all()
