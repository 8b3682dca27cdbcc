"""Comparisons as a whole: what is trained and what is not trained again, and who waits for whom."""

import functools
import json
import threading

import pytest
import torch
from filelock import FileLock
from support.small_models import Net

import gws_compile
from gws_compile.comparison import comparing
from gws_compile.comparison.compared_settings import ComparedSetting
from gws_compile.comparison.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("fresh")


class Training:
    """A training function that counts its runs, and may fail in some."""

    def __init__(self):
        self.runs = []
        self.failing = ()
        self.stops_at = None

    def __call__(self, backend, seed, *, scale=1.0):
        what = (backend.config.weights.name, backend.config.noise, seed)
        self.runs.append(what)
        if self.stops_at is not None and len(self.runs) > self.stops_at:
            raise KeyboardInterrupt
        if what in self.failing:
            raise RuntimeError("out of something")
        torch.manual_seed(seed)
        model = torch.compile(Net(), backend=backend)
        x = torch.randn(4, 40)
        return model, lambda: scale * (model(x) - x).square().mean().item(), {"tokens": 4}


ARGUMENTS = {
    "fmts": ["int3"],
    "methods": ["cast-afterwards", "straight-through"],
    "seeds": 2,
    "common": {"inner": "eager"},
    "progress": False,
}
PLAIN = [("fp8_e4m3", "none", 0), ("fp8_e4m3", "none", 1)]
STRAIGHT = [("int3", "none", 0), ("int3", "none", 1)]


def test_goes_on_where_it_was(tmp_path):
    """A comparison that was interrupted makes the runs that are missing, and no other."""
    train = Training()
    train.stops_at = 3
    with pytest.raises(KeyboardInterrupt):
        gws_compile.compare(train, **ARGUMENTS, out=tmp_path)
    assert train.runs == [*PLAIN, STRAIGHT[0], STRAIGHT[1]]
    train.runs, train.stops_at = [], None
    first = gws_compile.compare(train, **ARGUMENTS, out=tmp_path)
    assert train.runs == [STRAIGHT[1]]
    again = gws_compile.compare(train, **ARGUMENTS, out=tmp_path)
    assert train.runs == [STRAIGHT[1]]
    assert str(again) == str(first)
    assert [row.seeds for row in again.rows] == [2, 2, 2]
    # Nothing is trained: the weights of all rows are the same.
    assert again["int3, straight-through"].minus_cast.mean == pytest.approx(0, abs=1e-6)
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert [(run["setting"], run["seed"], run["tokens"]) for run in content["runs"]] == [
        ("plain", 0, 4.0),
        ("plain", 1, 4.0),
        ("int3, straight-through", 0, 4.0),
        ("int3, straight-through", 1, 4.0),
    ]
    assert content["runs"][0]["loss"] == content["runs"][0]["deployed"]
    assert (tmp_path / "comparison.md").read_text() == f"{again}\n"
    assert not list(tmp_path.rglob("*.part"))


def test_runs_that_fail(tmp_path, capsys):
    """They are told of, the others go on, and they are tried again; without plain training there is nothing."""
    train = Training()
    train.failing = [STRAIGHT[0]]
    found = gws_compile.compare(train, **ARGUMENTS, out=tmp_path)
    row = found["int3, straight-through"]
    assert row.failed == ("seed 0: RuntimeError: out of something",)
    assert row.seeds == 1
    assert "1, 1 failed" in str(found)
    assert "RuntimeError: out of something" in capsys.readouterr().err
    train.runs, train.failing = [], ()
    assert not gws_compile.compare(train, **ARGUMENTS, out=tmp_path)["int3, straight-through"].failed
    assert train.runs == [STRAIGHT[0]]
    train.failing = PLAIN
    with pytest.raises(RuntimeError, match="out of something"):
        gws_compile.compare(train, **ARGUMENTS, out=tmp_path / "other")


def test_runs_that_lack_a_cast_are_made_again(tmp_path):
    train = Training()
    gws_compile.compare(train, **ARGUMENTS, out=tmp_path)
    train.runs = []
    found = gws_compile.compare(train, **{**ARGUMENTS, "presets": ["int3", "int2"]}, out=tmp_path)
    assert train.runs == [*PLAIN, *STRAIGHT]
    assert found.presets == ("int3", "int2")
    assert set(found["plain"].casts) == {"uncast", "int3", "int2"}


