import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gws_compile

for package in ("matplotlib", "tqdm", "transformers"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
train_gpt = importlib.import_module("train_gpt")
small_models = importlib.import_module("small_models")
text_data = importlib.import_module("text_data")

STEPS, BATCH, SEQ = 7, 2, 16


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    # One layer; and every run of the example compiles the same forward, which counts towards one limit.
    torch.compiler.reset()
    shape = replace(small_models.SIZES["tiny"], layers=1, width=64, heads=2)
    monkeypatch.setitem(small_models.SIZES, "tiny", shape)


def run(out: Path, *options: str) -> dict:
    train_gpt.main(
        [
            f"--steps={STEPS}",
            f"--batch={BATCH}",
            f"--seq={SEQ}",
            "--size=tiny",
            "--device=cpu",
            "--dtype=float32",
            f"--out={out}",
            *options,
        ]
    )
    return json.loads((out / "train_gpt.json").read_text())


def test_figures_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, "--inner=eager", "--fmt", "fp8_e4m3", "e3m2")

    assert result["settings"]["steps"] == STEPS
    assert result["versions"]["torch"] == torch.__version__
    assert result["text"]["train_bytes"] > 9 * 10**5
    plain, fp8, fp6 = result["runs"]
    assert (plain["name"], fp8["name"], fp6["name"]) == ("plain", "fp8_e4m3", "fp6_e3m2")
    for r in result["runs"]:
        assert len(r["train_losses"]) == len(r["step_seconds"]) == STEPS
        assert all(map(math.isfinite, r["train_losses"]))
        assert [step for step, _ in r["held_out_losses"]] == [0, 1, 2, 4, 5, 6, 7]
        assert r["final_held_out_loss"] == r["held_out_losses"][-1][1]
        # From ln 256 = 5.5 down to something learned.
        assert 5.2 < r["train_losses"][0] < 6
        assert r["final_train_loss"] == r["train_losses"][-1] < 5
        # Noise and cast move a weight by a few percent of its block's maximum.
        assert abs(r["train_losses"][0] - plain["train_losses"][0]) < 0.05
    assert plain["backend"] is plain["plain_cast_afterwards_held_out_loss"] is None
    for r, bits in ((fp8, 5), (fp6, 4)):
        assert (r["backend"]["weights"], r["backend"]["rewritten"]) == (6, 4)
        assert r["backend"]["left_alone"].keys() == {"transformer.wte.weight", "transformer.wpe.weight"}
        assert (r["backend"]["bits"], r["backend"]["noise"]) == (bits, "rounded_normal")
        assert r["overhead"] == plain["tokens_per_second"] / r["tokens_per_second"] - 1

    picture = tmp_path / "train_gpt.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 30_000
    printed = capsys.readouterr().out
    assert "fp6_e3m2: 4 of 6 weights rewritten (noise rounded_normal, b = 4)" in printed
    assert f"{fp8['final_held_out_loss']:.4f}" in printed
    assert f"{fp6['plain_cast_afterwards_held_out_loss']:.4f}" in printed
    assert "fp6_e3m2: all weights dense (a Conv1D's weight, stored transposed: engines take it dense)" in printed
    assert (tmp_path / "exported" / "fp6_e3m2" / "config.json").is_file()


@pytest.mark.slow
def test_the_models_are_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # over what the run before has left
        run(tmp_path, "--inner=eager", "--model=llama", "--fmt", "mxfp8", "--learned=weight")
        printed = capsys.readouterr().out
    assert "mxfp8: 7 weights packed" in printed
    assert f"LlamaForCausalLM.from_pretrained('{tmp_path / 'exported' / 'mxfp8'}', quantization_config=Comp" in printed
    assert (tmp_path / "exported" / "learned_per_weight" / "model.safetensors").is_file()
    state = gws_compile.load_export(tmp_path / "exported" / "mxfp8")
    assert state["model.layers.0.mlp.up_proj.weight"].shape == (160, 64)


@pytest.mark.parametrize(("model", "rewritten"), [("gpt2", 4), pytest.param("llama", 7, marks=pytest.mark.slow)])
def test_a_format_that_changes_nothing_trains_exactly_alike(tmp_path: Path, model: str, rewritten: int) -> None:
    # Under autocast the products read the weights in bfloat16 anyway, so these casts are the identity: any difference
    # in start, data, schedule or evaluation between the runs would show.
    options = ("--inner=aot_eager", f"--model={model}", "--noise=none", "--dtype=bfloat16", "--fmt", "bf16", "e8m23")
    result = run(tmp_path, *options)
    assert result["settings"]["dtype"] == "bfloat16"
    plain, *others = result["runs"]
    for r in others:
        assert r["backend"]["rewritten"] == rewritten
        assert r["train_losses"] == plain["train_losses"]
        assert r["held_out_losses"] == plain["held_out_losses"]
        assert r["plain_cast_afterwards_held_out_loss"] == plain["final_held_out_loss"]


def test_the_held_out_loss_is_that_of_the_cast_weights(tmp_path: Path) -> None:
    result = run(tmp_path, "--inner=eager", "--fmt=fp4_e2m1", "--seed=3")

    torch.manual_seed(3)
    model = small_models.build_model("gpt2", small_models.SIZES["tiny"], SEQ)
    batches = text_data.load_text(None, batch=BATCH, seq=SEQ).held_out_batches(
        BATCH, SEQ, limit=train_gpt.HELD_OUT_BATCHES
    )

    def loss() -> float:
        with torch.no_grad():
            losses = [model(input_ids=tokens, labels=tokens).loss.item() for tokens in batches]
        return sum(losses) / len(losses)

    plain, fp4 = result["runs"]
    assert plain["held_out_losses"][0][1] == loss()
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and ".h." in name:
            weight.data = gws_compile.quantize(weight, "fp4_e2m1")
    assert fp4["held_out_losses"][0][1] == loss() != plain["held_out_losses"][0][1]


