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


def with_products():
    """A report of one layer under a recipe, beside a product that no weight is in."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32, bias=False)

        def forward(self, x):
            y = self.fc(x)
            return y @ y.t()

    torch._dynamo.reset()
    backend = gws_compile.backend(recipe="mxfp8", attention="mxfp8", inner="aot_eager")
    torch.compile(Model(), backend=backend)(torch.randn(4, 32)).sum().backward()
    return backend.report()


def test_products_are_in_every_form_of_the_report():
    report = with_products()
    (forward,) = (p for p in report.products if p.kind == "forward")
    assert forward == gws_compile.ProductRecord(
        graph=0,
        weight="fc.weight",
        kind="forward",
        op="mm",
        location=forward.location,
        operands={"activation": "fp8_e4m3, 1 x 32, floor", "weight": "fp8_e4m3, 1 x 32, floor"},
    )
    assert forward.rounded
    assert "test_report.py:" in forward.location
    assert {(p.op, p.reason) for p in report.unrounded} == {("mm", "no operand is a sampled weight")}
    assert report.to_dict()["products"][0]["operands"] == dict(report.products[0].operands)
    text = str(report)
    assert "forward          1  activation fp8_e4m3, 1 x 32, floor; weight fp8_e4m3, 1 x 32, floor" in text
    assert "3 products with operands left alone:\n  mm at " in text
    loaded = pickle.loads(pickle.dumps(report))
    assert loaded.products == report.products
    assert str(loaded) == text


def test_a_report_without_operands_has_no_products():
    _, report = explained()
    assert report.products == ()
    assert "products" not in str(report)


def test_explained_products_are_those_of_training():
    """Traced for the report alone: nothing is compiled."""
    model, x = nn.Sequential(nn.Linear(64, 32, bias=False)), torch.randn(16, 64)
    for inner in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        backend = gws_compile.backend(recipe="nvfp4", inner=inner, exclude=())
        report = gws_compile.explain(model, x.requires_grad_(), backend=backend)
        assert [(p.kind, p.weight, p.reason) for p in report.products] == [
            ("forward", "0.weight", ""),
            ("wgrad", "0.weight", ""),
            ("dgrad", "0.weight", ""),
        ]
