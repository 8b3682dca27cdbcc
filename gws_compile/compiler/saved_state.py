"""A state of `Backend.state_dict`, read and checked as a whole before any of it is taken over."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeGuard

import torch
from torch import nn

from ..config import Config
from ..numerics.blocks import Block, matrix_shape
from ..numerics.widths import parameter_shape
from ..settings.learned_bits import LearnedBits
from ..settings.weight_settings import WeightSettings
from ..torch_internals.modes import plain_tensors
from ..weight_names import without_number, without_stage

DRAWS = 2**32
"""How many draws there are: a draw's number enters the noise as 32 bits, so the one behind the last is draw 0 again."""

_SHOWN = 120
"""Characters of a bad value that a message shows."""


@dataclass(frozen=True, eq=False)
class SavedWidths:
    """Learned widths of a state; the tensors are copies.

    Attributes:
        bits: float32, the width parameters by the weights' names.
        frozen: the widths are fixed.
        steering: see `AverageConstraint.state_dict`; None for a backend without `LearnedBits.average`.
    """

    bits: dict[str, torch.Tensor]
    frozen: bool
    steering: dict[str, torch.Tensor] | None


@dataclass(frozen=True, eq=False)
class SavedState:
    """What a backend takes over from a state.

    Attributes:
        step: number of the next forward's draw, 0 to `DRAWS` - 1.
        shapes: the whole shapes of the sampled weights by their unique names.
        widths: None for a backend whose widths are fixed.
        updates: how many optimizer steps ran compiled.
        levels: float32, the levels by the weights' names; copies.
    """

    step: int
    shapes: dict[str, tuple[int, ...]]
    widths: SavedWidths | None
    levels: dict[str, torch.Tensor]
    updates: int

    @classmethod
    def read(cls, raw: object, config: Config) -> SavedState:
        """Read a state for a backend of these settings. Nothing is changed; keys that the backend has no use for stay.

        An int may also be a 0-d tensor or an integer of numpy, which checkpoints make of it.

        Raises:
            ValueError: it is no state, or not one of this seed, format and these rules, or a value in it is of the
                wrong kind, out of range, not finite, or of a shape that no such weight has. The message names key and
                value, and what is accepted.
        """
        if not isinstance(raw, Mapping):
            raise ValueError(f"not a state of gws_compile: it must be a mapping of its keys, got {_shown(raw)}")
        learned = config.learned
        required = {"seed", "fmt", "step", "weights"}
        if learned is not None:
            required |= {"bits", "frozen"} if learned.average is None else {"bits", "frozen", "steering"}
        if config.tables:
            required |= {"levels"}
        if missing := required - raw.keys():
            has = sorted(map(str, raw))
            raise ValueError(f"not a state of gws_compile: {', '.join(sorted(missing))} missing, got {has}")
        _check_origin("seed", raw["seed"], _integer(raw["seed"]), config.seed)
        _check_origin("fmt", raw["fmt"], raw["fmt"] if isinstance(raw["fmt"], str) else None, config.weights.spec)
        step = _integer(raw["step"])
        if step is None or not 0 <= step < DRAWS:
            raise _refusal("step", "an int in 0 .. 2**32 - 1", raw["step"])
        shapes = _shapes(raw["weights"])
        _check_rules(raw, config)
        _check_operands(raw, config)
        _check_master(raw, config)
        updates = _updates(raw)
        of_weights = {name: _settings_of(name, config) for name in shapes}
        levels = _levels(raw, of_weights) if config.tables else {}
        if learned is None:
            return cls(step, shapes, None, levels, updates)
        blocks = {
            name: settings.block
            for name, settings in of_weights.items()
            if settings is not None and settings.learned is not None
        }
        return cls(
            step, shapes, _widths(raw, {name: shapes[name] for name in blocks}, learned, blocks), levels, updates
        )


def settings_texts(config: Config, names: Iterable[str]) -> list[list[str]]:
    """``[name, text]`` of weights by their unique names: format, block, scale and sparsity."""
    found = [(name, _settings_of(name, config)) for name in names]
    return [[name, settings.grid_text] for name, settings in found if settings is not None]


def operand_texts(config: Config) -> list[str]:
    """How activations, gradients and attention are rounded; empty texts for those that are not."""
    products = (config.activations, config.gradients)
    return [*("" if one is None else one.spec for one in products), config.attention_text]


