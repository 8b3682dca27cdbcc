"""`gws run script` beside `python script`: the script sees no difference but the backend."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest

from gws_compile.command_line.cli import main

GWS = [sys.executable, "-m", "gws_compile", "run"]

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(40, 72), nn.Linear(72, 40)

    def forward(self, x):
        return x + self.down(self.up(x).relu())

def train(model, call, steps=3):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        loss = call(torch.randn(8, 40)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "nets.py").write_text(MODEL)
    return tmp_path


def start(command, folder, stdin="", **environment):
    (folder / "elsewhere").mkdir(exist_ok=True)
    variables = {k: v for k, v in os.environ.items() if not k.startswith("GWS_")}
    return subprocess.run(
        command,
        cwd=folder / "elsewhere",
        input=stdin,
        env={**variables, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return str(path)


WHO = """
import atexit, json, multiprocessing, os, sys
here = sys.modules["__main__"]
atexit.register(lambda: print("bye", __name__, here is sys.modules["__main__"]))
print(json.dumps([
    sys.argv, sys.path[:2], __name__, __file__, str(__spec__ and __spec__.name), __package__,
    here.__dict__ is globals(), __builtins__.__name__,
    sorted(k for k in globals() if k not in ("__cached__", "__annotations__")),
    sys.stdin.read(), type(__loader__).__name__,
]))
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("how", ["script", "module"])
def test_the_program_is_main(folder, how):
    """Arguments, paths, `__main__` and its attributes, stdin, exit handlers and the exit code."""
    write(folder, "elsewhere/package/__init__.py", "")
    write(folder, "elsewhere/package/__main__.py", WHO)
    write(folder, "who.py", WHO)
    command = ["../who.py"] if how == "script" else ["-m", "package"]
    command += ["7", "--fmt", "x", "--", "--help"]
    plain = start([sys.executable, *command], folder, "some\ninput")
    ours = start([*GWS, *command], folder, "some\ninput")
    assert plain.returncode == 7
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
    assert ours.stderr == "\ngws run: the script ended with exit code 7, before anything took the gws backend\n"


def test_traceback_and_ctrl_c(folder):
    """Errors come out as Python prints them, chained ones too, without a frame of ours, and so to a hook of the script;

    one line follows. Ctrl-C ends the process by the signal.
    """
    path = write(
        folder,
        "bad.py",
        """
        import sys, traceback, torch
        from torch import nn
        def hook(kind, error, tb):
            print("mine", kind, error.__traceback__ is tb, *traceback.format_exception(error), file=sys.stderr)
        class Loss(nn.Module):
            def forward(self, how):
                try:
                    {}["x"]
                except KeyError as error:
                    raise (KeyboardInterrupt if how == "ctrl-c" else ValueError)("bad") from error
        def f(how):
            try:
                Loss()(how)
            except ValueError:
                torch.compile(model=f, mode="default", options={"max_autotune": True})
        if sys.argv[1] == "hook":
            sys.excepthook = hook
        f(sys.argv[1])
        """,
    )
    for how, code in (("hook", 1), ("error", 1), ("ctrl-c", -signal.SIGINT)):
        plain = start([sys.executable, path, how], folder)
        ours = start([*GWS, "--auto", path, how], folder)
        assert ours.returncode == plain.returncode == code
        interrupted = "KeyboardInterrupt, before anything took the gws backend"
        what = interrupted if how == "ctrl-c" else "RuntimeError; up to then no weight seen"
        assert ours.stderr == f"{plain.stderr}\ngws run: the script ended with {what}\n"


def test_a_syntax_error(folder):
    path = write(folder, "bad.py", "x = 1 +")
    plain, ours = start([sys.executable, path], folder), start([*GWS, path], folder)
    assert ours.returncode == plain.returncode == 1
    line = "\ngws run: the script ended with SyntaxError, before anything took the gws backend\n"
    assert ours.stderr == plain.stderr + line


UNSAMPLED = """
import sys, torch
from torch import nn

@torch.library.custom_op("mine::product", mutates_args=())
def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w

product.register_fake(lambda x, w: x.new_empty(x.shape[0], w.shape[1]))
product.register_autograd(
    lambda ctx, grad: (grad @ ctx.saved_tensors[1].T, ctx.saved_tensors[0].T @ grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(40, 40)

    def forward(self, x):
        return self.rnn(x)[0]

class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(40))

    def forward(self, x):
        return product(x, self.weight)

class Layer(nn.Linear):
    def forward(self, x):
        return (x @ self.weight.T + self.bias).relu()

def main(kind, how):
    model = {"lstm": Recurrent, "custom": Custom, "forward": lambda: Layer(40, 40)}[kind]()
    call = torch.compile(model) if how == "compile" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        (model.forward if kind == "forward" else call)(torch.randn(8, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if kind == "forward":
        call(torch.randn(8, 40))

main(*sys.argv[1:])
"""


