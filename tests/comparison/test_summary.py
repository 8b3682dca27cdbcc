"""Rows and tables, from runs with figures that were worked out by hand."""

from pathlib import Path

import pytest
from scipy import stats

from gws_compile.comparison.compared_settings import ComparedSetting
from gws_compile.comparison.plots import losses_figure, robustness_figure
from gws_compile.comparison.summary import summarize

SETTINGS = [
    ComparedSetting("plain", "plain", {"noise": "none"}),
    ComparedSetting("int3, cast afterwards", "cast-afterwards", {"fmt": "int3", "noise": "none"}),
    ComparedSetting("int3, straight-through", "straight-through", {"fmt": "int3", "noise": "none"}),
    ComparedSetting("plain, longer", "plain", {"noise": "none"}, {"steps": 9}),
    ComparedSetting("int3, longer", "", {"fmt": "int3"}, {"steps": 9}),
]
DEPLOYED = {
    "plain": [2.0, 2.5, 2.25],
    "int3, straight-through": [2.125, 2.75, 2.25],
    "plain, longer": [1.0, 1.5, 1.25],
    "int3, longer": [1.5, 1.75, None],
}
CAST = {"plain": [2.5, 3.0, 3.0], "int3, straight-through": [2.125, 2.75, 2.25], "plain, longer": [2.0, 1.75, 1.5]}


def run(setting, seed):
    name, deployed = setting.name, DEPLOYED[setting.name][seed]
    return {
        "setting": name,
        "method": setting.method,
        "seed": seed,
        "trained": deployed,
        "deployed": deployed,
        "uncast": DEPLOYED[name][seed],
        "casts": {"int3": CAST[name][seed]} if name in CAST else {},
        "distances": {"int3": 0.25},
        "cast_bytes": {"int3": 3072},
        "average_bits": 3.0 if name == "int3, longer" else None,
        "bytes": 2048 * (1 + seed),
        "figures": {"tokens": 64.0},
    }


RUNS = [run(setting, seed) for setting in SETTINGS if setting.name in DEPLOYED for seed in range(3)]
FOUND = summarize(SETTINGS, RUNS, ["int3"])


def test_differences_are_paired_by_seed():
    """Half of the interval is that of scipy's paired t-test, which the scatter of the seeds does not widen."""
    ours = FOUND["int3, straight-through"].minus_plain
    test = stats.ttest_rel(DEPLOYED["int3, straight-through"], DEPLOYED["plain"])
    low, high = test.confidence_interval(0.95)
    assert (ours.mean - ours.half, ours.mean + ours.half) == pytest.approx((low, high), abs=1e-4)
    assert FOUND["int3, straight-through"].minus_cast.mean == pytest.approx((-0.375 - 0.25 - 0.75) / 3)
    assert FOUND["int3, cast afterwards"].minus_plain.mean == pytest.approx((0.5 + 0.5 + 0.75) / 3)
    assert FOUND["int3, cast afterwards"].deployed.mean == pytest.approx(8.5 / 3)
    assert FOUND["plain"].minus_plain is None


def test_rows_stand_beside_plain_training_of_the_same_kind():
    """Where there is plain training with the same further arguments, it is what a row is compared with."""
    row = FOUND["int3, longer"]
    assert row.minus_plain.mean == pytest.approx((0.5 + 0.25) / 2)
    assert row.minus_cast.mean == pytest.approx((-0.5 + 0.0) / 2)
    assert FOUND["plain, longer"].minus_plain is None
    assert (row.seeds, row.diverged) == (2, 1)


def test_casts_afterwards_that_are_runs_of_their_own():
    """As those of a script, whose weights cannot be seen: what is compared with them is their loss."""
    own = [
        {"setting": "int3, cast afterwards", "method": "cast-afterwards", "seed": seed, "deployed": 3.0}
        for seed in range(3)
    ]
    bare = [{key: one[key] for key in ("setting", "method", "seed", "deployed")} for one in RUNS]
    found = summarize(SETTINGS, [*bare, *own], [])
    assert found["int3, straight-through"].minus_cast.mean == pytest.approx((-0.875 - 0.25 - 0.75) / 3)
    assert found["int3, cast afterwards"].minus_plain.mean == pytest.approx((1.0 + 0.5 + 0.75) / 3)
    assert found["int3, longer"].minus_cast is None  # no cast of the longer training was run
    assert found["int3, straight-through"].casts == {}


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_tables():
    longer, of_longer = ["1.2500 ± 0.6210"] * 2, ["1.6250 ± 1.5883"] * 2
    assert cells(FOUND.table())[2:] == [
        ["plain", "2.2500 ± 0.6210", "2.2500 ± 0.6210", "", "", "", "4", "3"],
        ["int3, cast afterwards", "", "2.8333 ± 0.7171", "+0.5833 ± 0.3586", "", "", "3", "3"],
        ["int3, straight-through", *["2.3750 ± 0.8216"] * 2, "+0.1250 ± 0.3105", "-0.4583 ± 0.6464", "", "4", "3"],
        ["plain, longer", *longer, "", "", "", "4", "3"],
        ["int3, longer", *of_longer, "+0.3750 ± 1.5883", "-0.2500 ± 3.1765", "3.00", "4", "2, 1 diverged"],
    ]
    methods = cells(FOUND.methods_table())
    assert methods[0] == ["format", "cast afterwards", "straight-through"]
    assert methods[2:] == [["int3", "+0.5833 ± 0.3586", "+0.1250 ± 0.3105"]]
    robustness = cells(FOUND.robustness_table())
    assert robustness[0] == ["weights of", "uncast", "int3"]
    assert robustness[3] == ["int3, straight-through", "+0.1250 ± 0.3105", "+0.1250 ± 0.3105"]
    assert cells(FOUND.figures_table())[3] == ["int3, cast afterwards", "0.2500 ± 0.0000", ""]
    assert FOUND.table() in str(FOUND)
    with pytest.raises(KeyError, match="there are: plain, int3, cast afterwards"):
        FOUND["int4"]


def test_pictures(tmp_path):
    """Every row with a difference is a point, every row with casts a line."""

    def drawn(panel):
        return {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in panel.containers}

    by_method, by_name = losses_figure(FOUND.rows).axes
    assert [text.get_text() for text in by_method.get_xticklabels()] == ["int3"]
    (cast,), (straight,) = (drawn(by_method)[name] for name in ("cast afterwards", "straight-through"))
    assert -0.5 < cast[0] < straight[0] < 0.5
    assert cast[1] == FOUND["int3, cast afterwards"].minus_plain.mean
    assert straight[1] == FOUND["int3, straight-through"].minus_plain.mean
    assert [text.get_text() for text in by_name.get_yticklabels()] == ["int3, longer"]
    assert drawn(by_name) == {"own settings": [[FOUND["int3, longer"].minus_plain.mean, 0]]}
    lines = {}
    for panel in robustness_figure(FOUND.rows, ("uncast", "int3")).axes:
        lines |= {name: [y for _, y in points] for name, points in drawn(panel).items()}
    assert lines == {row.name: [value.mean for value in row.casts.values()] for row in FOUND.rows if row.casts}
    assert len(lines) == 4
    files = FOUND.plot(tmp_path)
    assert [file.name for file in files] == ["losses.png", "robustness.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert summarize(SETTINGS[:1], RUNS[:3], []).plot(tmp_path) == []


def test_a_picture_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'gws-compile\[examples\]'"):
        FOUND.plot(Path())
