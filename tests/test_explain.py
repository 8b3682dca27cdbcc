"""`gws_compile.explain`, the report's page, and ``gws explain``."""

import inspect
import json
import pickle
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from support import models
from torch import nn

import gws_compile
from gws_compile.cli import main
from gws_compile.drawing import draw, shorten
from gws_compile.example_call import BadFactoryError, build, example_tensor

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "br", "wbr", "line", "rect", "path", "i"} - {"i"}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Broken(nn.Module):
    """A graph break between two reads; a module that Dynamo leaves; a weight under a name with markup in it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(40, 40), nn.Linear(40, 40)
        self.left = nn.LSTM(40, 40)
        self.register_parameter("<b>&x", nn.Parameter(torch.randn(40, 40)))
        self.factor = 1

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        x = self.second(x) * self.factor
        return self.around(x @ getattr(self, "<b>&x"))

    def around(self, x):
        return self.left(x)[0]


class Page(HTMLParser):
    """What is on a page: its elements, each with its attributes and text. Fails on elements that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        found = [e for e in self.elements if e["tag"] == tag]
        return [e for e in found if all(e.get(k.rstrip("_")) == v for k, v in attributes.items())]

    def section(self, identifier):
        """Text between a heading and the next one."""
        body = self.all("body")[0]["text"]
        titles = [h["text"] for h in self.all("h2")]
        title = next(h["text"] for h in self.all("h2", id=identifier))
        after = titles[titles.index(title) + 1 :]
        rest = body.split(f"\n{title}\n", 1)[1]
        return rest.split(f"\n{after[0]}\n", 1)[0] if after else rest


def page_of(report, tmp_path, **arguments):
    report.to_html(tmp_path / "page.html", **arguments)
    return Page((tmp_path / "page.html").read_text())


def line_of(function, code):
    lines, start = inspect.getsourcelines(function)
    return start + next(i for i, line in enumerate(lines) if code in line)


def explained(**settings):
    model = Broken()
    return model, gws_compile.explain(model, torch.randn(3, 40), backend=gws_compile.backend(**settings))


def test_reads_breaks_and_what_lies_outside():
    _, report = explained(fmt="fp6_e3m2")
    records = {record.name: record for record in report}
    assert {name for name, record in records.items() if record.rewritten} == {"first.weight", "second.weight", "<b>&x"}
    (read,) = records["first.weight"].reads
    assert read.op == "linear"
    assert read.location == f"{__file__}:{line_of(Broken.forward, 'self.first(x)')} in forward"
    assert read.code == "x = self.first(x)"
    assert read.stack == (read.location,)
    for name in ("left.weight_ih_l0", "left.weight_hh_l0"):
        assert records[name].reason.startswith("no traced graph has it: torch does not trace LSTM")
        assert records[name].hint == ""  # the reason says what to do
    # The LSTM ends the caller's graph, and its own frame is left as a whole.
    lstm = "Attempted to wrap RNN, GRU, or LSTM"
    assert [(one.cause, one.location) for one in report.breaks] == [
        ("Call to `torch._dynamo.graph_break()`", f"{__file__}:{line_of(Broken.forward, 'graph_break')} in forward"),
        (lstm, f"{__file__}:{line_of(Broken.around, 'self.left')} in around"),
        (lstm, ""),
    ]
    assert "Explanation: " in report.breaks[0].reason
    assert report.recompilations == ()
    text = str(report)
    assert "3 graph breaks:" in text
    assert f"{report.breaks[0].location}: Call to" in text
    assert "a whole frame is left: Attempted to wrap RNN" in text


def test_hints_say_what_to_do():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head, self.body, self.scale = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.ones(1, 8))

        def forward(self, x):
            return self.lm_head(self.body(x) * self.scale)

    records = {r.name: r for r in gws_compile.explain(Net(), torch.ones(2, 8))}
    assert records["body.weight"].hint == ""
    assert "'lm_head.*'" in records["lm_head.weight"].reason
    assert "exclude=" in records["lm_head.weight"].hint
    assert records["scale"].reason.endswith("only: mul")
    assert "report its name" in records["scale"].hint
    backend = gws_compile.backend(include="*body*")
    records = {r.name: r for r in gws_compile.explain(Net(), torch.ones(2, 8), backend=backend)}
    assert "*body*" in records["lm_head.weight"].reason
    assert "include=" in records["lm_head.weight"].hint


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


