"""A trained model and the state of its backend, from files: what ``gws export`` starts from."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..settings.rules import RuleLike
from ..weight_names import first_match, without_number, without_stage
from .model_factory import BadFactoryError, ExampleCall, build, example_tensor
from .settings_text import read
from .state_file import KEY

_WRAPPING = ("model", "state_dict", "model_state_dict")
"""Keys under which training programs keep a model's state in a checkpoint."""

_READ_ERRORS = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError)


@dataclass(frozen=True)
class TrainedModel:
    """A model that was trained.

    Attributes:
        call: the model, and the arguments of a call.
        tokenizer: that lies beside it; None where there is none.
    """

    call: ExampleCall
    tokenizer: Any = None


def trained_model(model: str, checkpoint: str | None, inputs: list[str]) -> TrainedModel:
    """Load a model.

    Args:
        model: a folder of ``save_pretrained``, or what `build` takes.
        checkpoint: a file with the state of what `build` makes; None for what it makes as it is.
        inputs: see `build`.

    Raises:
        BadFactoryError: there is no such model, or its files cannot be read; the message says what is accepted.
        ValueError: a bad input.
    """
    folder = Path(model)
    if folder.is_dir():
        if checkpoint is not None:
            raise BadFactoryError(f"--checkpoint {checkpoint}: {model} is a folder, which has its own weights")
        return _pretrained(folder, inputs)
    call = build(model, inputs)
    if checkpoint is not None:
        _load(call, Path(checkpoint))
    return TrainedModel(call)


def _pretrained(folder: Path, inputs: list[str]) -> TrainedModel:
    if not (folder / "config.json").is_file():
        raise BadFactoryError(
            f"{folder} has no config.json: accepted are a folder of save_pretrained, or FILE:FUNCTION"
        )
    try:
        import transformers
    except ImportError:
        raise BadFactoryError(f"{folder}: a Hugging Face folder needs transformers: pip install transformers") from None
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise BadFactoryError(f"{folder}: config.json names no class of transformers (architectures: {name!r})")
    if getattr(config, "quantization_config", None) is not None:
        raise BadFactoryError(f"{folder} is quantized already ({config.quantization_config.get('quant_method')})")
    model = kind.from_pretrained(folder, dtype="auto")
    given = [example_tensor(text) for text in inputs]
    args = tuple(value for name, value in given if name is None)
    kwargs = {name: value for name, value in given if name is not None} if given else dict(model.dummy_inputs)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    return TrainedModel(ExampleCall(model, args, kwargs), tokenizer)


def _load(call: ExampleCall, file: Path) -> None:
    if not file.is_file():
        raise BadFactoryError(f"--checkpoint {file}: there is no such file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except _READ_ERRORS as error:
        raise BadFactoryError(f"--checkpoint {file} cannot be read: {_first_line(error)}") from None
    for key in _WRAPPING:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    try:
        call.model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise BadFactoryError(f"--checkpoint {file} is none of this {type(call.model).__name__}: {error}") from None


def backend_state(path: str) -> dict[str, Any]:
    """A state of `Backend.state_dict` from a file: by itself, in a checkpoint under ``"pqt"``, or of ``gws run``.

    Raises:
        BadFactoryError: there is none in it, or several.
    """
    file = Path(path)
    if not file.is_file():
        raise BadFactoryError(f"--state {path}: there is no such file")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except _READ_ERRORS as error:
        raise BadFactoryError(f"--state {path} cannot be read: {_first_line(error)}") from None
    if isinstance(content, dict) and KEY in content:
        states = content[KEY]
        if len(states) != 1:
            raise BadFactoryError(f"--state {path} has the states of {len(states)} backends: which one cannot be told")
        content = states[0]
    elif isinstance(content, dict) and isinstance(content.get("pqt"), dict):
        content = content["pqt"]
    if not isinstance(content, dict) or not {"fmt", "seed", "weights"} <= content.keys():
        raise BadFactoryError(f"--state {path} has no state of Backend.state_dict()")
    return content


def settings_of_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a state tells: format, block, scale, sparsity, rules and seed.

    Raises:
        BadFactoryError: it has learned widths, of whose rule it does not tell.
    """
    if "bits" in state:
        raise BadFactoryError(
            "the state has learned bit widths: give --bits, and --fmt if it was given, as they were in training"
        )
    rules: list[RuleLike] = [rule for text in state.get("rules", []) for rule in read("rules", text)]
    settings: dict[str, Any] = {"fmt": state["fmt"], "seed": state["seed"], "rules": tuple(rules)}
    return settings | _grid(state, rules)


def _grid(state: Mapping[str, Any], rules: list[RuleLike]) -> dict[str, Any]:
    """Block, scale and sparsity of the weights that no rule names: a rule's own stand in its text."""
    named = tuple(glob for globs, _ in rules for glob in ((globs,) if isinstance(globs, str) else globs))
    for name, text in state.get("settings", []):
        if first_match(without_stage(without_number(name)), named) is None:
            _, block, scale, *sparsity = text.split(" ")
            found = {"block": read("block", block), "scale": read("scale", scale)}
            return found | ({"sparsity": read("sparsity", sparsity[0])} if sparsity else {})
    return {}


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
