"""``examples/local_tasks.py``: the questions have one right answer, and the documents are the text."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
local_tasks = importlib.import_module("local_tasks")
text_data = importlib.import_module("text_data")
Amounts = local_tasks.Amounts

SMALL = Amounts(documents=5, document_bytes=90, questions=40, context_bytes=24, continuation_bytes=8)


def text_of(words: int, alphabet: str = "abcdefgh") -> bytes:
    rng = random.Random(1)
    return " ".join("".join(rng.choices(alphabet, k=rng.randrange(2, 9))) for _ in range(words)).encode()


@pytest.mark.parametrize("alphabet", ["abcdefgh", "abé€\U0001f600"])
def test_one_of_four_answers_is_right(alphabet):
    """Looked up in the text itself; of characters of several bytes none is cut."""
    data = text_of(600, alphabet)
    asked = list(local_tasks.questions(data, SMALL, seed=3))
    assert len(asked) == SMALL.questions
    for question in asked:
        context, choices = question["context"], question["choices"]
        assert len(context.encode()) == SMALL.context_bytes
        assert not context[-1].isspace()
        assert len(set(choices)) == len(choices) == 4
        assert {len(choice.encode()) for choice in choices} == {SMALL.continuation_bytes}
        assert all(choice.encode() in data for choice in choices)
        right = [(context + choice).encode() in data for choice in choices]
        assert right == [i == question["gold"] for i in range(4)]
    counts = [sum(question["gold"] == place for question in asked) for place in range(4)]
    assert min(counts) >= 3  # of 40; the right answer's place tells nothing


def test_a_context_that_occurs_twice_has_no_two_right_answers():
    """In a text of two lines, each with its two endings, the other ending of a context is never among the answers."""
    data = b"".join(line + end for line in (b"x" * 24, b"y" * 24) for end in (b"<first!>", b"second##")) * 20
    for question in local_tasks.questions(data, SMALL, seed=0):
        others = [c for i, c in enumerate(question["choices"]) if i != question["gold"]]
        assert not any((question["context"] + other).encode() in data for other in others)


def test_questions_are_those_of_the_seed():
    data = text_of(600)
    first, again, other = (list(local_tasks.questions(data, SMALL, seed)) for seed in (0, 0, 1))
    assert first == again
    assert [q["context"] for q in first] != [q["context"] for q in other]


def test_documents_are_pieces_of_the_text_in_its_order():
    data = text_of(300)
    found = local_tasks.documents(data, SMALL)
    places = [data.index(document.encode()) for document in found]
    assert [len(document) for document in found] == [90] * 5
    pieces = len(data) // 90
    assert places == [90 * (i * pieces // 5) for i in range(5)]
    short = local_tasks.documents(data[:200], SMALL)
    assert short == [data[:90].decode(), data[90:180].decode()]
    assert local_tasks.documents(data[:50], SMALL) == [data[:50].decode()]


def test_characters_that_a_document_cuts_are_left_out():
    data = "€".encode() * 70  # 90 bytes hold 30 of them; 91 bytes cut one
    assert local_tasks.documents(data, SMALL) == ["€" * 30] * 2
    odd = Amounts(documents=2, document_bytes=91)
    assert local_tasks.documents(data, odd) == ["€" * 30, "€" * 29]


def test_what_is_written_is_json_and_names_its_data(tmp_path):
    """Also where the folder is named relative to another one."""
    data = text_of(600)
    local_tasks.write_tasks(torch.frombuffer(bytearray(data), dtype=torch.uint8), tmp_path, SMALL, seed=2)
    for task, expected in (
        ("held_out_bytes", [{"text": d} for d in local_tasks.documents(data, SMALL)]),
        ("continuation", list(local_tasks.questions(data, SMALL, 2))),
    ):
        config = json.loads((tmp_path / f"{task}.yaml").read_text())
        assert config["task"] == task
        path = Path(config["dataset_kwargs"]["data_files"]["test"])
        assert path.is_absolute()
        assert [json.loads(line) for line in path.read_text().splitlines()] == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"too short", "it takes 32 bytes of UTF-8 in a row"),
        (b"\xff" * 500, "none of it is UTF-8"),
        (b" " * 500, "it takes 32 bytes"),
        (b"a" * 500, "no 4 different continuations in 500 bytes"),
    ],
)
def test_a_text_that_does_not_do_is_said(data, message, tmp_path):
    with pytest.raises(text_data.TextError, match=message):
        local_tasks.write_tasks(torch.frombuffer(bytearray(data), dtype=torch.uint8), tmp_path, SMALL)
