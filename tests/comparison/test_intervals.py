"""Intervals, held to scipy's."""

import math

import pytest
from scipy import stats

from gws_compile.comparison.intervals import Interval, t_975


@pytest.mark.parametrize("freedom", [*range(1, 31), 31, 40, 60, 120, 1000])
def test_quantiles(freedom):
    assert t_975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-4)


@pytest.mark.parametrize("values", [(1.0, 2.0), (2.5, 2.5, 2.75), tuple(0.1 * n * n for n in range(40))])
def test_is_the_interval_of_a_t_test(values):
    found = Interval.of(values)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-4, abs=1e-4)
    assert found.count == len(values)
    assert found.is_clear == (not low <= 0 <= high)


def test_one_value_has_no_interval():
    one = Interval.of([1.25])
    assert (one.mean, one.count) == (1.25, 1)
    assert math.isnan(one.half)
    assert not one.is_clear
    assert one.text() == "1.2500"
    assert Interval.of([]) is None


def test_text():
    assert Interval(-0.25, 0.5, 3).text(3, sign=True) == "-0.250 ± 0.500"
    assert Interval(0.25, 0.5, 3).text(sign=True) == "+0.2500 ± 0.5000"
