"""A progress bar that moves while one step is on its way."""

import importlib
import io
import sys
import time
from pathlib import Path

import pytest

tqdm = pytest.importorskip("tqdm")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
ticking = importlib.import_module("ticking")


class Terminal(io.StringIO):
    """What was written, and whether it is a terminal."""

    def isatty(self):
        return True


def test_the_bar_says_at_once_what_is_done_and_goes_on(monkeypatch):
    monkeypatch.setattr(ticking, "seconds_between_lines", lambda: 0.001)
    out = io.StringIO()
    bar = tqdm.tqdm(range(3), desc="training", file=out, mininterval=1000)
    with ticking.ticking(bar, "tracing and compiling plain"):
        said = out.getvalue()
        assert said.endswith("tracing and compiling plain:   0%|          | 0/3 [00:00<?, ?it/s]")
        deadline = time.monotonic() + 30
        while len(out.getvalue()) <= len(said) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(out.getvalue()) > len(said)
    bar.refresh()
    assert out.getvalue().rpartition("\r")[2].startswith("training:   0%")


def test_a_terminal_is_drawn_often_a_file_seldom(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert ticking.seconds_between_lines() < 1
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert ticking.seconds_between_lines() > 5
