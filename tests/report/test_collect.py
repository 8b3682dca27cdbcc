"""The rows of a report: reads with their places, graph breaks, recompilations."""

import inspect

import torch
from support.reports import LEAVES_FRAME, LSTM, Broken, explained, line_of, page_of
from torch import nn

import gws_compile


def test_reads_breaks_and_what_lies_outside():
    file = inspect.getfile(Broken)
    _, report = explained(fmt="fp6_e3m2")
    records = {record.name: record for record in report}
    assert {name for name, record in records.items() if record.rewritten} == {"first.weight", "second.weight", "<b>&x"}
    (read,) = records["first.weight"].reads
    assert read.op == "linear"
    assert read.location == f"{file}:{line_of(Broken.forward, 'self.first(x)')} in forward"
    assert read.code == "x = self.first(x)"
    assert read.stack == (read.location,)
    for name in ("left.weight_ih_l0", "left.weight_hh_l0"):
        assert records[name].reason.startswith("no traced graph has it: torch does not trace LSTM")
        assert records[name].hint == ""  # the reason says what to do
    # The LSTM ends the caller's graph; up to torch 2.14 its own frame is then left as a whole.
    called = f"{file}:{line_of(Broken.around, 'self.left')} in around"
    left = [(LSTM, called), (LSTM, "")] if LEAVES_FRAME else [("Unsupported function call (delayed)", called)]
    assert [(one.cause, one.location) for one in report.breaks] == [
        ("Call to `torch._dynamo.graph_break()`", f"{file}:{line_of(Broken.forward, 'graph_break')} in forward"),
        *left,
    ]
    assert "Explanation: " in report.breaks[0].reason
    assert report.recompilations == ()
    text = str(report)
    assert f"{1 + len(left)} graph breaks:" in text
    assert f"{report.breaks[0].location}: Call to" in text
    assert ("a whole frame is left: Attempted to wrap RNN" in text) == LEAVES_FRAME


def test_recompilations_say_the_guard_that_failed(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.factor = nn.Linear(40, 40), 1

        def forward(self, x):
            return self.fc(x) * self.factor

    model, backend = Net(), gws_compile.backend(inner="eager")
    x = torch.randn(2, 40)
    assert gws_compile.explain(model, x).recompilations == ()
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    assert backend.report().recompilations == ()  # what the trace before was for is another backend
    model.factor = 2
    compiled(x)
    (again,) = backend.report().recompilations
    assert "self.factor == 1" in again.recompiled
    assert again.number == 1
    assert not again.compile_id.endswith("/0")
    assert "1 recompilation:" in str(backend.report())
    page = page_of(backend.report(), tmp_path)
    assert "self.factor == 1" in page.section("recompilations")
    assert "None." in page.section("breaks")
