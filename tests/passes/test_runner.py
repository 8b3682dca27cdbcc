"""The passes in their order: bound, run, logged, traced and left out."""

import json
import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from gws_compile.passes import SKIP_VARIABLE, Pass, Rewrite, passes_of, samples, weights_of
from gws_compile.passes.runner import run
from support.graphs import rewritten_graph, show
from support.oracle import assert_bits_equal
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import gws_compile
from gws_compile import LearnedBits
from gws_compile.config import Config

NAMES = [
    "find_reads", "select_weights", "insert_samples", "fold_casts", "insert_masks", "mark_recompute", "round_attention",
]  # fmt: skip
OPTIONAL = [name for name in NAMES[2:] if name != "insert_masks"]

NOTHING_IS_REWRITTEN = pytest.mark.filterwarnings("ignore:no weight has been rewritten:gws_compile.GwsWarning")


class Layers(nn.Module):
    """One layer in the graph and one in a checkpoint's body."""

    def __init__(self):
        super().__init__()
        self.outside, self.inside = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.outside(checkpoint(self.inside, x, use_reentrant=False))


@pytest.fixture(autouse=True)
def _alike(monkeypatch):
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.delenv(SKIP_VARIABLE, raising=False)


def traced():
    """A graph, as it goes into the passes."""
    return Rewrite.of(fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4))))


# --- Bound and run ----------------------------------------------------------------------------------------------------


def test_passes_in_their_order_with_their_settings():
    def is_table(weight):
        return False

    config = Config.make("fp8_e4m3", backward="recompute")
    passes = passes_of(config, is_table=is_table)
    assert [one.name for one in passes] == NAMES
    assert [one.name for one in passes if one.without is not None] == OPTIONAL
    assert [dict(one.settings) for one in passes] == [
        {"names": {}, "is_table": is_table},
        {"config": config},
        {"config": config},
        {},
        {},
        {"backward": "recompute"},
        {"attention": None, "scheduled": False},
    ]


def test_each_pass_gets_the_graph_and_its_settings():
    calls = []

    def first(rewrite, *, word):
        calls.append((rewrite, word))

    def second(rewrite):
        calls.append((rewrite, None))

    rewrite = traced()
    run([Pass(first, {"word": "a"}), Pass(second, {}), Pass(first, {"word": "b"})], rewrite, 0)
    assert calls == [(rewrite, "a"), (rewrite, None), (rewrite, "b")]
    assert [one.name for one in rewrite.runs] == ["first", "second", "first"]


def test_each_run_is_noted_with_its_time_and_its_nodes():
    def grow(rewrite):
        graph = rewrite.module.graph
        (output,) = graph.find_nodes(op="output")
        with graph.inserting_before(output):
            result = graph.call_method("relu", (graph.call_method("neg", output.args),))
        output.args = (result,)

    def look(rewrite):
        pass

    rewrite = traced()
    x, before = torch.randn(2, 4), fx.symbolic_trace(rewrite.module)
    run([Pass(grow, {}), Pass(look, {})], rewrite, 0)
    assert [(one.name, one.nodes, one.left_out) for one in rewrite.runs] == [("grow", 2, False), ("look", 0, False)]
    assert all(0 < one.seconds < 60 for one in rewrite.runs)
    assert torch.equal(rewrite.module(x), before(x).neg().relu())  # its code is that of the graph


def test_a_graph_that_was_not_rewritten_has_no_weights():
    with pytest.raises(RuntimeError, match=r"run gws_compile\.passes\.rewrite first"):
        weights_of(traced().module)


# --- Log and trace ----------------------------------------------------------------------------------------------------


def log_of(caplog, model, **settings):
    with caplog.at_level(logging.DEBUG, logger="gws_compile"):
        torch.compile(model, backend=gws_compile.backend(inner="eager", **settings))(torch.ones(2, 4))
    return [record.getMessage() for record in caplog.records if record.name == "gws_compile"]


def test_the_log_has_a_line_for_each_pass_behind_the_summary(caplog):
    summary, *lines = log_of(caplog, Layers())
    assert summary.startswith("graph 0: 2 weights found, 2 rewritten;")
    found = [re.fullmatch(r"graph 0: pass (\w+): \d+\.\d\d ms, ([+-]\d+) nodes", line) for line in lines[: len(NAMES)]]
    assert [match[1] for match in found] == NAMES
    # Two keys and a clock in the graph, a key and the clock in the body, two samples.
    assert [int(match[2]) for match in found] == [0, 0, 7, 0, 0, 0, 0]
    assert not any("pass" in line for line in lines[len(NAMES) :])


def test_the_log_says_what_is_left_out(caplog, monkeypatch):
    monkeypatch.setenv(SKIP_VARIABLE, "fold_casts")
    with pytest.warns(gws_compile.GwsWarning, match="the pass fold_casts is left out"):
        lines = log_of(caplog, Layers())
    assert [line for line in lines if "left out" in line] == ["graph 0: pass fold_casts: left out"]
    assert lines[4] == "graph 0: pass fold_casts: left out"  # in its place


def test_the_trace_has_the_graph_before_and_after_each_pass(tmp_path):
    program = (
        "import torch, gws_compile\n"
        "m = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "with torch.autocast('cpu', torch.bfloat16):\n"
        "    torch.compile(m, backend=gws_compile.backend(inner='eager'))(torch.ones(2, 4))\n"
    )
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    (trace,) = tmp_path.iterdir()
    texts = artifacts(trace.read_text())
    assert list(texts) == [
        *(f"gws_compile_0_{name}_{when}" for name in NAMES for when in ("before", "after")),
        "gws_compile_before_0",
        "gws_compile_after_0",
    ]
    for name in NAMES:
        before, after = (texts[f"gws_compile_0_{name}_{when}"] for when in ("before", "after"))
        assert ("sample_weight" in before, "sample_weight" in after) == {
            "find_reads": (False, False),
            "select_weights": (False, False),
            "insert_samples": (False, True),
        }.get(name, (True, True))
        changed = {"insert_samples", "fold_casts"}
        assert (before != after) == (name in changed)
    assert "torch.bfloat16" not in texts["gws_compile_0_fold_casts_before"].partition("gws.sample_weight")[2]
    assert "torch.bfloat16" in texts["gws_compile_0_fold_casts_after"].partition("gws.sample_weight")[2]


