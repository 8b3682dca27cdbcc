"""The drawing of a rewritten graph."""

import torch
from torch import nn

import gws_compile
from gws_compile.report.graph_drawing import lay_out, shorten


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
    drawing = lay_out(report.graphs[0].graph)
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
