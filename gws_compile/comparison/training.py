"""One run of a training function, and what is measured of the model that it made: `train_and_measure`."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..compiler.backend import Backend
from ..compiler.cast_afterwards import CastAfterwards
from ..config import Config
from ..torch_internals.compilers import unwrapped
from ..warning import GwsWarning
from .compared_settings import ComparedSetting
from .grids import Grids

TrainingFunction = Callable[..., tuple[Any, ...]]
"""``train(backend, seed, **training)``, which returns ``(model, evaluate)`` or ``(model, evaluate, figures)``."""

_RETURNS = (
    "the training function must return (model, evaluate) or (model, evaluate, figures): the compiled model, a function "
    "of nothing that returns its loss, and numbers by name"
)


class TrainingFunctionError(TypeError):
    """A training function returned something else than it has to; the message says what."""


@dataclass(frozen=True)
class Trained:
    """What a training function returned.

    Attributes:
        model: as the function compiled it.
        evaluate: calls it on held-out data, and returns a loss.
        figures: further numbers.
    """

    model: nn.Module
    evaluate: Callable[[], Any]
    figures: Mapping[str, float]

    @classmethod
    def of(cls, returned: object) -> Trained:
        """Check what came back.

        Raises:
            TrainingFunctionError: it is something else.
        """
        if not isinstance(returned, tuple) or len(returned) not in (2, 3):
            raise TrainingFunctionError(f"{_RETURNS}, got {type(returned).__name__}")
        model, evaluate, figures = (*returned, {})[:3]
        if not isinstance(model, nn.Module) or not callable(evaluate) or not isinstance(figures, Mapping):
            kinds = ", ".join(type(one).__name__ for one in returned)
            raise TrainingFunctionError(f"{_RETURNS}, got ({kinds})")
        return cls(model, evaluate, {name: float(value) for name, value in figures.items()})

    def loss(self, *, gradients: bool = False, eager: bool = False) -> float:
        """The loss on held-out data, in evaluation mode.

        Args:
            gradients: leave them enabled, so that compiled graphs are those of training.
            eager: as the model is written, with nothing compiled.
        """
        training = self.model.training
        self.model.eval()
        try:
            with torch.set_grad_enabled(gradients), torch.compiler.set_stance("force_eager" if eager else "default"):
                loss = self.evaluate()
                return float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        finally:
            self.model.train(training)

    def leaves_gradients(self) -> bool:
        """Whether `evaluate` calls the model with gradients as they are around it, which says which graphs it runs."""
        seen: list[bool] = []
        handle = unwrapped(self.model).register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
        try:
            self.loss(gradients=True, eager=True)
        finally:
            handle.remove()
        return bool(seen) and all(seen)


def backend_of(setting: ComparedSetting, seed: int) -> Backend:
    """The backend that a training function is given."""
    config = Config.make(**{**setting.arguments, "seed": seed})
    return CastAfterwards(config) if setting.trains_plain else Backend(config)


def train_and_measure(
    train: TrainingFunction,
    setting: ComparedSetting,
    seed: int,
    grids: Mapping[str, Config],
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """Train once, and measure the model's losses in all forms.

    Args:
        train: the training function.
        setting: what it is trained with.
        seed: of weights, data and noise.
        grids: settings of casts by the labels of their grids.
        training: arguments of the training function.

    Returns:
        For JSON: ``trained``, the loss with the noise of one draw (None where it cannot be had); ``deployed``, the loss
        of the weights as they are cast, without noise (of plain training: as they are); ``uncast``, that of the weights
        as they are; ``casts``, the loss by grid, ``distances``, how far the weights lie from each, see
        `Grids.cast_to`, and ``cast_bytes``, what they take there; ``average_bits`` and ``bytes`` of the weights that
        are cast; ``params``, how many there are outside of embedding tables; ``seconds``; ``figures``.

        ``trained`` and ``deployed`` are losses of compiled calls, the others of eager ones: in float32 they differ in
        the last digits, under bfloat16 autocast in the fourth.
    """
    torch.compiler.reset()  # the models of former runs would count as recompilations of this one's code
    backend = backend_of(setting, seed)
    start = time.perf_counter()
    trained = Trained.of(train(backend, seed, **training))
    seconds = time.perf_counter() - start
    evaluated = trained.loss()  # of plain training: casts the weights, so that it is known which they are
    uncast = trained.loss(eager=True)
    with_noise: float | None
    if setting.trains_plain:
        compiled = _with_gradients(trained)
        deployed = with_noise = uncast if compiled is None else compiled
    else:
        deployed = evaluated
        with_noise = _with_gradients(trained) if backend.config.draws_noise else evaluated
    model = unwrapped(trained.model)
    known = Grids.of_model(backend, model, grids)
    casts, distances = {}, {}
    for label in grids:
        with known.cast_to(label) as distance:
            casts[label], distances[label] = trained.loss(eager=True), distance
    cast_bytes = {label: known.stored_bytes(label) for label in grids}
    return {
        "trained": with_noise,
        "deployed": deployed,
        "uncast": uncast,
        "casts": casts,
        "distances": distances,
        "cast_bytes": cast_bytes,
        **_sizes(setting, backend, known),
        "params": _parameters(model),
        "seconds": seconds,
        "figures": dict(trained.figures),
    }


def _with_gradients(trained: Trained) -> float | None:
    """The loss of compiled calls that are as in training; None, with a warning, where there can be none."""
    if trained.leaves_gradients():
        return trained.loss(gradients=True)
    warnings.warn(
        "evaluate() disables gradients itself, or calls another model than the one that is returned: the loss with "
        "noise, the trained form, cannot be measured, and that of plain training is of eager calls. Leave "
        "torch.no_grad() out of it, gradients are disabled around it where they are not needed",
        GwsWarning,
        stacklevel=3,
    )
    return None


def _parameters(model: nn.Module) -> int:
    """How many there are outside of embedding tables: the N of scaling laws."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    return sum(p.numel() for p in model.parameters() if id(p) not in tables)


def _sizes(setting: ComparedSetting, backend: Backend, known: Grids) -> dict[str, Any]:
    """Average width and bytes of the weights that are cast; of plain training the bytes that they take in bfloat16."""
    elements = sum(weight.parameter.numel() for weight in known.weights)
    if setting.trains_plain:
        return {"average_bits": None, "bytes": 2 * elements}
    report = backend.report()
    if report.bits is not None:
        return {"average_bits": report.bits.average, "bytes": report.bits.stored_bytes}
    return sizes_of([asdict(record) for record in report.rewritten])


def sizes_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average width, None without noise, and bytes, None where unknown, of weights that are cast.

    Args:
        records: keyed as `gws_compile.WeightRecord`.
    """
    widths = [(one["bits"], math.prod(one["shape"])) for one in records if one["bits"] is not None]
    total = sum(size for _, size in widths)
    stored = [one["stored_bytes"] for one in records]
    return {
        "average_bits": sum(bits * size for bits, size in widths) / total if total else None,
        "bytes": None if None in stored else sum(stored),
    }
