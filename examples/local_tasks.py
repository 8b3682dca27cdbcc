"""Two tasks for lm-evaluation-harness, written into a folder from text at hand: nothing is downloaded.

``held_out_bytes`` is the likelihood of whole documents, in bits per byte. ``continuation`` is a choice: a context, and
four texts of which one goes on with it; the others begin elsewhere in the same text. What the harness needs of a task
are a YAML file and its data; the folder is given to it with ``--include_path``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from text_data import TextError

DOCUMENTS, QUESTIONS = "held_out_bytes", "continuation"
TASKS = (DOCUMENTS, QUESTIONS)
CHOICES = 4
_TRIES = 200
"""Places that are looked at for each excerpt that is wanted."""


@dataclass(frozen=True)
class Amounts:
    """How much is asked.

    Attributes:
        documents: at most; fewer where the text is short.
        document_bytes: of each. More than a model's context: the harness then moves a window over it.
        questions: choices to be made.
        context_bytes: of a question.
        continuation_bytes: of each of its four answers.
    """

    documents: int = 64
    document_bytes: int = 2048
    questions: int = 500
    context_bytes: int = 64
    continuation_bytes: int = 16


def write_tasks(held_out: torch.Tensor, folder: Path, amounts: Amounts | None = None, *, seed: int = 0) -> None:
    """Write both tasks.

    Args:
        held_out: uint8, a text that no model was trained on.
        folder: for ``--include_path``; files of an earlier call are replaced.
        amounts: how much is asked.
        seed: of the questions; equal seeds, equal questions.

    Raises:
        TextError: the text is too short, or too little of it is UTF-8.
    """
    amounts = amounts or Amounts()
    data = bytes(held_out.numpy())
    folder.mkdir(parents=True, exist_ok=True)
    _write(
        folder,
        DOCUMENTS,
        [{"text": document} for document in documents(data, amounts)],
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
        },
    )
    _write(
        folder,
        QUESTIONS,
        list(questions(data, amounts, seed)),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": "",  # a space by default
            "metric_list": [{"metric": "acc"}],
        },
    )


def documents(data: bytes, amounts: Amounts) -> list[str]:
    """Pieces of the text, spread evenly, without overlap; bytes that are no UTF-8, as at a cut, are left out."""
    length = min(amounts.document_bytes, len(data))
    pieces = len(data) // max(length, 1)
    count = min(amounts.documents, pieces)
    chosen = [i * pieces // count for i in range(count)]
    found = [data[i * length : (i + 1) * length].decode("utf-8", "ignore") for i in chosen]
    if not any(found):
        raise TextError(f"no document in {len(data):,} bytes of held-out text: none of it is UTF-8")
    return [document for document in found if document]


def questions(data: bytes, amounts: Amounts, seed: int) -> Iterator[dict[str, Any]]:
    """A context, four different continuations in random order, and which of them is the true one.

    None of the others goes on with this context anywhere in the text.

    All four begin behind a character that is no white space. The harness takes white space from the end of a context
    and puts it in front of every answer, and an answer that begins inside an indentation would be told by that.
    """
    rng = random.Random(seed)
    before, behind = amounts.context_bytes, amounts.continuation_bytes

    def excerpt() -> tuple[str, str]:
        for _ in range(_TRIES if len(data) >= before + behind else 0):
            place = rng.randrange(before, len(data) - behind + 1)
            try:
                context = data[place - before : place].decode()
                continuation = data[place : place + behind].decode()
            except UnicodeDecodeError:  # cut inside a character
                continue
            if not context[-1].isspace():
                return context, continuation
        raise TextError(
            f"no question in {len(data):,} bytes of held-out text: it takes {before + behind} bytes of UTF-8 in a row"
        )

    for _ in range(amounts.questions):
        context, true = excerpt()
        choices = {true: None}
        for _ in range(_TRIES):
            other = excerpt()[1]
            if (context + other).encode() not in data:  # or it would be right as well
                choices[other] = None
            if len(choices) == CHOICES:
                break
        else:
            raise TextError(f"no {CHOICES} different continuations in {len(data):,} bytes of held-out text")
        shuffled = rng.sample(list(choices), CHOICES)
        yield {"context": context, "choices": shuffled, "gold": shuffled.index(true)}


def _write(folder: Path, task: str, rows: list[dict[str, Any]], how: dict[str, Any]) -> None:
    data = folder.resolve() / f"{task}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder.resolve() / "cache")},
        "test_split": "test",
        **how,
        "metadata": {"version": 1.0},
    }
    (folder / f"{task}.yaml").write_text(json.dumps(config, indent=1) + "\n")  # JSON is YAML too
