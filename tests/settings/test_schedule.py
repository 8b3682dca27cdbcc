"""Schedules: what they say at a draw, and what is wrong with bad ones."""

import struct

import pytest

import gws_compile
from gws_compile import LearnedBits, Schedule


def test_noise_from_start_to_stop():
    schedule = Schedule(start=2, stop=5)
    assert [schedule.draws(step) for step in range(7)] == [False, False, True, True, True, False, False]
    assert Schedule(start=3).draws(2**32 - 1)


def test_widths_are_linear_between_points_and_constant_beyond():
    schedule = Schedule(bits=((10, 8.0), (20, 5.0), (22, 6)))
    widths = [schedule.width(step) for step in (0, 10, 11, 15, 20, 21, 22, 1000)]
    assert widths == [8.0, 8.0, 7.7, 6.5, 5.0, 5.5, 6.0, 6.0]
    assert Schedule(bits=[(0, 4)]).width(7) == 4.0
    assert Schedule(stop=3).width(0) is None


def test_the_clock_takes_the_factor_of_the_width():
    schedule = Schedule(bits=((0, 8.0), (3, 5.0)))
    factors = [struct.unpack("<f", struct.pack("<i", schedule.factor_bits(step)))[0] for step in range(5)]
    assert factors == [2.0**-7, 2.0**-6, 2.0**-5, 2.0**-4, 2.0**-4]
    assert Schedule(stop=3).factor_bits(0) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -1}, "Schedule.start must be an int, 0 or more, got -1"),
        ({"start": 1.0}, "Schedule.start must be an int, 0 or more, got 1.0"),
        ({"start": 5, "stop": 5}, "Schedule.stop must be an int above start=5, or None for never, got 5"),
        ({"stop": "end"}, "Schedule.stop must be an int above start=0, or None for never, got 'end'"),
        ({"bits": ((0, 8), (10, 5), (5, 4))}, "Schedule.bits must have ascending steps, got step 5 behind step 10"),
        ({"bits": ((0, 8), (0, 5))}, "Schedule.bits must have ascending steps, got step 0 behind step 0"),
        ({"bits": ((0, 1.5),)}, r"Schedule.bits takes points \(step, bit width\), .* from 2 to 24, .*got \(0, 1.5\)"),
        ({"bits": (0, 8.0)}, r"Schedule.bits takes points \(step, bit width\), .*got 0"),
        ({"bits": 8.0}, r"Schedule.bits takes points \(step, bit width\), .*got 8.0"),
        ({"bits": ((0.5, 8.0),)}, r"Schedule.bits takes points \(step, bit width\), .*got \(0.5, 8.0\)"),
    ],
)
def test_bad_schedules(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": 100}, "schedule must be a Schedule or None, got 100"),
        ({"bits": 5, "schedule": Schedule(bits=((0, 8),))}, "bits=5 and Schedule.bits both say the bit width"),
        (
            {"fmt": "int4", "schedule": Schedule(bits=((0, 4), (9, 6)))},
            "with int4 Schedule.bits at step 9 must be from 2 to 4, got 6",
        ),
        (
            {"bits": LearnedBits(max=8), "schedule": Schedule(bits=((0, 9),))},
            "Schedule.bits at step 0 must lie within LearnedBits.min=2 and max=8, got 9",
        ),
    ],
)
def test_bad_beside_other_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        gws_compile.backend(**settings)


def test_a_schedule_without_effect_is_named():
    with pytest.warns(
        gws_compile.GwsWarning, match=r"schedule=Schedule\(\) changes nothing: give start, stop, bits, or"
    ):
        gws_compile.backend(schedule=Schedule())
    with pytest.warns(gws_compile.GwsWarning, match="no noise from step 9.* has no effect with noise='none'"):
        gws_compile.backend(noise="none", schedule=Schedule(stop=9))


def test_as_text():
    schedule = Schedule(start=1, stop=9, bits=((0, 8.0), (5, 4.5)))
    assert str(schedule) == "noise from step 1; no noise from step 9; b = 8 at step 0, 4.5 at step 5"