def artifacts(trace):
    """Those of the package in a structured trace: name -> text, in their order."""
    found = {}
    lines = trace.splitlines()
    for i, line in enumerate(lines):
        record = re.search(r"\] (\{.*\})$", line)
        name = json.loads(record[1]).get("artifact", {}).get("name", "") if record else ""
        if name.startswith("gws_compile"):
            payload = []
            for text in lines[i + 1 :]:
                if not text.startswith("\t"):
                    break
                payload.append(text[1:])
            found[name] = "\n".join(payload)
    return found


# --- Left out ---------------------------------------------------------------------------------------------------------


def step(model, x, **settings):
    """Output and gradients of a training step, and the backend."""
    torch._dynamo.reset()
    model.zero_grad()
    backend = gws_compile.backend("fp4_e2m1", inner="eager", **settings)
    out = torch.compile(model, backend=backend, fullgraph=True)(x)
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())], backend


@NOTHING_IS_REWRITTEN
@pytest.mark.parametrize("settings", [{}, {"bits": LearnedBits()}, {"backward": "recompute"}], ids=str)
def test_without_insert_samples_the_model_is_the_plain_one(settings, monkeypatch):
    model, x = Layers(), torch.randn(2, 4)
    monkeypatch.setenv(SKIP_VARIABLE, "insert_samples")
    message = "^GWS_SKIP_PASSES: the pass insert_samples is left out; this is for debugging$"
    with pytest.warns(gws_compile.GwsWarning, match=message):
        results, backend = step(model, x, **settings)
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    for result, expected in zip(results, [out, *(p.grad for p in model.parameters())], strict=True):
        assert_bits_equal(result, expected)
    assert {r.name: r.reason for r in backend.report()} == dict.fromkeys(
        ["outside.weight", "inside.weight"], "the pass insert_samples is left out"
    )
    assert not backend.report().rewritten
    assert not samples(backend.graphs[0])


def test_without_fold_casts_the_reads_convert_the_samples(monkeypatch):
    model, x = Layers(), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected, folded = step(model, x)
        monkeypatch.setenv(SKIP_VARIABLE, "fold_casts")
        with pytest.warns(gws_compile.GwsWarning, match="the pass fold_casts is left out"):
            results, plain = step(model, x)
    for result, other in zip(results, expected, strict=True):
        assert_bits_equal(result, other)
    assert "torch.bfloat16" in show(folded.graphs[0])
    assert "torch.bfloat16" not in show(plain.graphs[0])
    assert len(plain.report().rewritten) == 2


def test_without_mark_recompute_no_sample_is_marked(monkeypatch):
    model, x = Layers(), torch.randn(2, 4)
    expected, marked = step(model, x, backward="recompute")
    monkeypatch.setenv(SKIP_VARIABLE, "mark_recompute")
    with pytest.warns(gws_compile.GwsWarning, match="the pass mark_recompute is left out"):
        results, plain = step(model, x, backward="recompute")
    for result, other in zip(results, expected, strict=True):
        assert_bits_equal(result, other)
    marks = [sum("recompute" in node.meta for node in samples(backend.graphs[0])) for backend in (marked, plain)]
    assert marks[0] - marks[1] == 1  # torch 2.11 has marks of its own in a checkpoint's body
    # Compile caches see the text of a graph, and no marks: it is that of `backward="save"`.
    monkeypatch.delenv(SKIP_VARIABLE)
    _, saved = step(model, x, backward="save")
    assert show(plain.graphs[0]) == show(saved.graphs[0]) != show(marked.graphs[0])


def test_several_are_left_out_and_each_is_said(monkeypatch):
    monkeypatch.setenv(SKIP_VARIABLE, " mark_recompute , fold_casts,")
    with pytest.warns(gws_compile.GwsWarning) as said, torch.autocast("cpu", torch.bfloat16):
        graph = rewritten_graph(Layers(), torch.ones(2, 4), backward="recompute")
    assert sorted(str(one.message).split(" the pass ")[1].split()[0] for one in said) == [
        "fold_casts",
        "mark_recompute",
    ]
    assert "torch.bfloat16" not in show(graph)


def test_nothing_is_left_out_by_an_empty_variable(monkeypatch):
    monkeypatch.setenv(SKIP_VARIABLE, " , ")
    assert len(samples(rewritten_graph(Layers(), torch.ones(2, 4)))) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("fold", "there is no pass 'fold'"),
        ("find_reads", "the other passes need find_reads"),
        ("select_weights", "the other passes need select_weights"),
        ("a, find_reads", "there is no pass 'a'"),
    ],
)
def test_names_that_cannot_be_left_out(names, message, monkeypatch):
    """The accepted ones are said, before anything is run."""
    monkeypatch.setenv(SKIP_VARIABLE, names)
    rewrite = traced()
    with pytest.raises(ValueError) as raised:
        run(passes_of(Config.make()), rewrite, 0)
    accepted = "insert_samples, fold_casts, mark_recompute, round_attention can be left out"
    assert str(raised.value) == f"{SKIP_VARIABLE}: {message}; {accepted}"
    assert rewrite.runs == []
