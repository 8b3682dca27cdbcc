"""The blocks of docs/seeing.md run as they stand, in their order."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import gws_compile
from gws_compile.command_line.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "seeing.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_blocks(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    settings = transformers.TrainingArguments("out", use_cpu=True, report_to=[])
    scope = {"nn": torch.nn, "trainer": transformers.Trainer(torch.nn.Linear(2, 2), settings)}
    try:
        for language, text in BLOCKS:
            if text.startswith("# model.py"):
                Path("model.py").write_text(text)
            elif language == "sh":
                program, *arguments = shlex.split(text)
                assert (program, main(arguments)) == ("gws", 0)
            else:
                exec(compile(text, str(PAGE), "exec"), scope)
    finally:
        sys.modules.pop("model", None)
    assert [language for language, _ in BLOCKS] == ["python", "sh", *["python"] * 5]
    printed = capsys.readouterr().out
    assert "2 of 4 weights rewritten" in printed
    assert "lm_head.weight matches the exclude pattern 'lm_head.*' to rewrite it" in printed
    for name in ("gws-report.html", "explained.html", "trained.html"):
        assert Path(name).read_text().count('<g class="sample">') == 2
    scope["writer"].flush()
    logged = events.EventAccumulator("runs/pqt").Reload()
    metrics = scope["metrics"]
    assert logged.Scalars("gws/up.weight/sqnr")[0].value == pytest.approx(metrics["up.weight"].sqnr, rel=1e-6)
    callbacks = [type(c).__name__ for c in scope["trainer"].callback_handler.callbacks]
    assert "MetricsCallback" in callbacks


def test_the_tables_of_fields_and_options():
    text = PAGE.read_text()
    fields = set(gws_compile.WeightMetrics.__dataclass_fields__) - {"name", "shape", "dtype", "fmt"}
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == fields
    assert (PAGE.parent / "seeing.png").stat().st_size < 200_000
