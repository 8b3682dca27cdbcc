"""lm-evaluation-harness on models in memory and on exported folders.

Its own ``HFLM`` does the work: it takes a model as an object, a compiled one too, and calls it under ``no_grad``, where
a gws_compile backend casts the weights and adds no noise.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from local_tasks import DOCUMENTS, QUESTIONS, TASKS

BATCH = 32


@dataclass(frozen=True)
class Scores:
    """What the harness says of a model on the tasks of `local_tasks`.

    Attributes:
        bits_per_byte: over all documents.
        byte_perplexity: 2 to the power of that.
        accuracy: share of the questions that are answered with the true continuation.
        accuracy_stderr: standard error of that share.
        loglikelihoods: in nats, of each document, then of each choice of each question.
    """

    bits_per_byte: float
    byte_perplexity: float
    accuracy: float
    accuracy_stderr: float
    loglikelihoods: tuple[float, ...]


class _Quiet(HFLM):
    """Without a progress bar for each batch of windows."""

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)


def load_folder(folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A causal model from a Hugging Face folder, its packed weights decoded into the dtype.

    Without ``dequantize`` weights in MX formats and NVFP4 come in bfloat16 whatever is asked for, and a model in
    float32 then fails in its first product.
    """
    packed = "quantization_config" in json.loads((folder / "config.json").read_text())
    how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if packed else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)  # it is merged, as is meant
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).eval()


def results_of(model: torch.nn.Module, tokenizer: Any, tasks: Sequence[str], include: Path | None) -> dict[str, Any]:
    """The harness's own results of any of its tasks.

    Args:
        model: a causal Hugging Face model, compiled or not.
        tokenizer: of this model.
        tasks: their names; those that lie in no folder of ours may be downloaded.
        include: a folder with more tasks.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # that the model is an object, which is meant
    ours = set(tasks) <= set(TASKS)
    if ours:  # even a local file is counted, by a request to a server
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    # The index of all tasks takes some seconds, which our own need not wait for.
    manager = TaskManager(include_path=include, include_defaults=not ours)
    lm = _Quiet(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    return lm_eval.simple_evaluate(lm, tasks=list(tasks), task_manager=manager)


def scores(model: torch.nn.Module, tokenizer: Any, include: Path) -> Scores:
    """Both tasks that `local_tasks.write_tasks` has written into a folder."""
    found = results_of(model, tokenizer, TASKS, include)
    documents, questions = found["results"][DOCUMENTS], found["results"][QUESTIONS]
    return Scores(
        documents["bits_per_byte,none"],
        documents["byte_perplexity,none"],
        questions["acc,none"],
        questions["acc_stderr,none"],
        (
            *(one["filtered_resps"][0] for one in found["samples"][DOCUMENTS]),
            *(choice[0] for one in found["samples"][QUESTIONS] for choice in one["filtered_resps"]),
        ),
    )
