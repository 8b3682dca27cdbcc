"""What kinds of checkpoints there are: of a Hugging Face model, and of any other module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from .collect import DeployedTensor
from .compressed_tensors import quantization_config, sglang_mxfp8
from .containers import CONTAINERS
from .huggingface import family_of, huggingface_entries, ignored, siblings, write_beside
from .layouts import Layout, SglangLayout
from .module_entries import module_entries
from .plan import PlannedEntry, check_siblings, plan
from .torchao_layout import TorchaoLayout

_OF_MODELS = ("mxfp8_sglang", "gguf")
"""Formats that are those of a model, whose architecture a program knows."""


class Checkpoint(Protocol):
    """What an export writes.

    Attributes:
        planned: its tensors, each with its container.
        layout: what they are called.
        ties: names of tied tensors, by the names under which they are stored.
        format: of the report.
    """

    planned: list[PlannedEntry]
    layout: Layout
    ties: dict[str, str]
    format: str

    def family_of(self, name: str) -> str:
        """Weights of equal families may be fused with one another."""

    def load(self, place: Path) -> str:
        """Python, or a command, that loads it."""

    def write_beside(self, folder: Path) -> Sequence[str]:
        """Write what it has beside weights; the names of the files."""

    def notes(self) -> tuple[str, ...]:
        """What a reader of the report should know."""


def _layout(fmt: str | None) -> Layout:
    return TorchaoLayout() if fmt == "torchao" else SglangLayout() if fmt == "mxfp8_sglang" else Layout()


def _container(fmt: str | None) -> str | None:
    """The container that a format asks for; None where each weight has its own."""
    return {"mxfp8_sglang": "mxfp8", "gguf": "mxfp4", "torchao": None}.get(fmt or "", fmt)


def _format(fmt: str | None, planned: Sequence[PlannedEntry]) -> str:
    if fmt in ("torchao", *_OF_MODELS):
        return fmt
    names = {one.container.name for one in planned if one.container is not None}
    return names.pop() if len(names) == 1 else "mixed" if names else "dense"


class ModuleCheckpoint:
    """Of an `nn.Module`: its state under its own names, with a small JSON file that says how it is packed.

    Raises:
        ValueError: a format or a tokenizer that goes with Hugging Face models alone.
    """

    def __init__(self, model: nn.Module, tensors: Sequence[DeployedTensor], fmt: str | None, tokenizer: Any) -> None:
        if fmt in _OF_MODELS:
            raise ValueError(
                f"format={fmt!r} is that of a Hugging Face model, and this is a {type(model).__name__}: accepted are "
                f"{', '.join(CONTAINERS)}, torchao and dense"
            )
        if tokenizer is not None:
            raise ValueError(
                f"tokenizer= goes into the folder of a Hugging Face model, and this is a {type(model).__name__}: "
                "leave it out"
            )
        self.layout = _layout(fmt)
        entries, self.ties = module_entries(tensors)
        self.planned: list[PlannedEntry] = plan(entries, _container(fmt), self.layout.containers)
        self.format = _format(fmt, self.planned)

    def family_of(self, name: str) -> str:
        """Each weight is its own: nothing is fused."""
        return name

    def load(self, place: Path) -> str:
        """What loads it."""
        return f"gws_compile.load_export({str(place)!r})"

    def write_beside(self, folder: Path) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def notes(self) -> tuple[str, ...]:
        """None."""
        return ()


class HuggingFaceCheckpoint:
    """Of a Hugging Face model: the folder that vLLM, SGLang and transformers take."""

    def __init__(self, model: Any, tensors: Sequence[DeployedTensor], fmt: str | None, tokenizer: Any) -> None:
        self.ties: dict[str, str] = {}
        self.layout = _layout(fmt)
        self._model, self._tokenizer = model, tokenizer
        entries, self._untied = huggingface_entries(model, tensors)
        self.planned: list[PlannedEntry] = plan(entries, _container(fmt), self.layout.containers)
        check_siblings(self.planned, siblings(self.planned))
        self.format = _format(fmt, self.planned)
        self._check_torchao()

    def _check_torchao(self) -> None:
        kinds = {one.container.name for one in self.planned if one.container is not None}
        if self.format == "torchao" and len(kinds) > 1:
            raise ValueError(
                "format='torchao' has one configuration for a model, and these weights fit into "
                f"{', '.join(sorted(kinds))}: give them one format, or leave format= out"
            )

    def family_of(self, name: str) -> str:
        """The module whose layers may be fused."""
        return family_of(name)

    def load(self, place: Path) -> str:
        """What loads it."""
        path = f"{type(self._model).__name__}.from_pretrained({str(place)!r}"
        kinds = {one.container.name for one in self.planned if one.container is not None}
        experts = any(".experts." in one.entry.name for one in self.planned if one.container is not None)
        if self.format == "mxfp8_sglang":
            return f"python -m sglang.launch_server --model-path {place}"
        if self.format in ("dense", "torchao"):
            return f"{path})"
        if experts and kinds & {"mxfp8", "mxfp6"}:
            return f"vllm serve {place}"
        if self.format == "mixed":
            return f"{path}, dtype=torch.bfloat16)"
        return f"{path}, quantization_config=CompressedTensorsConfig(dequantize=True))"

    def write_beside(self, folder: Path) -> tuple[str, ...]:
        """Configurations, and the tokenizer."""
        packed = [one.container for one in self.planned if one.container is not None]
        quantization = None
        if packed:
            dense = ignored(self._model, self.planned)
            if isinstance(self.layout, TorchaoLayout):
                quantization = self.layout.quantization_config(packed[0])
            elif isinstance(self.layout, SglangLayout):
                quantization = sglang_mxfp8(dense)
            else:
                quantization = quantization_config(self.planned, dense)
        return write_beside(self._model, folder, quantization, self._tokenizer, untied=self._untied)

    def notes(self) -> tuple[str, ...]:
        """What loaders do to some containers."""
        if self.format in ("torchao", "gguf", "dense"):
            return ()
        packed = [one for one in self.planned if one.container is not None]
        weights = [one.entry.weight for one in packed if one.entry.weight is not None]
        kinds = {one.container.name for one in packed if one.container is not None}
        notes = []
        if any(one.container is not None and one.container.scale == "float32" for one in packed):
            notes.append(
                "scales are float32: transformers keeps them with dequantize=True, and rounds them to the model's "
                "dtype without; vLLM rounds those of int4 and int8"
            )
        if any(".experts." in one.entry.name for one in packed) and kinds & {"mxfp8", "mxfp6"}:
            notes.append(
                f"transformers 5.24 does not load experts in {' or '.join(sorted(kinds & {'mxfp8', 'mxfp6'}))}; it "
                "does in mxfp4, fp8_channel and fp8_tensor"
            )
        if "mxfp6" in kinds:
            notes.append("vLLM does not run mxfp6 yet: format='mxfp8' holds the same weights")
        if self.format == "mixed":
            notes.append("several formats: transformers loads them in bfloat16, without dequantize=True")
        if any(weight.spec.needs_matrix_maximum for weight in weights):
            notes.append(
                "scales have two levels: transformers decodes nvfp4 in bfloat16, whatever dtype is asked for, and is "
                "exact there"
            )
            fused = siblings(packed)
            if fused:
                notes.append(
                    "each weight has an nvfp4 scale of its own, and vLLM takes one for layers that it fuses "
                    f"({', '.join(fused[0][:3])}), which moves their weights a little; fmt='fp4_e2m1', block=(16, 16) "
                    "trains with power-of-two scales, of which one serves the whole model"
                )
        return tuple(notes)