def test_other_comparisons_are_refused(tmp_path):
    train = Training()
    gws_compile.compare(train, **ARGUMENTS, out=tmp_path)
    train.runs = []
    with pytest.raises(ValueError, match=r"runs of another comparison, with training = \{\}, now \{'scale': '2.0'\}"):
        gws_compile.compare(train, **ARGUMENTS, training={"scale": 2.0}, out=tmp_path)
    with pytest.raises(ValueError, match=r"with bound = \{\}, now \{'scale': '2.0'\}"):
        gws_compile.compare(functools.partial(train, scale=2.0), **ARGUMENTS, out=tmp_path)
    assert not train.runs
    own = {**ARGUMENTS, "settings": {"mine": {"fmt": "int4"}}}
    gws_compile.compare(train, **own, out=tmp_path)
    own["settings"] = {"mine": {"fmt": "int2"}}
    with pytest.raises(ValueError, match="runs of 'mine' with other arguments"):
        gws_compile.compare(train, **own, out=tmp_path)


def test_what_functions_close_over_tells_them_apart():
    def made(scale):
        model = object()
        return lambda backend, seed: (scale, model)

    one, other, again = (comparing._identity(made(scale), {}) for scale in (1.0, 2.0, 1.0))
    assert one != other
    assert one == again


def test_a_wrong_argument_takes_no_folder(tmp_path):
    """Only runs that have ended make a folder that of one comparison."""
    train = Training()
    with pytest.raises(TypeError, match="unexpected keyword argument 'scales'"):
        gws_compile.compare(train, **ARGUMENTS, training={"scales": 1.0}, out=tmp_path)
    assert gws_compile.compare(train, **ARGUMENTS, training={"scale": 1.0}, out=tmp_path)["plain"].seeds == 2


def test_a_format_that_is_added(tmp_path):
    """Plain training is made again, for its cast; what was trained for other formats is not, unless presets ask."""
    train = Training()
    gws_compile.compare(train, **ARGUMENTS, out=tmp_path)
    train.runs = []
    found = gws_compile.compare(train, **{**ARGUMENTS, "fmts": ["int3", "int2"]}, out=tmp_path)
    assert train.runs == [*PLAIN, ("int2", "none", 0), ("int2", "none", 1)]
    assert set(found["int3, straight-through"].casts) == {"uncast", "int3"}
    assert set(found["int2, straight-through"].casts) == {"uncast", "int3", "int2"}


def test_processes_share_a_comparison(tmp_path, monkeypatch):
    """A run that another process is at is left to it, and waited for."""
    setting = ComparedSetting("one", "", {"fmt": "int3"})
    folder = RunFolder(tmp_path, {})
    monkeypatch.setattr(comparing, "_WAIT_SECONDS", 0.01)
    held, made = FileLock(folder.file(setting, 0, "lock"), thread_local=False), threading.Event()
    held.acquire()

    def other_process():
        made.wait(30)
        content = {"setting": "one", "method": "", "arguments": setting.text, "seed": 0, "deployed": 1.0, "casts": {}}
        folder.write_json(folder.file(setting, 0), content)
        held.release()

    thread = threading.Thread(target=other_process)
    thread.start()

    def run(one, seed):
        assert seed == 1
        made.set()
        return {"deployed": 2.0, "casts": {}}

    runs = comparing.make_runs([setting], [0, 1], folder, run, lambda _: (), progress=False)
    thread.join()
    assert [(one["seed"], one["deployed"]) for one in runs] == [(0, 1.0), (1, 2.0)]


def test_names_of_files(tmp_path):
    """Names that differ in signs alone have different files."""
    folder = RunFolder(tmp_path, {})
    names = ["a b", "a-b", "a, b", "ä", "ö", "x" * 200, "x" * 201]
    files = {folder.file(ComparedSetting(name, "", {}), 0).name for name in names}
    assert len(files) == len(names)
    assert all(file.isascii() and len(file) < 120 for file in files)


def test_losses_that_are_no_numbers(tmp_path):
    """A run that diverged is counted beside the mean of the others, and its JSON is JSON."""

    def train(backend, seed):
        model, evaluate, figures = Training()(backend, seed)
        diverges = seed == 1 and backend.config.weights.name == "int3"
        return model, lambda: evaluate() * (float("nan") if diverges else 1.0), figures

    found = gws_compile.compare(train, **ARGUMENTS, out=tmp_path)
    row = found["int3, straight-through"]
    assert (row.seeds, row.diverged) == (1, 1)
    assert row.deployed.count == row.minus_plain.count == 1
    assert "1, 1 diverged" in found.table()
    json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
