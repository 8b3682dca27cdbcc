"""``gws advise``."""

import json
import re
from pathlib import Path

import pytest

from gws_compile import advise
from gws_compile.command_line.cli import main


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def runs():
    """Made with the published coefficients, but for eps."""
    return [
        {
            "params": n,
            "tokens": d,
            "loss": advise(n, d, fmt or "e4m3").formats[0 if fmt else 1].terms.loss - 0.4,
            "fmt": fmt,
            "name": "of no concern",
        }
        for n in (5e7, 1e8, 2e8, 4e8)
        for d in (1e10, 3e10, 1e11)
        for fmt in (None, "e1m1", "e2m1", "e1m2", "e3m2")
    ]


def test_the_command(capsys):
    assert main(["advise", "--params", "1e9", "--tokens", "1e11", "--fmt", "e4m3", "--block", "128"]) == 0
    assert capsys.readouterr().out == f"{advise(1e9, 1e11, 'e4m3', block=128)}\n"


def test_formats_several_times_and_by_commas(capsys):
    assert main(["advise", "--params=1B", "--fmt=e4m3,e5m2", "--fmt", "fp6_e3m2", "--block=channel"]) == 0
    assert capsys.readouterr().out == f"{advise(1e9, fmt=['e4m3', 'e5m2', 'e3m2'], block='channel')}\n"


def test_a_budget_and_bits(capsys):
    assert main(["advise", "--compute", "1e24", "--bits", "6"]) == 0
    assert capsys.readouterr().out == f"{advise(compute=1e24, bits=6)}\n"


def test_json_and_picture(capsys):
    pytest.importorskip("matplotlib")
    options = ["--params=350M", "--tokens=10B", "--json", "advice.json", "--plot", "advice.png"]
    assert main(["advise", *options]) == 0
    assert json.loads(Path("advice.json").read_text()) == json.loads(json.dumps(advise(3.5e8, 1e10).to_dict()))
    assert Path("advice.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_fit_of_ones_own(capsys, wrapped):
    Path("runs.json").write_text(json.dumps({"runs": runs()} if wrapped else runs()))
    assert main(["advise", "--fit", "runs.json"]) == 0
    alone = capsys.readouterr().out
    assert re.search(r"^eps +1\.5061  1\.506 to 1\.506 +1\.9061$", alone, re.MULTILINE)
    assert "60 runs" in alone
    assert "D_crit" not in alone
    assert main(["advise", "--fit=runs.json", "--params=1e8", "--tokens=1e10", "--fmt=e2m1", "--json=out.json"]) == 0
    both = capsys.readouterr().out
    assert both.startswith(alone)
    assert "scope: Fitted to 60 runs of one's own" in both
    content = json.loads(Path("out.json").read_text())
    assert content["law"]["eps"] == pytest.approx(1.5061, rel=1e-6)
    assert content["formats"][0]["terms"]["loss"] == pytest.approx(
        advise(1e8, 1e10, "e2m1").formats[0].terms.loss - 0.4, rel=1e-6
    )


def test_runs_that_are_left_out_are_told(capsys):
    Path("runs.json").write_text(json.dumps([*runs(), runs()[0] | {"fmt": "int4"}, runs()[1] | {"fmt": "mxfp8"}]))
    assert main(["advise", "--fit", "runs.json"]) == 0
    written = capsys.readouterr()
    assert written.err == (
        "gws advise: runs.json: 2 of 62 runs are left out of the fit: 1 in the integer format int4, "
        "1 in 'mxfp8', which is no float format\n"
    )
    assert "60 runs" in written.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to answer: give params, tokens, compute or bits"),
        (["--params", "many"], "--params is 'many'; accepted: a number above 0, such as 1e9, or with a unit"),
        (["--params=1e9", "--fmt=int4"], "fmt is 'int4', an integer format"),
        (["--params=1e9", "--fmt=mxfp4"], "fmt is 'mxfp4', a preset"),
        (["--params=1e9", "--fmt=e4m3,"], "unknown format ''"),
        (["--params=1e9", "--block=32x32"], "block is '32x32'; accepted: a whole number from 2 on"),
        (["--params=1e9", "--block=tensor"], "block is 'tensor', for which no log2(B) is known"),
        (["--params=1e9", "--json=no/such.json"], "no/such.json: there is no such folder"),
        (["--params=1e9", "--plot=no/such.png"], "no/such.png: there is no such folder"),
        (["--params=1e9", "--plot=advice.nothing"], "Format 'nothing' is not supported"),
        (["--fit=missing.json"], "missing.json"),
        (["--fit=none.json"], "none.json: the runs are 3"),
        (["--fit=few.json"], "a fit takes 3 runs or more, 2 beyond the free coefficients; there are 2"),
        (
            ["--fit=many.json", "--fmt=e4m3"],
            "--fit alone prints the fit: --fmt, --block, --plot and --json need --params",
        ),
    ],
    ids=str,
)
def test_what_is_refused(options, message, capsys):
    Path("none.json").write_text("3")
    Path("few.json").write_text(json.dumps(runs()[:2]))
    Path("many.json").write_text(json.dumps(runs()[:10]))
    assert main(["advise", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gws advise: error: ")
    assert message in error


def test_bits_that_are_no_number(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["advise", "--bits", "six"])
    assert ended.value.code == 2
    assert "argument --bits: invalid int value: 'six'" in capsys.readouterr().err