@pytest.mark.parametrize("how", ["compile", "auto"])
@pytest.mark.parametrize("kind", ["lstm", "custom", "forward"])
def test_models_that_train_without_noise(kind, how, folder):
    """What is behind the script says so, and why, weight by weight; the model has gone by then."""
    path = write(folder, "train.py", UNSAMPLED)
    options = ["--inner", "aot_eager", "--report", "r.json", *["--auto"][: how == "auto"]]
    done = start([*GWS, *options, path, kind, how], folder)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "elsewhere" / "r.json").read_text())
    reasons = {weight["name"]: weight["reason"] for weight in report["weights"]}
    assert ("1 module compiled by --auto" if how == "auto" else "1 torch.compile call took") in report["header"]
    if kind == "forward":
        told = "2 of 2 optimizer steps (SGD of weight) had no sampled training forward before them"
        assert [text.startswith(told) for text in report["plain_steps"]] == [True]
        assert told in " ".join(done.stderr.split())
        assert reasons == {"weight": ""}
        return
    assert report["plain_steps"] == []
    assert "Every weight that was seen was left alone; the table says why." in done.stderr
    assert list(reasons) == (["rnn.weight_ih_l0", "rnn.weight_hh_l0"] if kind == "lstm" else ["weight"])
    assert all(("does not trace LSTM" if kind == "lstm" else "used by mine::product") in r for r in reasons.values())
    assert f"weights that are trained without noise, {'since' if kind == 'lstm' else 'though'}" in done.stderr


