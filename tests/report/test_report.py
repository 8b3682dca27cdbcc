"""A report by itself: what it keeps alive, and its pickled form."""

import gc
import pickle
import weakref

import torch
from support.reports import explained
from torch import nn

import gws_compile


def test_the_report_keeps_no_model_and_no_inputs():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.ones(1, 8)
    gone = [weakref.ref(model), weakref.ref(model[0].weight), weakref.ref(x)]
    report = gws_compile.explain(model, x)
    del model, x
    torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    assert report.graphs[0].after


def test_reports_are_pickled_without_graphs():
    _, report = explained()
    loaded = pickle.loads(pickle.dumps(report))
    assert loaded.records == report.records
    assert loaded.breaks == report.breaks
    assert (loaded.graphs, loaded.settings) == ((), report.settings)
    assert str(loaded) == str(report)
