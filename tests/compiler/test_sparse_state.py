"""The setting of sparsity in a backend's state, in its metrics, and in `gws export`'s reading of a state."""

import pytest
import torch
from support.mask_oracle import mask_of
from support.small_models import Net, OneLayer

import gws_compile
from gws_compile import PrunedGroups
from gws_compile.command_line.trained_model import settings_of_state

pytestmark = pytest.mark.usefixtures("fresh")


def trained(**settings):
    model = OneLayer(40, 40)
    backend = gws_compile.backend("fp8_e4m3", inner="eager", **settings)
    torch.compile(model, backend=backend)(torch.randn(2, 40)).sum().backward()
    return model, backend


@pytest.mark.parametrize("sparsity", ["2:4", PrunedGroups(0.5, "columns", size=4)], ids=str)
def test_a_state_of_another_sparsity_is_refused(sparsity):
    _, backend = trained(sparsity=sparsity)
    state = backend.state_dict()
    assert state["settings"] == [["fc.weight", f"e4m3 32x32 floor {sparsity}"]]
    gws_compile.backend("fp8_e4m3", sparsity=sparsity).load_state_dict(state)
    for other in (None, "1:4"):
        with pytest.raises(ValueError, match=r"\(format, block, scale, sparsity\), this backend has 'e4m3 32x32 floor"):
            gws_compile.backend("fp8_e4m3", sparsity=other).load_state_dict(state)
    _, dense = trained()
    with pytest.raises(ValueError, match=r"saved with fc.weight in 'e4m3 32x32 floor' \("):
        gws_compile.backend("fp8_e4m3", sparsity=sparsity).load_state_dict(dense.state_dict())
    assert gws_compile.backend(**settings_of_state(state)).config.sparsity == backend.config.sparsity


def test_metrics_are_of_what_is_kept():
    model, backend = trained(sparsity="2:4")
    metrics = backend.metrics()["fc.weight"]
    w = model.fc.weight.detach()
    mask = mask_of(w, "2:4")
    kept = torch.where(mask, w, 0).double()
    cast = gws_compile.quantize(kept.float(), "fp8_e4m3").double()
    noisy = torch.where(mask, gws_compile.sample(kept.float(), "fp8_e4m3", name="fc.weight"), 0).double()
    for got, used in ((metrics.sqnr, cast), (metrics.sqnr_noise, noisy)):
        expected = 10 * torch.log10(kept.square().sum() / (kept - used).square().sum())
        assert got == pytest.approx(expected.item(), abs=1e-9)
    assert metrics.zeros == (cast == 0).double().mean().item() >= 0.5
    assert metrics.flushed == ((kept != 0) & (cast == 0)).double().mean().item()


def test_the_report_has_a_column_where_something_is_sparse():
    model = Net()
    rules = [("down.*", {"sparsity": PrunedGroups(0.5)})]
    backend = gws_compile.backend("fp8_e4m3", rules=rules, inner="eager")
    torch.compile(model, backend=backend)(torch.randn(2, 40))
    report = backend.report()
    assert {record.name: record.sparsity for record in report} == {"up.weight": "", "down.weight": "rows:0.5"}
    assert "sparsity" in str(report).splitlines()[0]
    _, dense = trained()
    assert "sparsity" not in str(dense.report())
    assert '"sparsity": "rows:0.5"' in report.to_json()