def test_report_settings_and_left_alone(folder):
    """A file below the environment below the command line; the header names what was left alone; stdout is its own."""
    path = write(
        folder,
        "train.py",
        """
        import os, torch
        from nets import Net, train
        model = Net()
        other = torch.compile(Net(), backend="aot_eager")
        os.chdir("..")
        print(train(model, torch.compile(model)), train(other, other))
        """,
    )
    write(folder, "elsewhere/gws.toml", 'fmt = "fp4_e2m1"\nbits = 3.5\nseed = 4\ninner = "eager"')
    done = start(
        [*GWS, "--config", "gws.toml", "--bits", "6", "--include", "up.*", "--report", "r.json", path],
        folder,
        GWS_SEED="5",
        GWS_FMT="fp6_e3m2",
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+\.\d+ \d+\.\d+\n", done.stdout)
    report = json.loads((folder / "elsewhere" / "r.json").read_text())
    assert report["header"] == (
        f"1 torch.compile call took the gws backend: Net at {path}:7; 1 left alone: backend='aot_eager' at {path}:5"
    ).replace(f"Net at {path}", "Net at train.py")  # seen from the folder that the script has changed to
    weights = {w["name"]: (w["fmt"], w["bits"], w["rewritten"]) for w in report["weights"]}
    assert weights == {"up.weight": ("fp6_e3m2", 6.0, True), "down.weight": ("", None, False)}
    assert report["header"] in done.stderr
    assert "GwsWarning: torch.compile of Net at" in done.stderr


@pytest.mark.slow
def test_spawned_processes(folder):
    """DataLoader workers import the script again; training in a spawned or forked process takes the backend too."""
    path = write(
        folder,
        "spawn.py",
        """
        import sys, torch
        import torch.multiprocessing as mp
        from torch.utils.data import DataLoader, TensorDataset
        from nets import Net, train

        def worker(rank):
            model = Net()
            print(train(model, model) > 0, flush=True)

        if __name__ == "__main__":
            for target in (worker, abs):
                process = mp.get_context("fork").Process(target=target, args=(1,))
                process.start()
                process.join()
            data = TensorDataset(torch.arange(4.0))
            loader = DataLoader(data, num_workers=1, multiprocessing_context="spawn")
            print(sum(x.item() for (x,) in loader), flush=True)
            mp.spawn(worker, nprocs=1)
        """,
    )
    done = start([*GWS, "--auto", "--inner", "eager", path], folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n6.0\nTrue\n"
    reports = done.stderr.split("\ngws run: ")[1:]  # the forked process, the spawned one, this one; no other
    assert ["1 module compiled by --auto: Net" in report for report in reports] == [True, True, False]
    assert ["2 of 2 weights rewritten" in report for report in reports] == [True, True, False]
    assert "NO WEIGHT WAS REWRITTEN" in reports[2]


def test_under_torchrun_rank_0_reports(folder):
    path = write(
        folder,
        "ddp.py",
        """
        import torch, torch.distributed as dist
        from nets import Net, train
        dist.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(Net())
        train(model, torch.compile(model))
        dist.barrier()
        dist.destroy_process_group()
        """,
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for _ in range(5):
        done = start([*torchrun, "-m", "gws_compile", "run", "--inner", "eager", path], folder)
        if "terminate called without an active exception" not in done.stderr:  # gloo's end, see docs/torch.md
            break
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("1 torch.compile call took the gws backend: DistributedDataParallel at") == 1
    assert done.stderr.count("2 of 2 weights rewritten") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fmtt", "bf16", "x.py"], "unrecognized arguments: --fmtt (did you mean '--fmt'?)"),
        (["--fmt", "fp99", "x.py"], "error: --fmt fp99: unknown format 'fp99'; accepted: fp4_e2m1"),
        (["--bits", "learned", "--noise", "none", "x.py"], "error: bits=LearnedBits(...) learns from the noise"),
        (["--config", "no.toml", "x.py"], "no.toml"),
        (["--report", "no/where.txt", "x.py"], "--report no/where.txt: there is no such folder"),
        (["nosuch.py"], "error: can't open file"),
        (["-m", "nosuch.module"], "error: No module named 'nosuch'"),
        ([], "the following arguments are required: SCRIPT"),
    ],
)
def test_wrong_command_lines(arguments, message, capsys, monkeypatch):
    """Exit code 2 and one line; here without a process of its own."""
    from gws_compile.command_line import cli
    from gws_compile.command_line.run_session import RunSession

    for name in ("GWS_FMT", "GWS_BITS", "GWS_NOISE", "GWS_CONFIG"):
        monkeypatch.setenv(name, "x")  # so that what the command line puts there is taken away again
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(RunSession, "start", lambda self: None)
    try:
        code = cli.main(["run", *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_help_is_made_from_the_settings(capsys):
    from gws_compile.command_line import cli
    from gws_compile.settings.arguments import SETTINGS

    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"\n  --{setting.option or setting.name}[ ,]", text) for setting in SETTINGS)
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "run an unmodified training script" in " ".join(capsys.readouterr().out.split())


def losses_of(output):
    return [float(line.split()[1]) for line in output.splitlines() if line.startswith("loss ")]


@pytest.mark.slow
def test_what_a_run_is_compared_with(folder):
    """Plain training with the seed given is that of the script with it; with the cast it is the same training."""
    path = write(
        folder,
        "train.py",
        """
        import sys
        sys.path.insert(0, "..")
        import random, numpy, torch
        from nets import Net, train
        model = Net()
        compiled = torch.compile(model, backend=sys.argv[1]) if sys.argv[1:] else torch.compile(model)
        print("loss", train(model, compiled))
        print("drawn", random.random(), numpy.random.rand(), torch.rand(1).item())
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            print("loss", compiled(x).square().mean().item())
        """,
    )
    command = [*GWS, "--random-seed", "5", "--plain", path]
    plain = start(command, folder)
    assert start(command, folder).stdout == plain.stdout
    seeding = "import random, numpy, torch; [seed(5) for seed in (random.seed, numpy.random.seed, torch.manual_seed)]"
    seeded = start([sys.executable, "-c", f"{seeding}; exec(open({path!r}).read())"], folder)
    assert seeded.stdout == plain.stdout
    cast = start([*GWS, "--random-seed", "5", "--cast-afterwards", "--fmt", "int3", path], folder)
    assert "2 of 2 weights rewritten" in cast.stderr
    (trained, evaluated), (same, after) = losses_of(plain.stdout), losses_of(cast.stdout)
    assert trained == same
    assert cast.stdout.splitlines()[1] == plain.stdout.splitlines()[1]
    assert evaluated != after
    refused = start([*GWS, "--plain", path, "gws"], folder)
    assert refused.returncode == 2
    assert (
        "--plain: the script compiles with a gws backend of its own (fp8_e4m3), so this was no plain" in refused.stderr
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plain", "--auto"], "--plain leaves the script alone: --auto has no effect beside it"),
        (["--plain", "--fmt", "int3"], "--plain leaves the script alone: --fmt has no effect beside it"),
        (["--plain", "--cast-afterwards"], "not allowed with argument --plain"),
        (["--random-seed", "-1"], "--random-seed -1: accepted are 0 to 2**32 - 1"),
    ],
)
def test_options_that_contradict(capsys, options, message):
    try:
        code = main(["run", *options, "train.py"])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
