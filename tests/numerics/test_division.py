"""The correctly rounded division: bit for bit IEEE's, whatever quotient a device gives within two units of it."""

import numpy as np
import pytest
import torch
from support.oracle import assert_bits_equal, random_floats

from gws_compile.numerics.division import divide
from gws_compile.numerics.primitives import TorchPrimitives

CONSTANTS = (1.0, 6.0, 7.0, 127.0, 448.0, 2688.0, 57344.0)
"""What the package divides by, and divides."""


class Inexact(TorchPrimitives):
    """A device whose division is off by so many units in the last place, in the range for which it is asked."""

    def __init__(self, units: int) -> None:
        self._units = units

    def fdiv(self, x, y):
        x, y = map(torch.as_tensor, (x, y))
        assert ((x >= 1) & (x < 2)).all()
        assert ((y >= 1) & (y < 2)).all()
        return self.bits_float(self.float_bits(x / y) + self._units)


# torch itself is off by one unit too: a number over a tensor is the number times the tensor's reciprocal.
DEVICES = pytest.mark.parametrize(
    "device",
    [pytest.param(TorchPrimitives(), id="torch"), *(pytest.param(Inexact(n), id=f"{n:+} units") for n in range(-2, 3))],
)


def assert_divides(device: TorchPrimitives, x: np.ndarray | float, y: np.ndarray | float) -> None:
    expected = np.float32(x) / np.float32(y)
    assert expected.dtype == np.float32
    x, y = (torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in (x, y))
    assert_bits_equal(divide(device, x, y), expected)


def positive(n: int, seed: int, exponents: tuple[int, int] = (-60, 60)) -> np.ndarray:
    return np.abs(random_floats(n, seed, exponents))


def close_to_ties() -> tuple[np.ndarray, np.ndarray]:
    """Pairs whose quotient is as close to the middle of two floats as any: one unit of the remainder away.

    For an odd divisor d of 24 bits, ``2**(k+1) x = (2 n + 1) d + r`` has a solution x for each odd r: x is then
    ``n + 1/2`` times d but for r / 2. k is 23 where x >= d, and 24 where x < d.
    """
    rng = np.random.default_rng(0)
    pairs = []
    for d in map(int, rng.integers(2**22, 2**23, 20_000) * 2 + 1):
        for k in (23, 24):
            for r in (-1, 1):
                x = (d + r) // 2 * pow(2, -k, d) % d
                for candidate in (x, x + d):
                    if 2**23 <= candidate < 2**24 and (candidate >= d) == (k == 23):
                        pairs.append((candidate, d))
    x, y = np.array(pairs).T
    twice = 2 * (x << np.where(x >= y, 23, 24)) % (2 * y)
    assert (np.abs(twice - y) == 1).all()
    assert len(x) > 20_000
    return x.astype(np.float32), y.astype(np.float32)


@DEVICES
def test_a_million_pairs(device):
    assert_divides(device, positive(2**20, 1), positive(2**20, 2))


@DEVICES
def test_quotients_close_to_the_middle_of_two_floats(device):
    assert_divides(device, *close_to_ties())


@DEVICES
def test_operands_that_are_equal_or_one_unit_apart(device):
    """The quotient is 1 or next to it, where the spacing of floats changes."""
    x = np.concatenate([positive(2**14, 3), np.float32(2.0) ** np.arange(-60, 60, dtype=np.float32)])
    for y in (x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(0))):
        assert_divides(device, x, y)
        assert_divides(device, y, x)


@DEVICES
@pytest.mark.parametrize("constant", CONSTANTS)
def test_constants_on_either_side(device, constant):
    x = np.concatenate([positive(2**16, 4), np.arange(1, 2**12, dtype=np.float32)])
    assert_divides(device, x, constant)
    assert_divides(device, constant, x)


@DEVICES
def test_the_ends_of_the_range(device):
    """Operands and quotients down to the smallest normal float32, and up to the largest."""
    one, small, large = (positive(2**12, 5 + i, e) for i, e in enumerate([(0, 0), (-125, -120), (120, 124)]))
    assert_divides(device, small, one)
    assert_divides(device, one, small)
    assert_divides(device, large, one)
    assert_divides(device, one, large)
    assert_divides(device, np.array([2.0**-126, np.finfo(np.float32).max], np.float32), 1.0)
