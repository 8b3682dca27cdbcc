"""`explain` and the backend's report list every weight of a module, those that no graph has too."""

import pytest
import torch
from torch import nn

import gws_compile

EXCLUDED = "matches the exclude pattern '*.gate.weight'"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.gate = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) * self.gate(x)


class Broken(nn.Module):
    """torch leaves the frame with the loop, and compiles one graph for both blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.bare = nn.Parameter(torch.randn(8, 8))
        self.unused = nn.Linear(8, 8)
        self.lm_head, self.table = nn.Linear(8, 8), nn.Embedding(8, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x @ self.bare


def texts(report):
    return {r.name: r.op if r.rewritten else r.reason.split(":")[0] for r in report}


def test_behind_a_graph_break():
    report = gws_compile.explain(Broken(), torch.randn(2, 8))
    assert texts(report) == {
        "blocks.0.fc.weight": "linear",
        "blocks.0.gate.weight": EXCLUDED,
        "blocks.1.fc.weight": "linear",
        "blocks.1.gate.weight": EXCLUDED,
        "bare": "no traced graph has it",
        "unused.weight": "no traced graph has it",
        "lm_head.weight": "matches the exclude pattern 'lm_head.*'",
        "table.weight": "embedding table, in no traced graph",
    }
    assert [r.name for r in report if "TORCH_LOGS=graph_breaks" in r.reason] == ["bare", "unused.weight"]


def test_names_are_those_of_the_unwrapped_model():
    model = torch.compile(Broken(), backend="eager")
    assert "blocks.1.fc.weight" in texts(gws_compile.explain(model, torch.randn(2, 8)))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_say_how_to_have_them_traced(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(8, 16)

        def forward(self, x):
            return self.rnn(x)[0]

    report = gws_compile.explain(Model(), torch.randn(2, 8))
    assert [r.name for r in report.skipped] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert report.skipped[0].reason == (
        f"no traced graph has it: torch does not trace {kind.__name__} unless torch._dynamo.config.allow_rnn is set, "
        "and then it is rewritten"
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        assert len(gws_compile.explain(Model(), torch.randn(2, 8)).rewritten) == 2
        torch._dynamo.reset()
        model = Model()
        model.rnn = torch.compiler.disable(model.rnn)  # behind a break all the same
        assert "eagerly behind a graph break" in gws_compile.explain(model, torch.randn(2, 8)).skipped[0].reason


def test_a_tied_weight_is_listed_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    with pytest.warns(gws_compile.GwsWarning, match="no weight has been rewritten"):
        report = gws_compile.explain(Tied(), torch.arange(4))
    assert [r.name for r in report] == ["embed.weight"]


def test_a_function_has_no_weights_but_those_of_its_graphs():
    block = Block()
    assert texts(gws_compile.explain(lambda x: block(x), torch.randn(2, 8))) == {
        "fc.weight": "linear",
        "gate.weight": "matches the exclude pattern 'gate.weight'",
    }


def test_the_report_of_a_training_run():
    model = Broken()
    backend = gws_compile.backend(inner="eager")
    compiled = torch.compile(model, backend=backend)
    compiled(torch.randn(2, 8)).sum().backward()
    assert texts(backend.report()) == {
        "blocks.0.fc.weight": "linear",
        "blocks.0.gate.weight": EXCLUDED,
        "blocks.1.fc.weight": "linear",
        "blocks.1.gate.weight": EXCLUDED,
        "bare": "no traced graph has it",
        "unused.weight": "no traced graph has it",
        "lm_head.weight": "matches the exclude pattern 'lm_head.*'",
        "table.weight": "embedding table, in no traced graph",
    }


def test_a_model_that_has_no_values():
    """On the meta device, of which autocast knows nothing."""
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(2, 8)
    assert texts(gws_compile.explain(model, x)) == {"0.weight": "linear", "1.weight": "linear"}