def _check_operands(raw: Mapping[str, Any], config: Config) -> None:
    """Hold a state to how operands are rounded; one of an older version says nothing of it."""
    if "operands" not in raw:
        return
    saved, own = raw["operands"], operand_texts(config)
    if not isinstance(saved, (list, tuple)) or not all(isinstance(one, str) for one in saved) or len(saved) != 3:
        raise _refusal("operands", "a list of three texts", saved)
    for name, before, now in zip(("activations", "gradients", "attention"), saved, own, strict=True):
        if before != now:
            raise ValueError(
                f"the state was saved with {name}={_shown(before)}, this backend has {_shown(now)}; Schedule changes "
                "what is rounded in the course of a run"
            )


def _check_master(raw: Mapping[str, Any], config: Config) -> None:
    """Hold a state to whether there are master weights; one of an older version says nothing of it, and had them."""
    saved = _integer(raw.get("master", 1))
    if saved not in (0, 1):
        raise _refusal("master", "0 or 1", raw["master"])
    if bool(saved) != config.master:
        raise ValueError(f"the state was saved with master={bool(saved)}, this backend has master={config.master}")


def _updates(raw: Mapping[str, Any]) -> int:
    """How many optimizer steps ran compiled; one of an older version had none."""
    updates = _integer(raw.get("updates", 0))
    if updates is None or updates < 0:
        raise _refusal("updates", "an int, 0 or more", raw["updates"])
    return updates


def _settings_of(unique_name: str, config: Config) -> WeightSettings | None:
    return config.settings_of(without_stage(without_number(unique_name)))


def _check_rules(raw: Mapping[str, Any], config: Config) -> None:
    """Hold a state to the rules, and to what became of the weights by them; one of an older version has neither."""
    if "rules" in raw:
        saved, own = raw["rules"], [rule.text for rule in config.rules]
        if not isinstance(saved, (list, tuple)) or not all(isinstance(rule, str) for rule in saved):
            raise _refusal("rules", "a list of texts", saved)
        if list(saved) != own:
            raise ValueError(f"the state was saved with rules={_cut(list(saved))}, this backend has {_cut(own)}")
    settings = raw.get("settings", [])
    if not isinstance(settings, (list, tuple)):
        raise _refusal("settings", "a list of [name, text]", settings)
    for position, entry in enumerate(settings):
        pair = tuple(entry) if isinstance(entry, (list, tuple)) else ()
        if len(pair) != 2 or not all(isinstance(one, str) for one in pair):
            raise _refusal(f"settings[{position}]", "a pair of name and text", entry)
        name, text = pair
        of_weight = _settings_of(name, config)
        own_text = None if of_weight is None else of_weight.grid_text
        if text != own_text:
            raise ValueError(
                f"the state was saved with {name} in {text!r} (format, block, scale, sparsity), this backend "
                f"{'leaves it alone' if own_text is None else f'has {own_text!r}'}"
            )


def _check_origin(key: str, raw: object, value: object, own: object) -> None:
    if value != own:
        raise ValueError(f"the state was saved with {key}={_shown(raw)}, this backend has {own!r}")


def _shapes(raw: object) -> dict[str, tuple[int, ...]]:
    """The weights of a state."""
    if not isinstance(raw, (list, tuple)):
        raise _refusal("weights", "a list of [name, shape]", raw)
    shapes: dict[str, tuple[int, ...]] = {}
    for position, entry in enumerate(raw):
        key = f"weights[{position}]"
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise _refusal(key, "a pair of name and shape", entry)
        name, sizes = entry
        if not isinstance(name, str) or not name:
            raise _refusal(key, "a pair whose name is a text that is not empty", entry)
        if name in shapes:
            raise _refusal(key, "of a name that no other entry has", entry)
        shape = [_integer(size) for size in sizes] if isinstance(sizes, (list, tuple)) else []
        dims = [size for size in shape if size is not None and size >= 0]
        if len(dims) < 2 or len(dims) != len(shape):
            raise _refusal(key, "a pair whose shape is a list of two or more ints, none negative", entry)
        shapes[name] = tuple(dims)
    return shapes


def _widths(
    raw: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    learned: LearnedBits,
    blocks: Mapping[str, Block],
) -> SavedWidths:
    """The learned widths of a state; ``shapes`` and ``blocks`` are those of the weights that have some."""
    read = _by_weight(raw, "bits", "bit widths", shapes)
    for name, shape in shapes.items():
        # How many leading dims count matrices is said by the graph that reads the weight.
        accepted = {
            parameter_shape(*matrix_shape(shape, dims), blocks[name], learned.granularity)
            for dims in range(len(shape) - 1)
        }
        if tuple(read[name].shape) not in accepted:
            raise ValueError(
                f"the state was saved with bit widths of shape {tuple(read[name].shape)} for {name}, this backend has "
                f"{' or '.join(map(str, sorted(accepted)))}"
            )
    frozen = int(raw["frozen"]) if isinstance(raw["frozen"], bool) else _integer(raw["frozen"])
    if frozen not in (0, 1):
        raise _refusal("frozen", "0 or 1", raw["frozen"])
    return SavedWidths(read, bool(frozen), None if learned.average is None else _steering(raw["steering"]))


