"""The histograms of a report against those of the reference, and how they are drawn."""

import pytest
import torch
from support.reports import bar_heights, page_of
from torch import nn

import gws_compile
from gws_compile.report import html_page


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_histograms_are_those_of_the_reference(tmp_path, monkeypatch, dtype):
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
    shown = []
    render = html_page.render
    monkeypatch.setattr(html_page, "render", lambda report, found: shown.extend(found) or render(report, found))
    page = page_of(backend.report(), tmp_path)
    for found, (name, w) in zip(
        shown, {"conv.weight": model.conv.weight, "fc.weight": model.fc.weight}.items(), strict=True
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
