"""The distributed example: killed and continued runs repeat the losses of one that was never stopped."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

for package in ("tqdm", "transformers"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
train_distributed = importlib.import_module("train_distributed")
text_data = importlib.import_module("text_data")

STEPS, BATCH, SEQ = 16, 4, 16
# A low rate: a weight that differs in its last bit may be cast to another value of its format, and training at full
# rate would amplify that.
OPTIONS = [
    f"--steps={STEPS}",
    f"--batch={BATCH}",
    f"--seq={SEQ}",
    "--lr=1e-4",
    "--size=tiny",
    "--model=llama",
    "--device=cpu",
    f"--data={__file__}",
    "--inner=eager",
]


def process_tree(pid: int) -> list[int]:
    """A process and its descendants; torchrun's workers are in sessions, so in process groups, of their own."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    tree = [pid]
    for parent in tree:
        tree += [child for child, p in parents.items() if p == parent]
    return tree


def kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        for pid in process_tree(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def train(out: Path, *options: str, until: Path | None = None) -> tuple[list[float], str]:
    """Losses and messages of a run on two ranks, which is killed as soon as the file ``until`` exists."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(EXAMPLES / "train_distributed.py"), *OPTIONS, f"--out={out}", *options]
    log = out.with_suffix(".log")
    deadline = time.monotonic() + 300
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            while process.poll() is None and not (until and until.exists()):
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.005)
        finally:
            kill(process)
    printed = log.read_text()
    assert process.returncode == (-signal.SIGKILL if until else 0), printed
    lines = [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines], printed


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds torchrun's workers in /proc")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that is never stopped."""
    losses, _ = train(tmp_path_factory.mktemp("whole") / "whole.jsonl")
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.slow
@needs_proc
def test_a_killed_and_continued_run_repeats_the_losses(tmp_path: Path, expected: list[float]) -> None:
    checkpoints = tmp_path / "ddp"
    keep = [f"--checkpoint={checkpoints}", "--save-every=3"]
    before, _ = train(tmp_path / "ddp.jsonl", *keep, until=checkpoints / "step_00000003" / ".metadata")
    assert 3 <= len(before) < STEPS
    assert before == expected[: len(before)]
    after, printed = train(tmp_path / "ddp.jsonl", *keep, "--resume")
    assert f"continuing from {checkpoints / 'step_'}" in printed
    assert after == expected
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000015", "step_00000016"]


@pytest.mark.slow
@needs_proc
def test_fsdp_continues_from_the_last_whole_checkpoint(tmp_path: Path, expected: list[float]) -> None:
    checkpoints = tmp_path / "fsdp"
    keep = ["--engine=fsdp", f"--checkpoint={checkpoints}", "--save-every=10"]
    whole, _ = train(tmp_path / "fsdp.jsonl", *keep, "--resume")
    # The same model under the same noise: only sums over the ranks are rounded in another order.
    assert whole == pytest.approx(expected, rel=1e-5)
    # As if killed while the last checkpoint was being written.
    (checkpoints / "step_00000016" / ".metadata").unlink()
    (checkpoints / "step_00000016" / "__0_0.distcp").write_bytes(b"half a file")
    with (tmp_path / "fsdp.jsonl").open("a") as file:
        file.write('{"step": 1')
    after, printed = train(tmp_path / "fsdp.jsonl", *keep, "--resume")
    assert f"continuing from {checkpoints / 'step_00000010'}" in printed
    assert after == whole


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch):
    """A process group of this process alone."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    torch.compiler.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.usefixtures("one_rank")
def test_both_engines_sample_the_same_weights(model: str, tmp_path: Path) -> None:
    sampled, losses = [], []
    for engine in train_distributed.ENGINES:
        settings, text, pqt, same = train_distributed.parse(
            [*OPTIONS, f"--model={model}", f"--engine={engine}", f"--out={tmp_path / 'x'}"]
        )
        training = train_distributed.Training(settings, pqt, same)
        tokens = text.batch_of_step(0, BATCH, SEQ, seed=0)
        losses.append([training.step(tokens) for _ in range(2)])
        sampled.append(sorted(map(str, pqt.state_dict()["weights"])))
    assert sampled[0] == sampled[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_batches_depend_on_seed_and_step_alone() -> None:
    text = text_data.load_text(Path(__file__), batch=BATCH, seq=SEQ)

    def batch(step: int, seed: int) -> torch.Tensor:
        return text.batch_of_step(step, BATCH, SEQ, seed=seed)

    assert torch.equal(batch(3, 7), batch(3, 7))
    batches = [batch(step, seed) for step in range(3) for seed in range(3)]
    assert len({tuple(b.flatten().tolist()) for b in batches}) == 9
    content = Path(__file__).read_bytes()
    assert all(bytes(row.tolist()) in content for row in batch(5, 5))


def test_the_file_of_losses_loses_what_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "losses"
    for first, last in ((2, 5), (4, 6)):  # continued at step 2 into a new file, then at step 4
        log = train_distributed.LossLog(path, first)
        for step in range(first, last):
            log.write(step, last / 3)
        with path.open("a") as file:
            file.write('{"step"')
    *lines, half = path.read_text().splitlines()
    assert half == '{"step"'
    values = [json.loads(line) for line in lines]
    assert values == [{"step": step, "loss": loss} for step, loss in ((2, 5 / 3), (3, 5 / 3), (4, 2.0), (5, 2.0))]
    train_distributed.LossLog(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch=3"], "--batch 3 does not divide among 2 ranks"),
        (["--steps=0"], "--steps must be at least 1, got 0"),
        (["--resume"], "--resume needs --checkpoint"),
        (["--save-every=5"], "--save-every needs --checkpoint"),
        (["--save-every=0", "--checkpoint=new"], "--save-every must be at least 1, got 0"),
        (["--checkpoint=old"], "old holds checkpoints: continue with --resume, or name another folder"),
        (["--checkpoint=file", "--resume"], "File exists: 'file'"),
        (["--engine=zero"], "argument --engine: invalid choice: 'zero'"),
        (["--fmt=fp7"], "unknown format 'fp7'; accepted: "),
        (["--device=cuda"], "rank 99 has no device: torch sees "),
        (["--data=no/such/path"], "no such file or folder: no/such/path"),
    ],
)
def test_mistakes_end_with_one_message(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": 0, "LOCAL_RANK": 99, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    Path("file").touch()
    Path("old/step_00000004").mkdir(parents=True)
    Path("old/step_00000004/.metadata").touch()
    with pytest.raises(SystemExit) as caught:
        train_distributed.main([*OPTIONS, *options])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last
    assert message in last


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        train_distributed.main([])
    assert "start it with torchrun: torchrun --nproc-per-node 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"), [("--seed=1", "seed = 0, this run has 1"), ("--fmt=e3m2", "fmt = e4m3")]
)
@pytest.mark.usefixtures("one_rank")
def test_a_checkpoint_of_other_settings(
    option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*OPTIONS, f"--out={tmp_path / 'x'}"]
    same = train_distributed.parse(options)[-1]
    other = train_distributed.parse([*options, option])[-1]
    saved = train_distributed.Progress(same).state_dict()
    train_distributed.Progress(dict(same)).load_state_dict(saved)
    with pytest.raises(SystemExit):
        train_distributed.Progress(other).load_state_dict(saved)
    assert f"the checkpoint was made with {message}" in capsys.readouterr().err