def _levels(raw: Mapping[str, Any], of_weights: Mapping[str, WeightSettings | None]) -> dict[str, torch.Tensor]:
    """The levels of a state; ``of_weights`` are the settings of its weights."""
    tables = {
        name: settings.levels
        for name, settings in of_weights.items()
        if settings is not None and settings.levels is not None
    }
    read = _by_weight(raw, "levels", "levels", tables)
    for name, levels in tables.items():
        if read[name].shape != (len(levels.table),):
            raise ValueError(
                f"the state was saved with levels of shape {tuple(read[name].shape)} for {name}, this backend has "
                f"{(len(levels.table),)}"
            )
    return read


def _by_weight(raw: Mapping[str, Any], key: str, words: str, needed: Iterable[str]) -> dict[str, torch.Tensor]:
    """The parameters of a state that stand there by their weights' names."""
    values = raw[key]
    if not isinstance(values, Mapping):
        raise _refusal(key, "a mapping of weight names to float32 tensors", values)
    for name in values:
        if not isinstance(name, str) or not name:
            raise _refusal(key, "a mapping whose keys are weight names", name)
    if missing := [name for name in needed if name not in values]:
        raise ValueError(
            f"the state has no {words} for {', '.join(missing[:8])}: call Backend.prepare(model, ...) before a "
            "state is loaded by torch.distributed.checkpoint, which fills in what is there"
        )
    return {name: _finite(f"{key}[{name!r}]", value) for name, value in values.items()}


def _steering(raw: object) -> dict[str, torch.Tensor]:
    """The state of an `AverageConstraint`."""
    keys = ("multiplier", "scale")
    if not isinstance(raw, Mapping) or set(raw) != set(keys):
        raise _refusal("steering", "a mapping of 'multiplier' and 'scale'", raw)
    read = {key: _finite(f"steering[{key!r}]", raw[key]) for key in keys}
    for key, value in read.items():
        if value.ndim or (key == "scale" and value < 0):
            kind = "a scalar that is not negative" if key == "scale" else "a scalar"
            raise _refusal(f"steering[{key!r}]", kind, value)
    return read


def _finite(key: str, value: object) -> torch.Tensor:
    """A copy of a float32 tensor of finite numbers, in no graph and of no mode."""
    with plain_tensors():
        if not _is_plain(value) or value.dtype != torch.float32:
            raise _refusal(key, "a float32 tensor", value)
        if not bool(value.isfinite().all()):
            raise _refusal(key, "of finite numbers", value)
        return value.detach().clone()


def _is_plain(value: object) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor with values: no fake one, none on the meta device, no DTensor, none that is sparse."""
    if not isinstance(value, torch.Tensor) or type(value) not in (torch.Tensor, nn.Parameter):
        return False
    return value.layout == torch.strided and not value.is_meta


def _integer(value: Any) -> int | None:
    """An int; None for whatever else, bools and whole floats too."""
    if isinstance(value, bool):
        return None
    if isinstance(value, torch.Tensor):
        whole = not (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool)
        return int(value) if _is_plain(value) and value.ndim == 0 and whole else None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _refusal(key: str, accepted: str, value: object) -> ValueError:
    return ValueError(f"the state's {key} must be {accepted}, got {_shown(value)}")


def _shown(value: object) -> str:
    """A bad value, short enough for a message."""
    if isinstance(value, torch.Tensor):
        numbers = ""
        if _is_plain(value) and value.numel() and (value.is_floating_point() or value.numel() <= 8):
            numbers = f" of {_numbers(value.detach().reshape(-1))}"
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}{numbers}"
    if isinstance(value, Mapping):
        return f"a mapping of {_cut(list(islice(value, 20)))}"
    return _cut(value)


def _numbers(flat: torch.Tensor) -> str:
    """The first numbers of a tensor; the first that are not finite, where there are some."""
    wrong = flat[~flat.isfinite()]
    shown: Sequence[Any] = (wrong if len(wrong) else flat)[:8].tolist()
    return ", ".join(map(str, shown)) + (", ..." if len(flat) > len(shown) else "")


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
