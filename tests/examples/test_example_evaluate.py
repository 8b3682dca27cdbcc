"""``examples/evaluate.py``: what the harness reports is what the weights say, and nothing is asked of a network."""

import copy
import importlib
import json
import math
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import gws_compile

for package in ("lm_eval", "compressed_tensors", "matplotlib", "tqdm", "transformers"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
evaluate = importlib.import_module("evaluate")
harness = importlib.import_module("harness")
local_tasks = importlib.import_module("local_tasks")

SEQ = 32
SHAPE = replace(evaluate.SHAPE, layers=1, width=64, heads=2, seq=SEQ, batch=2)
# Documents of three windows and a bit, questions of a whole window.
AMOUNTS = local_tasks.Amounts(documents=3, document_bytes=103, questions=6, context_bytes=25, continuation_bytes=8)
TEXT = "".join(f"{n:x} of {n * n} are {n**3:o};\n" for n in range(90))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    torch.compiler.reset()
    torch.manual_seed(0)
    monkeypatch.setattr(evaluate, "SHAPE", SHAPE)
    monkeypatch.setattr(
        evaluate,
        "write_tasks",
        lambda held_out, folder, **how: local_tasks.write_tasks(held_out, folder, AMOUNTS, **how),
    )


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    asked = []

    def refuse(host, *args, **kwargs):
        asked.append(host)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert asked == []


@pytest.fixture
def model():
    model = evaluate.build_model("llama", SHAPE, SEQ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)  # logits far from uniform
    return model


@pytest.fixture
def tasks(tmp_path):
    held_out = torch.frombuffer(bytearray(TEXT.encode()), dtype=torch.uint8)
    local_tasks.write_tasks(held_out, tmp_path / "tasks", AMOUNTS)
    return tmp_path / "tasks"


def rows(tasks, name):
    return [json.loads(line) for line in (tasks / f"{name}.jsonl").read_text().splitlines()]


@torch.no_grad()
def log_probabilities(model, tokens):
    """(n, 256) in float64: of what comes behind each of n bytes."""
    return torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)


def of_document(model, text):
    """Window by window: each predicts the bytes that none has before; the first byte stands behind byte 0."""
    line, total, predicted = [0, *text.encode()], 0.0, 0
    while predicted < len(line) - 1:
        end = min(predicted + SEQ, len(line) - 1)
        start = max(0, end - SEQ)  # the last window reaches back, to be as long as the others
        found = log_probabilities(model, line[start:end])
        total += sum(found[place - start, line[place + 1]].item() for place in range(predicted, end))
        predicted = end
    return total


def of_choice(model, context, choice):
    line, length = list((context + choice).encode()), len(choice.encode())
    found = log_probabilities(model, line[:-1])
    return sum(found[i - 1, line[i]].item() for i in range(len(line) - length, len(line)))


@pytest.mark.parametrize("fmt", [None, "mxfp4", "int4_group"])
def test_loglikelihoods_are_the_sums_that_the_cast_weights_give(fmt, model, tasks):
    eager, given = copy.deepcopy(model), model
    if fmt is not None:
        given = torch.compile(model, backend=gws_compile.backend(fmt, inner="eager"), dynamic=True)
        with torch.no_grad():
            for name, module in eager.named_modules():
                if isinstance(module, torch.nn.Linear) and name != "lm_head":
                    module.weight.copy_(gws_compile.quantize(module.weight, fmt))
    found = harness.scores(given, evaluate.byte_tokenizer(), tasks)

    documents = [row["text"] for row in rows(tasks, "held_out_bytes")]
    questions = rows(tasks, "continuation")
    of_documents = [of_document(eager, document) for document in documents]
    of_choices = [[of_choice(eager, q["context"], choice) for choice in q["choices"]] for q in questions]
    expected = [*of_documents, *(one for four in of_choices for one in four)]
    assert found.loglikelihoods == pytest.approx(expected, rel=2e-6)

    bits = -sum(of_documents) / math.log(2) / sum(len(document.encode()) for document in documents)
    right = [four.index(max(four)) == q["gold"] for four, q in zip(of_choices, questions, strict=True)]
    share = sum(right) / len(right)
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-6)
    assert found.byte_perplexity == pytest.approx(2**bits, rel=1e-6)
    assert found.accuracy == share
    assert found.accuracy_stderr == pytest.approx(math.sqrt(share * (1 - share) / (len(right) - 1)))


