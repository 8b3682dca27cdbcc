"""The page of a report: what stands on it, that it needs nothing else, and how it looks in a browser."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from support import models
from support.reports import LEAVES_FRAME, Broken, bar_heights, explained, line_of, page_of
from torch import nn

import gws_compile

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


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
    assert f"reports.py:{line_of(Broken.forward, 'graph_break')} in forward" in breaks
    assert ("Attempted to wrap RNN" in breaks) == LEAVES_FRAME
    codes = [e["text"].strip() for e in page.all("pre", class_=None)]
    assert codes == [text.strip() for graph in report.graphs for text in (graph.before, graph.after)]
    assert [code.count("torch.ops.gws.sample_weight.default(") for code in codes] == [0, 1, 0, 2]
    new = [e["text"] for e in page.all("span", class_="new")]
    assert sum("sample_weight.default(" in line for line in new) == 3
    gone = [e["text"] for e in page.all("span", class_="gone")]
    assert sum("linear(" in line or "matmul" in line or " @ " in line for line in gone) == 3


def test_products(tmp_path):
    """Each with its weight, its operands, and why they are left alone; no such table without recipes."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    backend = gws_compile.backend(recipe="mxfp8", rules=[("1.*", None)], exclude=(), inner="aot_eager")
    page = page_of(gws_compile.explain(model, torch.ones(4, 32), backend=backend), tmp_path)
    section = page.section("products")
    assert "0.weight" in section
    assert "activation fp8_e4m3, 1 x 32, floor" in " ".join(section.split())
    assert "no operand is a sampled weight" in section
    assert "2 of 5" in " ".join(e["text"] for e in page.all("b"))
    plain = page_of(gws_compile.explain(model, torch.ones(4, 32)), tmp_path)
    assert not plain.all("h2", id="products")


def test_without_weights(tmp_path):
    empty = gws_compile.backend().report()
    assert "nothing has been traced" in page_of(empty, tmp_path).section("weights")


def test_learned_widths(tmp_path):
    model = nn.Sequential(nn.Linear(40, 40))
    report = gws_compile.explain(model, torch.ones(1, 40), backend=gws_compile.backend(bits=gws_compile.LearnedBits()))
    page = page_of(report, tmp_path)
    assert any("learned bits" in e["text"] for e in page.all("text"))
    assert bar_heights(page, "noise", "noise, before the cast of 0.weight").max() == 120


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