def test_the_page_of_a_model(tmp_path):
    _, report = explained()
    page = page_of(report, tmp_path)
    text = (tmp_path / "page.html").read_text()
    # Self-contained: nothing is fetched, and nothing runs.
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img|<iframe|src=", re.sub(r">[^<]*<", "><", text))
    assert text.startswith("<!DOCTYPE html>")
    cells = [e["text"] for e in page.all("td")]
    for record in report:
        assert record.name in cells
    assert "<b>&x" in cells  # and not an element
    assert not page.all("b", id=None) or all(e["text"] != "" for e in page.all("b"))
    assert "no traced graph has it" in page.section("weights")
    breaks = page.section("breaks")
    assert "Call to `torch._dynamo.graph_break()`" in breaks
    assert f"test_explain.py:{line_of(Broken.forward, 'graph_break')} in forward" in breaks
    assert "Attempted to wrap RNN" in breaks
    codes = [e["text"].strip() for e in page.all("pre", class_=None)]
    assert codes == [text.strip() for graph in report.graphs for text in (graph.before, graph.after)]
    assert [code.count("torch.ops.gws.sample_weight.default(") for code in codes] == [0, 1, 0, 2]
    new = [e["text"] for e in page.all("span", class_="new")]
    assert sum("sample_weight.default(" in line for line in new) == 3
    gone = [e["text"] for e in page.all("span", class_="gone")]
    assert sum("linear(" in line or "matmul" in line or " @ " in line for line in gone) == 3


def test_without_weights(tmp_path):
    empty = gws_compile.backend().report()
    assert "nothing has been traced" in page_of(empty, tmp_path).section("weights")


def test_the_drawing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.a, self.b = nn.Embedding(8, 40), nn.Linear(40, 40), nn.Parameter(torch.randn(40, 40))

        def forward(self, i):
            def block(x):
                return self.a(x) + x @ self.b.t()

            x = torch.utils.checkpoint.checkpoint(block, self.table(i), use_reentrant=False)
            return self.a(x)

    report = gws_compile.explain(Net(), torch.tensor([1, 2]))
    drawing = draw(report.graphs[0].graph)
    rows = {}
    for box in drawing.boxes:
        rows.setdefault(box.y, []).append((box.kind, box.label))
        assert 0 <= box.x <= box.x + box.width <= drawing.width
        assert 0 <= box.y <= box.y + box.height <= drawing.height
    for row in rows.values():
        assert len(row) == len(set(row))
    kinds = sorted(tuple(kind for kind, _ in row) for row in rows.values())
    weights = {label for row in rows.values() for kind, label in row if kind in ("weight", "left")}
    assert weights == {"table.weight", "a.weight", "b"}
    assert ("left", "other") in kinds
    reads = [label for row in rows.values() for kind, label in row if kind == "read"]
    assert sorted(reads) == ["linear", "linear", "matmul"]
    samples = [label for row in rows.values() for kind, label in row if kind == "sample"]
    assert set(samples) == {"sample e4m3, b = 5"}
    overlaps = [
        (p, q)
        for p in drawing.boxes
        for q in drawing.boxes
        if p is not q and p.x < q.x + q.width and q.x < p.x + p.width and p.y < q.y + q.height and q.y < p.y + p.height
    ]
    assert not overlaps
    long = "a" * 50 + "." + "b" * 50
    assert len(shorten(long)) == 44
    assert (shorten(long)[0], shorten(long)[-1]) == ("a", "b")


