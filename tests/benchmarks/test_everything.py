"""All benchmarks in one command: what a GPU's programs become on a CPU, limits, and figures of programs that failed."""

import importlib
import json
import subprocess
import time
from pathlib import Path

import pytest

everything = importlib.import_module("everything")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three programs in place of a GPU's: one that works, one that fails behind its first figure, one that hangs."""
    write = "import json, sys, time\njson.dump({'timings': []}, open(sys.argv[sys.argv.index('--json') + 1], 'w'))\n"
    (tmp_path / "works.py").write_text(write)
    (tmp_path / "fails.py").write_text(write + "sys.exit(3)\n")
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(everything, "HERE", tmp_path)
    found = {
        "works": everything.Program(("works.py", "--size", "1b"), 1, 1),
        "fails": everything.Program(("fails.py",), 1, 2),
        "hangs": everything.Program(("hangs.py",), 0.005, 3),
    }
    monkeypatch.setattr(everything, "ON_GPU", found)
    monkeypatch.setenv("GPU_TESTS_DEVICE", "cuda")  # which a rehearsal sets
    return tmp_path


def test_a_rehearsal_differs_by_device_and_sizes() -> None:
    for program in everything.ON_GPU.values():
        command = everything.rehearsed(program).command
        assert command[0] == program.command[0]
        options = [word for word in program.command if word.startswith("-")]
        assert [word for word in command if word.startswith("-") and word != "--device"] == options
        assert not {"1b", "134m", "4096x4096"} & set(command)
        if command[0].endswith(".py"):
            assert command[-2:] == ("--device", "cpu")
    (growth,) = [p for p in everything.ON_GPU.values() if p.command[0] == "growth.py"]
    assert everything.rehearsed(growth).command == (
        "growth.py", "--largest", "5", "--layers", "1", "--device", "cpu"
    )  # fmt: skip


def test_the_parts_hold_every_program_and_fit() -> None:
    parts = [[p.minutes for p in everything.ON_GPU.values() if p.part == part] for part in (1, 2, 3)]
    assert sum(map(len, parts)) == len(everything.ON_GPU)
    assert all(sum(minutes) <= 9.5 for minutes in parts[:2])  # the last one's growth gets what is left


def test_what_fails_is_said_and_the_rest_goes_on(programs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = programs / "out.json"
    everything.main(["--rehearse", f"--out={out}"])
    results = json.loads(out.read_text())["results"]
    assert results["works"]["figures"] == {"timings": []}
    assert "failed" not in results["works"]
    assert (results["fails"]["figures"], results["fails"]["failed"]) == ({"timings": []}, "exit code 3")
    assert results["hangs"]["failed"] == "ended after 0.0 minutes"
    printed = capfd.readouterr().out
    assert "=== works: works.py --size tiny --device cpu" in printed
    assert "exit code 3" in printed.rpartition("| benchmark")[2]


def test_a_later_call_keeps_what_is_there(programs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = programs / "out.json"
    everything.main(["--rehearse", "--part=1", f"--out={out}"])
    everything.main(["--rehearse", "--part=2", "--minutes=0", f"--out={out}"])
    kept = json.loads(out.read_text())
    assert kept["results"].keys() == {"works", "fails"}
    assert kept["results"]["fails"] == {"failed": "no time left of 0 minutes"}
    out.write_text(json.dumps(kept | {"torch": "1.13"}))
    everything.main(["--rehearse", "--only", "works", f"--out={out}"])
    assert json.loads(out.read_text())["results"].keys() == {"works"}
    assert "torch 1.13: they are replaced" in capfd.readouterr().out


def test_a_program_that_is_ended_takes_its_processes_along(programs: Path) -> None:
    pid = programs / "pid"
    (programs / "starts.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid)!r} + '.new', 'w').write(str(child.pid))\n"
        f"import os; os.rename({str(pid)!r} + '.new', {str(pid)!r})\n"
        "time.sleep(600)\n"
    )
    everything.run("starts", everything.Program(("starts.py",), 1, 1), seconds=5)
    assert pid.exists()
    deadline = time.monotonic() + 30
    while (state := _state(pid.read_text())) not in ("", "Z") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state in ("", "Z")


def _state(pid: str) -> str:
    found = subprocess.run(["ps", "-o", "state=", "-p", pid], capture_output=True, text=True)
    return found.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "step-2b"], "--only takes kernels, step-small, memory-small, growth here, got step-2b"),
        (["--part", "1"], "--part divides a GPU's programs: there is none here; --rehearse runs them on the CPU"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        everything.main(arguments)
    assert message in capsys.readouterr().err