def test_every_byte_is_counted_once(model, tasks):
    """A model to which all bytes are alike needs 8 bits for each, whatever the windows."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = harness.scores(model, evaluate.byte_tokenizer(), tasks)
    assert found.bits_per_byte == pytest.approx(8, rel=1e-6)
    assert found.loglikelihoods[:3] == pytest.approx([-AMOUNTS.document_bytes * math.log(256)] * 3, rel=1e-6)


@pytest.mark.parametrize(
    ("fmt", "form"),
    [
        ("mxfp4", None),
        ("int4_group", None),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("mxfp8", None), ("fp8_channel", None))),
        pytest.param("fp8_e5m2", "dense", marks=pytest.mark.slow),
    ],
)
def test_the_exported_model_is_the_compiled_one_bit_for_bit(fmt, form, model, tasks, tmp_path):
    """In float32, with the graph run by eager torch; and it is not the model without a cast."""
    folder, tokenizer = tmp_path / "exported", evaluate.byte_tokenizer()
    evaluate.export(model, gws_compile.backend(fmt), folder, form)
    compiled = torch.compile(model, backend=gws_compile.backend(fmt, inner="eager"), dynamic=True)
    exported = harness.load_folder(folder, torch.float32)
    found = evaluate.Agreement.between(
        harness.scores(compiled, tokenizer, tasks), harness.scores(exported, tokenizer, tasks)
    )
    assert found == evaluate.Agreement(3 + 4 * 6, 3 + 4 * 6, 0.0, 0.0)
    assert str(found) == "compiled and exported: 27 of 27 loglikelihoods are equal bit for bit"
    plain = harness.scores(model, tokenizer, tasks)
    assert evaluate.Agreement.between(plain, harness.scores(exported, tokenizer, tasks)).equal == 0


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_the_harness_loads_a_folder_by_itself(model, tasks, tmp_path):
    """Named by its path, in bfloat16, as its own command line does: bit for bit what we load."""
    from lm_eval.models.huggingface import HFLM

    evaluate.export(model, gws_compile.backend("mxfp4"), tmp_path / "exported", None)
    ours = harness.scores(
        harness.load_folder(tmp_path / "exported", torch.bfloat16), evaluate.byte_tokenizer(), tasks
    ).loglikelihoods
    theirs = HFLM(pretrained=str(tmp_path / "exported"), dtype="bfloat16", device="cpu", batch_size=32)
    documents = [row["text"] for row in rows(tasks, "held_out_bytes")]
    assert theirs.loglikelihood_rolling([Asked((text,)) for text in documents]) == list(ours[:3])


@dataclass
class Asked:
    """A request, as far as a model of the harness looks at it."""

    args: tuple


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "arc_easy"], "--tasks goes with --model FOLDER"),
        (["--model", "nowhere"], "no Hugging Face model in nowhere: there is no config.json"),
        (["--trained", "here", "there"], "no Hugging Face model in here"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--fmt", "fp99"], "fp99"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse(options)
    assert message in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_is_said(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse(["--model", str(tmp_path), "--out", str(tmp_path / "out")])
    assert f"no tokenizer in {tmp_path}: export the model with tokenizer=" in capsys.readouterr().err


@pytest.mark.slow
def test_from_training_to_the_table(tmp_path, capsys):
    """Twice, the second time from the trained folders: the same figures; and once for an exported folder alone."""
    out = tmp_path / "out"
    (tmp_path / "text").write_text(TEXT * 4)
    common = ["--inner=eager", f"--data={tmp_path / 'text'}", f"--out={out}", "--fmt=mxfp4"]

    evaluate.main([*common, "--steps=3", "--dtype=float32"])
    printed = capsys.readouterr().out
    first = json.loads((out / "evaluate.json").read_text())
    names = ["plain", "plain, cast afterwards", "PQT, compiled", "PQT, exported"]
    assert list(first["models"]) == names
    for name, one in first["models"].items():
        assert 5 < one["bits_per_byte"] < 9
        line = next(line for line in printed.splitlines() if line.startswith(f"{name}  "))
        assert line.split()[-5:] == [
            f"{one['bits_per_byte']:.4f}",
            f"{one['byte_perplexity']:.4f}",
            f"{one['accuracy']:.3f}",
            "±",
            f"{one['accuracy_stderr']:.3f}",
        ]
    assert first["models"]["PQT, compiled"] == first["models"]["PQT, exported"]
    assert len({one["bits_per_byte"] for one in first["models"].values()}) == 3
    assert first["agreement"] == {"loglikelihoods": 27, "equal": 27, "largest_difference": 0, "largest_share": 0}

    evaluate.main([*common, "--trained", str(out / "trained" / "plain"), str(out / "trained" / "pqt")])
    again = json.loads((out / "evaluate.json").read_text())
    assert again["models"] == first["models"]

    exported = out / "exported" / "pqt"
    evaluate.main([*common, "--model", str(exported), "--tasks", "held_out_bytes"])
    alone = json.loads((out / "model.json").read_text())
    assert list(alone["results"]) == ["held_out_bytes"]
    expected = first["models"]["PQT, exported"]["bits_per_byte"]
    assert alone["results"]["held_out_bytes"]["bits_per_byte,none"] == expected
    assert "|held_out_bytes|" in capsys.readouterr().out