def test_weights_are_cast_inside_the_block_only() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.Linear(50, 40))
    backend = gws_compile.backend("fp4_e2m1", inner="eager", exclude="1.*")
    torch.compile(model, backend=backend)(torch.zeros(1, 40))
    before = [p.detach().clone() for p in model.parameters()]
    expected = [gws_compile.quantize(before[0], "fp4_e2m1"), *before[1:]]

    with train_gpt.cast_weights(model, backend):
        assert all(map(torch.equal, model.parameters(), expected))
    assert all(map(torch.equal, model.parameters(), before))
    assert not torch.equal(before[0], expected[0])


def test_speed_leaves_out_the_first_steps() -> None:
    settings = type("Settings", (), {"batch": 2, "seq": 8})()
    r = train_gpt.Run.__new__(train_gpt.Run)
    r.settings, r.step_seconds = settings, [90.0] * train_gpt.WARM_UP_STEPS + [0.5, 2.0, 1.0]
    assert r.tokens_per_second == 16
    r.step_seconds = [90.0, 4.0]
    assert r.tokens_per_second == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fmt", "fp8_e4m3", "fp7"], "unknown format 'fp7'; accepted: "),
        (["--data", "no/such/path"], "no such file or folder: no/such/path"),
        (["--data", "short.txt"], "too little text in short.txt: 300 bytes; with batch 2 and seq 16 at least 320"),
        (["--data", "locked.txt"], "Permission denied: 'locked.txt'"),
        (["--bits", "1"], "bits must be a number from 2 to 24, got 1.0"),
        (["--noise", "normal"], "noise must be one of 'rounded_normal', 'uniform', 'none', got 'normal'"),
        (["--backward", "keep"], "backward must be one of 'save', 'recompute', got 'keep'"),
        (["--inner", "triton"], "inner must be one of 'inductor', 'aot_eager', 'eager'"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--seq", "1"], "--seq must be at least 2, got 1"),
        (["--lr", "nan"], "--lr must be a positive number, got nan"),
        (["--seed", "-1"], "seed must be an int in 0 .. 2**64 - 1, got -1"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "--device cuda:99: torch sees "),
        (["--out", "short.txt"], "File exists: 'short.txt'"),
    ],
)
def test_mistakes_end_with_one_message_before_anything_is_built(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("x" * 300)
    Path("locked.txt").write_text("x" * 3000)
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        # Permissions do not stop a superuser, which tests may run as.
        if path.name == "locked.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(train_gpt, "build_model", None)
    with pytest.raises(SystemExit) as caught:
        train_gpt.main(["--batch=2", "--seq=16", "--device=cpu", *options])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert ": error: " in last
    assert message in last


class TestText:
    def test_folder(self, tmp_path: Path) -> None:
        parts = {"a.txt": b"a" * 400, "sub/b.md": b"b" * 300, "c.py": b"c" * 300}
        for name, content in {**parts, ".git/x": b"x" * 99, ".y": b"y" * 99, "z.bin": b"z\0z" * 33}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        text = text_data.load_text(tmp_path, batch=2, seq=16)
        whole = bytes(torch.cat([text.train, text.held_out]).tolist())
        assert sorted(whole) == sorted(b"".join(parts.values()))
        assert len(text.held_out) == 100
        again = text_data.load_text(tmp_path, batch=2, seq=16)
        assert torch.equal(again.train, text.train)

    def test_held_out_batches_are_rows_of_the_last_tenth(self, tmp_path: Path) -> None:
        file = tmp_path / "text"
        file.write_bytes(bytes(range(1, 251)) * 10)
        text = text_data.load_text(file, batch=4, seq=10)
        assert torch.equal(text.held_out, torch.arange(1, 251, dtype=torch.uint8))
        batches = text.held_out_batches(4, 10, limit=3)
        assert [b.shape for b in batches] == [(4, 10)] * 3
        rows = torch.cat(batches)
        assert len(rows[:, 0].unique()) == 12
        assert (rows[0, 0], rows[-1, -1]) == (1, 250)
        assert torch.equal(rows - rows[:, :1], torch.arange(10).expand(12, 10))
        assert len(text.held_out_batches(4, 10, limit=99)) == 6

    def test_batches_are_pieces_of_the_training_part(self, tmp_path: Path) -> None:
        file = tmp_path / "text"
        file.write_bytes(bytes(range(100)))
        text = text_data.load_text(file, batch=1, seq=5)
        starts = []
        for _, tokens in zip(range(200), text.batches(3, 5, seed=1), strict=False):
            assert torch.equal(tokens - tokens[:, :1], torch.arange(5).expand(3, 5))
            starts += tokens[:, 0].tolist()
        assert set(starts) == set(range(86))
        assert next(text.batches(3, 5, seed=1))[:, 0].tolist() == starts[:3]


def test_learning_rate_warms_up_and_decays() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = train_gpt.learning_rate_schedule(optimizer, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.1)
    assert rates[99] == pytest.approx(0.2, abs=0.001)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.slow
def test_defaults_cost_less_than_two_percent_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    train_gpt.main(["--size=tiny", "--device=cpu", f"--out={tmp_path}"])
    plain, fp8 = json.loads((tmp_path / "train_gpt.json").read_text())["runs"]
    assert plain["final_held_out_loss"] < 2.2
    assert fp8["final_held_out_loss"] / plain["final_held_out_loss"] == pytest.approx(1, abs=0.02)