def bar_heights(page, kind, label):
    """The heights of a histogram's bars, from the path that is drawn."""
    svg = next(i for i, e in enumerate(page.elements) if e["tag"] == "svg" and e.get("aria-label") == label)
    path = next(e["d"] for e in page.elements[svg:] if e.get("class") == kind)
    return 120 - np.array([float(v) for v in re.findall(r"V([\d.]+)H", path)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_histograms_are_those_of_the_reference(tmp_path, dtype):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv1d(40, 48, 3), nn.Linear(48, 40)

        def forward(self, x):
            return self.fc(self.conv(x).mT)

    model = Net().to(dtype)
    backend = gws_compile.backend("fp4_e2m1", inner="eager", seed=5)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 40, 8, dtype=dtype)
    compiled(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    compiled(x)
    report = backend.report()
    page = page_of(report, tmp_path)
    for found, (name, w) in zip(
        report._histograms(6), {"conv.weight": model.conv.weight, "fc.weight": model.fc.weight}.items(), strict=True
    ):
        w = w.detach().flatten(1)
        settings = {"name": name, "step": 1, "seed": 5}
        sample = gws_compile.sample(w, "fp4_e2m1", **settings).float()
        noise = gws_compile.sample(w.float(), "e8m23", bits=3, **settings) - w.float()
        limit = max(w.abs().max().item(), sample.abs().max().item())
        counts = {
            "w": torch.histc(w.float(), 81, -limit, limit),
            "sample": torch.histc(sample, 81, -limit, limit),
            "noise": torch.histc(noise, 81, -noise.abs().max(), noise.abs().max()),
        }
        assert (found.name, found.step, found.elements, found.limit) == (name, 1, w.numel(), limit)
        assert found.weight == tuple(counts["w"].int().tolist())
        assert found.sample == tuple(counts["sample"].int().tolist())
        # The noise is read off a grid of 22 mantissa bits: what lies on an edge may fall into the next bin.
        assert sum(found.noise) == w.numel()
        assert (torch.tensor(found.noise) - counts["noise"]).abs().sum() <= 4
        assert found.noise_limit == pytest.approx(noise.abs().max().item(), rel=1e-5)
        highest = max(counts["w"].max(), counts["sample"].max()).item()
        for kind, label, top in (
            ("w", "w and ŵ, sampled", highest),
            ("sample", "w and ŵ, sampled", highest),
            ("noise", "noise, before the cast", counts["noise"].max().item()),
        ):
            drawn = bar_heights(page, kind, f"{label} of {name}")
            assert drawn == pytest.approx(120 * (counts[kind] / top).sqrt().numpy(), abs=0.6)


def test_the_sampled_set_is_spread_and_needs_the_model(tmp_path):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(10)])
    backend = gws_compile.backend(inner="eager")
    torch.compile(model, backend=backend)(torch.ones(1, 8))
    page = page_of(backend.report(), tmp_path, weights=3)
    names = [e["text"].split()[0] for e in page.all("h3", class_="name")]
    assert names == ["0.weight", "3.weight", "6.weight"]
    assert not page_of(backend.report(), tmp_path, weights=0).all("h3", class_="name")


def test_the_report_keeps_no_model_and_no_inputs():
    import gc
    import weakref

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


def test_learned_widths(tmp_path):
    model = nn.Sequential(nn.Linear(40, 40))
    report = gws_compile.explain(model, torch.ones(1, 40), backend=gws_compile.backend(bits=gws_compile.LearnedBits()))
    page = page_of(report, tmp_path)
    assert any("learned bits" in e["text"] for e in page.all("text"))
    assert bar_heights(page, "noise", "noise, before the cast of 0.weight").max() == 120


# --- The command -----------------------------------------------------------------------------------------------------

