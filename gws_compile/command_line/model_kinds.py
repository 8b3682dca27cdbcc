"""Models that are the same but for their values: `ModelKinds`, for ``gws run --auto``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from ..runtime.held_weights import held_weights
from ..weight_names import is_wrapper_component

_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class ModelKind:
    """What a model has in common with its copies.

    Attributes:
        type: its class; that of a copy may be the class that ``fully_shard`` has derived this one from.
        shapes: names and shapes of its Parameters.
    """

    type: type[nn.Module]
    shapes: _Shapes


class ModelKinds:
    """The kinds of models that have been compiled."""

    def __init__(self) -> None:
        self._known: dict[ModelKind, None] = {}

    def __len__(self) -> int:
        return len(self._known)

    def add(self, module: nn.Module) -> None:
        """Take in the model inside a module, as it is now."""
        module = model_inside(module)
        self._known[ModelKind(type(module), _shapes(module))] = None

    def has(self, module: nn.Module) -> bool:
        """Whether a model of the same class, with Parameters of the same names and shapes, has been taken in."""
        classes = [kind for kind in self._known if issubclass(kind.type, type(module))]
        return bool(classes) and _shapes(module) in [kind.shapes for kind in classes]


def model_inside(module: nn.Module) -> nn.Module:
    """The model in wrappers: what holds all Parameters of the module, as a child by a wrapper's name, or ``module``."""
    for name, child in module.named_children():
        if name == "module" or is_wrapper_component(module, name):
            own = set(map(id, module.parameters()))
            return model_inside(child) if own and own == set(map(id, child.parameters())) else module
    return module


def _shapes(module: nn.Module) -> _Shapes:
    return tuple((held.name, tuple(held.tensor.shape)) for held in held_weights(module) if not is_lazy(held.tensor))
