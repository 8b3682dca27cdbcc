"""What the records say by themselves."""

import torch
from torch import nn

import gws_compile


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
