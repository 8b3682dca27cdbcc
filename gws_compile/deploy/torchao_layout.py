"""torchao's tensor subclasses, with the codes and scales of training, in safetensors as torchao writes them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .containers import Container
from .layouts import Layout
from .plan import PlannedEntry


class TorchaoLayout(Layout):
    """A layout in which torchao makes, names and decodes what is stored.

    Checked with torchao 0.18. ``Float8Tensor`` and ``Int8Tensor`` are torchao's own, its MX and NVFP4 tensors are
    prototypes and are left out.

    Raises:
        ImportError: torchao is missing.
    """

    containers = ("fp8_channel", "fp8_tensor", "fp8_block", "int8")

    def __init__(self) -> None:
        try:
            self._support = importlib.import_module("torchao.prototype.safetensors.safetensors_support")
            self._quantization: Any = importlib.import_module("torchao.quantization")
        except ImportError as error:
            raise ImportError('format="torchao" needs torchao: pip install torchao') from error
        self._metadata: dict[str, str] = {}

    def _shapes(self, one: PlannedEntry) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        shapes = dict(super()._shapes(one))
        container = one.container
        if container is None:
            return shapes
        rows, cols = one.entry.shape
        scale = (shapes["scale"][0] if len(shapes["scale"][0]) == 2 else (1, 1)), torch.float32
        codes = torch.int8 if container.name == "int8" else torch.float8_e4m3fn
        return {"codes": ((rows, cols), codes), "scale": scale}

    def name(self, weight: str, key: str) -> str:
        """``weight`` becomes ``_weight_qdata`` and ``_weight_scale``."""
        module, _, attribute = weight.rpartition(".")
        part = f"_{attribute}_{'qdata' if key == 'codes' else key}"
        return f"{module}.{part}" if module else part

    def store(self, one: PlannedEntry, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What torchao makes of the tensor subclass."""
        tensors, metadata = self._support.flatten_tensor_state_dict({one.entry.name: self._tensor(one, stored)})
        self._metadata[one.entry.name] = metadata[one.entry.name]
        return dict(tensors)

    def _tensor(self, one: PlannedEntry, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        container, weight, (rows, cols) = one.container, one.entry.weight, one.entry.shape
        assert container is not None
        assert weight is not None
        block = [one.group[0] or rows, one.group[1] or cols]
        scale = stored["scale"].view(-(-rows // block[0]), -(-cols // block[1]))
        if container.name == "int8":
            codes = container.codec.unpack(stored["packed"], cols).to(torch.int8)
            made: torch.Tensor = self._quantization.Int8Tensor(codes, scale, block, weight.spec.dtype)
            return made
        made = self._quantization.Float8Tensor(stored["codes"], scale, block_size=block, dtype=weight.spec.dtype)
        return made

    def note_dense(self, name: str) -> None:
        """Torchao lists what it has not packed."""
        self._metadata[name] = json.dumps({"_type": "Tensor"})

    def decode(
        self, one: PlannedEntry, container: Container, read: Callable[[str], torch.Tensor]
    ) -> Iterable[torch.Tensor]:
        """What torchao makes of what the file has."""
        name, weight = one.entry.name, one.entry.weight
        assert weight is not None
        tensors = {self.name(name, key): read(self.name(name, key)) for key in ("codes", "scale")}
        metadata = {name: self._written[name], "tensor_names": json.dumps([name])}
        found, _ = self._support.unflatten_tensor_state_dict(tensors, metadata)
        return (found[name].dequantize(torch.float32),)

    def metadata(self) -> dict[str, str]:
        """torchao's, of the tensors in the file."""
        self._written, self._metadata = self._metadata, {}
        names = json.dumps(list(self._written))
        return {"format": "pt", **self._written, "tensor_names": names}

    def quantization_config(self, container: Container) -> dict[str, Any]:
        """What ``config.json`` says for transformers.

        Raises:
            ValueError: the container has no configuration in torchao.
        """
        from transformers import TorchAoConfig

        kinds = self._quantization
        if container.name == "int8":
            chosen = kinds.Int8WeightOnlyConfig(version=2)
        else:
            granularity = kinds.PerTensor() if container.name == "fp8_tensor" else kinds.PerRow()
            chosen = kinds.Float8WeightOnlyConfig(granularity=granularity)
        config: dict[str, Any] = TorchAoConfig(chosen).to_dict()  # type: ignore[no-untyped-call]
        return config
