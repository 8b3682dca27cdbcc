"""The history of learned widths."""

import torch

from gws_compile.learned_bits.history import MOST, WidthHistory


def test_history_keeps_few_snapshots():
    history = WidthHistory(2.0, 10.0)
    for step in range(1, 1001):
        if history.due():
            history.record(torch.full((4,), 2.0 + 8.0 * step / 1000), torch.full((4,), 0.25))
    assert len(history.steps) <= MOST
    assert history.steps[-1] > 980
    shares = history.histograms()
    assert torch.equal(shares.sum(1), torch.ones(len(history.steps)))
    places = shares.argmax(1)
    assert (places[1:] >= places[:-1]).all()