FACTORY = """
import torch
from torch import nn

def alone():
    return nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 16))

def with_args():
    return alone(), [torch.tensor([3])]

def with_kwargs():
    return nn.Linear(16, 16), (), {"input": torch.ones(2, 16)}

def wrong():
    return 3

NUMBER = 3
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("made.py").write_text(FACTORY)
    Path("examples_beside.py").write_text(FACTORY + "def example_inputs():\n    return (torch.tensor([5]),), {}\n")
    yield
    for name in ("made", "examples_beside"):
        sys.modules.pop(name, None)


def test_the_command(factory, capsys):
    code = main(["explain", "made.py:alone", "--input", "2:int64:10", "--fmt", "fp6_e3m2", "--json", "report.json"])
    assert code == 0
    printed = capsys.readouterr().out
    assert "1 of 2 weights rewritten" in printed
    assert "gws-report.html" in printed
    assert "fp6_e3m2" in Page(Path("gws-report.html").read_text()).section("weights")
    content = json.loads(Path("report.json").read_text())
    rewritten = [w for w in content["weights"] if w["rewritten"]]
    assert [w["name"] for w in rewritten] == ["1.weight"]
    assert rewritten[0]["reads"][0]["op"] == "linear"
    assert content["settings"]["fmt"] == "fp6_e3m2"
    assert [graph["gradients"] for graph in content["graphs"]] == [True]
    assert content["graph_breaks"] == []


@pytest.mark.parametrize(
    "arguments",
    [["made:with_args"], ["made.py:with_kwargs"], ["examples_beside.py:alone"], ["made:alone", "--input", "3:int64"]],
)
def test_every_way_to_give_a_call(factory, capsys, arguments):
    assert main(["explain", *arguments, "--html", "page.html", "--eval"]) == 0
    assert "weights rewritten" in capsys.readouterr().out
    assert "without gradients" in Page(Path("page.html").read_text()).section("graphs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["made"], "accepted are package.module:function"),
        (["made.py:missing"], "made.py has no function 'missing'; it has: alone, with_args"),
        (["made:NUMBER"], "made has no function 'NUMBER'"),
        (["nowhere:f"], "no module named 'nowhere'"),
        (["nowhere.py:f"], "nowhere.py: there is no such file"),
        (["made:wrong"], "returned int; accepted: a torch.nn.Module, (module, args)"),
        (["made:alone"], "give it --input"),
        (["made:alone", "--input", "2y"], "--input 2y: accepted are"),
        (["made:alone", "--input", "2:int"], "unknown dtype 'int'; accepted: float32"),
        (["made:alone", "--input", "2:float32:4"], "is for integers"),
        (["made:alone", "--fmt", "fp9"], "unknown format 'fp9'"),
        (["made:with_args", "--strict", "--exclude", "*weight"], "strict=True, and no weight was rewritten"),
        (["made:alone", "--json", "no/such/report.json"], "there is no such folder"),
        (["made:alone", "--html", "no/such/report.html"], "there is no such folder"),
    ],
)
def test_errors_say_what_is_accepted(factory, capsys, arguments, message):
    assert main(["explain", "--no-html", *arguments] if "--html" not in arguments else ["explain", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("gws explain: error: ")


def test_example_tensors():
    assert example_tensor("x=2x3")[0] == "x"
    for text, shape, dtype in [
        ("2x3", (2, 3), torch.float32),
        (":int64", (), torch.int64),
        ("4:bool", (4,), torch.bool),
    ]:
        name, value = example_tensor(text)
        assert (name, tuple(value.shape), value.dtype) == (None, shape, dtype)
    values = example_tensor("1000:int64:7")[1]
    assert (values.min(), values.max()) == (0, 6)
    with pytest.raises(BadFactoryError, match="names no function"):
        build(":f", [])


# --- In a browser ----------------------------------------------------------------------------------------------------

MEASURE = """<script>addEventListener("load", () => {
  const root = document.documentElement;
  document.querySelectorAll("details").forEach(d => d.open = true);
  const over = [...document.querySelectorAll(".drawing g")].filter(
    g => g.querySelector("text").getBBox().width > g.querySelector("rect").getBBox().width - 4).length;
  const flat = [...document.querySelectorAll(".plots path")].filter(p => p.getBBox().height < 1).length;
  const wide = [...document.querySelectorAll("body > *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1);
  root.setAttribute("data-result", JSON.stringify({
    page: root.scrollWidth - innerWidth, over, flat, wide: wide.length,
    boxes: document.querySelectorAll(".drawing g").length, paths: document.querySelectorAll(".plots path").length}));
})</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium installed")
@pytest.mark.parametrize("width", [500, 1400])
def test_the_page_in_a_browser(tmp_path, width):
    model = models.gpt2()  # kept alive: a page has histograms of weights that are there
    report = gws_compile.explain(model, torch.zeros(2, 8, dtype=torch.int64))
    report.to_html(tmp_path / "page.html")
    page = tmp_path / "measured.html"
    page.write_text((tmp_path / "page.html").read_text().replace("</body>", MEASURE))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    done = subprocess.run(
        [*command, f"--window-size={width},1000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    (result,) = re.findall(r'data-result="([^"]*)"', done.stdout)
    result = json.loads(result.replace("&quot;", '"'))
    assert result.pop("boxes") == 10 + 8 * 2 + 3
    assert result.pop("paths") == 6 * 3
    assert result.pop("page") <= 0
    assert result == {"over": 0, "flat": 0, "wide": 0}
