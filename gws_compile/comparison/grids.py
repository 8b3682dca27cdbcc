"""Casting the weights of a trained model to one grid after another, in place: `Grids`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..compiler.backend import Backend
from ..config import Config
from ..numerics.blocks import matrix_shape
from ..ops.eager import sample_eager
from ..runtime.sampled_weights import sampling_of
from ..settings.weight_settings import WeightSettings
from ..torch_internals.distributed import is_sharded
from ..weight_names import first_match


@dataclass(frozen=True, eq=False)
class CastWeight:
    """A weight that a backend's graphs cast.

    Attributes:
        name: its qualified name.
        parameter: itself.
        dtype: the one in which graphs read it.
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
    """

    name: str
    parameter: nn.Parameter
    dtype: torch.dtype
    batch_dims: int

    def settings(self, config: Config) -> WeightSettings | None:
        """How it is cast by a backend of these settings; None where it is left alone."""
        if first_match(self.name, config.exclude) is not None:
            return None
        if config.include is not None and first_match(self.name, config.include) is None:
            return None
        return config.settings_of(self.name)

    def cast(self, config: Config) -> torch.Tensor | None:
        """The weight on the grid that settings say, without noise, in its own dtype; None where they leave it alone."""
        settings = self.settings(config)
        if settings is None:
            return None
        w = self.parameter.detach()
        spec = replace(settings.sample_spec(self.dtype), noise="none")
        return sample_eager(w.to(self.dtype), spec, self.batch_dims, settings.block).to(w.dtype)


@dataclass(frozen=True)
class Grids:
    """The grids that a model's weights are cast to.

    Attributes:
        weights: those of the model that are cast.
        configs: settings by the labels of the grids.
    """

    weights: tuple[CastWeight, ...]
    configs: Mapping[str, Config]

    @classmethod
    def of_model(cls, backend: Backend, model: nn.Module, configs: Mapping[str, Config]) -> Grids:
        """Those of the weights that a backend's graphs have cast so far.

        Raises:
            ValueError: there are none, or they are shards of DTensors.
        """
        found = []
        parameters = [p for p in model.parameters() if p.ndim >= 2]
        for parameter, slot in zip(parameters, backend.slots_of(parameters), strict=True):
            sampled = None if slot is None else sampling_of(slot)
            if slot is None or sampled is None:
                continue
            if is_sharded(parameter):
                raise ValueError("a comparison takes whole weights, and the model has DTensors: train on one rank")
            found.append(CastWeight(slot.path, parameter, sampled.dtype, sampled.reads[0].batch_dims))
        if not found:
            raise ValueError(
                "no weight of the model that the training function returned was cast while its evaluate() ran: compile "
                "it with the backend that the function is given, return the model that evaluate() calls, and see "
                "Backend.report() for the reasons"
            )
        return cls(tuple(found), configs)

    def stored_bytes(self, label: str) -> int:
        """Bytes of the weights that are cast to a grid, scales included."""
        total = 0
        for weight in self.weights:
            settings = weight.settings(self.configs[label])
            if settings is not None:
                total += settings.stored_bytes(*matrix_shape(weight.parameter.shape, weight.batch_dims))
        return total

    @contextmanager
    def cast_to(self, label: str) -> Iterator[float]:
        """Inside a ``with`` block the weights lie on a grid; behind it they are what they were, bit for bit.

        Yields:
            How far they have moved: sqrt(sum (w - cast(w))**2 / sum w**2) over all weights, summed in float64.
        """
        before = [weight.parameter.detach().clone() for weight in self.weights]
        moved = total = 0.0
        with torch.no_grad():
            try:
                for weight, w in zip(self.weights, before, strict=True):
                    total += float(w.double().square().sum())
                    cast = weight.cast(self.configs[label])
                    if cast is not None:
                        moved += float((w.double() - cast.double()).square().sum())
                        weight.parameter.copy_(cast)
                yield math.sqrt(moved / total) if total else 0.0
            finally:
                for weight, w in zip(self.weights, before, strict=True):
                    weight.parameter.copy_(w)
