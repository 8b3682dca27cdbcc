"""What a graph takes beside the Parameters that it is called with."""

import torch

from gws_compile.runtime.binding import Binding

CPU = torch.device("cpu")


def test_calls_are_counted_in_each_draw():
    slot = object()
    binding = Binding((slot,), (slot,), {CPU: [torch.zeros(2, dtype=torch.int32)]}, ())
    assert [binding.count(draw) for draw in (0, 0, 0, 1, 1, 5)] == [1, 2, 3, 1, 2, 1]


def test_calls_without_noise_are_not_counted():
    """Of a training graph whose weights are all frozen, a thousand calls are no repetition of a draw."""
    binding = Binding((), (), {}, ())
    assert [binding.count(0) for _ in range(3)] == [0, 0, 0]
