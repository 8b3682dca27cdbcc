"""A model with graph breaks and its report, and the report's page, read back."""

import inspect
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from torch import nn

import gws_compile
from support.torch_version import TORCH

LSTM = "Attempted to wrap RNN, GRU, or LSTM"
LEAVES_FRAME = TORCH < (2, 15)
"""Whether this torch leaves the whole frame that calls an LSTM, or goes on behind the call."""

VOID = {"meta", "br", "wbr", "line", "rect", "path"}


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


def line_of(function, code):
    lines, start = inspect.getsourcelines(function)
    return start + next(i for i, line in enumerate(lines) if code in line)


def explained(**settings):
    """A `Broken` model, and what `gws_compile.explain` says of it."""
    model = Broken()
    return model, gws_compile.explain(model, torch.randn(3, 40), backend=gws_compile.backend(**settings))


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


def page_of(report, tmp_path: Path, **arguments) -> Page:
    """The page of a report, read back."""
    report.to_html(tmp_path / "page.html", **arguments)
    return Page((tmp_path / "page.html").read_text())


def bar_heights(page, kind, label):
    """The heights of a histogram's bars, from the path that is drawn."""
    svg = next(i for i, e in enumerate(page.elements) if e["tag"] == "svg" and e.get("aria-label") == label)
    path = next(e["d"] for e in page.elements[svg:] if e.get("class") == kind)
    return 120 - np.array([float(v) for v in re.findall(r"V([\d.]+)H", path)])
