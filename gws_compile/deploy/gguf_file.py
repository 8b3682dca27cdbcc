"""A Llama-shaped model as one GGUF file for llama.cpp, its low-bit weights as MXFP4.

Names and hyperparameters are those of the gguf package (MIT), its reader decodes what was written. ggml's block of
MXFP4: a byte with the exponent, then 16 bytes, element j of 32 in the low half of byte j, element j + 16 in the high.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .encode import cast_weight, digest, encode_weight, stored_tensors
from .plan import PlannedEntry

ARCHITECTURES: Mapping[str, str] = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""``model_type`` -> gguf's name of the architecture."""


class GgufFile:
    """Writes one file.

    Args:
        model: a ``PreTrainedModel``.
        tokenizer: a fast tokenizer of byte-level BPE; None for a file without a vocabulary.

    Raises:
        ImportError: gguf is missing.
        ValueError: another kind of model or tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        try:
            self._gguf: Any = importlib.import_module("gguf")
        except ImportError as error:
            raise ImportError('format="gguf" needs gguf: pip install gguf, or gws_compile[gguf]') from error
        kind = model.config.model_type
        if kind not in ARCHITECTURES:
            raise ValueError(
                f'format="gguf" takes models shaped like Llama ({", ".join(ARCHITECTURES)}), and this is {kind!r}: '
                'export with format="mxfp4"'
            )
        self._config = model.config
        self._arch = getattr(self._gguf.MODEL_ARCH, ARCHITECTURES[kind])
        self._names = self._gguf.get_tensor_name_map(self._arch, model.config.num_hidden_layers)
        self._vocabulary = None if tokenizer is None else _vocabulary(tokenizer)

    def check(self, planned: Sequence[PlannedEntry]) -> None:
        """Hold the entries to what llama.cpp knows.

        Raises:
            ValueError: it has no such tensor.
        """
        for one in planned:
            self._name(one)

    def rows(self, one: PlannedEntry) -> torch.Tensor | None:
        """In which order llama.cpp wants the rows of queries and keys, whose rotation pairs neighbours; None as is."""
        config = self._config
        if config.model_type not in ("llama", "mistral"):
            return None
        layer = one.entry.name.split(".")[-2]
        if layer not in ("q_proj", "k_proj"):
            return None
        heads = config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads
        numbers = torch.arange(one.entry.shape[0]).view(heads, 2, -1)
        return numbers.transpose(1, 2).reshape(-1)

    def write(self, file: Path, planned: Sequence[PlannedEntry], values: Any) -> None:
        """Write the file, one weight in memory.

        Args:
            file: to write.
            planned: the entries, each of a source of its own.
            values: the gathered sources, in this order.

        Raises:
            ValueError: what was written does not decode to what the compiled model uses.
        """
        gguf = self._gguf
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[self._arch], use_temp_file=True)
        self._add_settings(writer)
        expected: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        for one, value in zip(planned, values, strict=True):
            name = self._name(one)
            rows = self.rows(one)
            weight = one.entry.weight
            cast = value if weight is None else cast_weight(value, weight).to(value.dtype)
            cast = cast if rows is None else cast[rows]
            if one.container is None or weight is None:
                self._add_dense(writer, name, cast)
            else:
                encoded = encode_weight(value, weight, one.container, one.shift)
                stored = stored_tensors(encoded, weight, one.container, rows, None)
                writer.add_tensor(name, _blocks(stored).numpy(), raw_dtype=gguf.GGMLQuantizationType.MXFP4)
            expected[name] = digest(cast, signed_zero=False), cast.dtype, cast.shape  # MXFP4 has no -0 here
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        self._check(file, expected)

    def _name(self, one: PlannedEntry) -> str:
        stem, _, kind = one.entry.name.rpartition(".")
        name = self._names.get_name(stem)
        if name is None:
            raise ValueError(f"{one.entry.name}: llama.cpp has no such tensor in {self._config.model_type!r} models")
        return f"{name}.{kind}"

    def _add_dense(self, writer: Any, name: str, value: torch.Tensor) -> None:
        kinds = self._gguf.GGMLQuantizationType
        if value.ndim < 2 or value.dtype == torch.float32:  # llama.cpp wants vectors in float32
            writer.add_tensor(name, value.to(torch.float32).contiguous().numpy())
        elif value.dtype == torch.bfloat16:
            writer.add_tensor(name, value.contiguous().view(torch.uint8).numpy(), raw_dtype=kinds.BF16)
        else:
            writer.add_tensor(name, value.contiguous().numpy())

    def _add_settings(self, writer: Any) -> None:
        config = self._config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(head)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_vocab_size(config.vocab_size)
        self._add_rope(writer)
        writer.add_file_type(self._gguf.LlamaFileType.MOSTLY_MXFP4_MOE)
        writer.add_quantization_version(self._gguf.GGML_QUANT_VERSION)
        vocabulary = self._vocabulary
        if vocabulary is None:
            writer.add_tokenizer_model("none")
            return
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        size = config.vocab_size
        tokens = [vocabulary.tokens.get(number, f"[PAD{number}]") for number in range(size)]
        kinds = self._gguf.TokenType
        special = vocabulary.special
        writer.add_token_list(tokens)
        writer.add_token_types(
            [
                kinds.UNUSED if n not in vocabulary.tokens else kinds.CONTROL if n in special else kinds.NORMAL
                for n in range(size)
            ]
        )
        writer.add_token_merges(vocabulary.merges)
        for add, number in ((writer.add_bos_token_id, vocabulary.bos), (writer.add_eos_token_id, vocabulary.eos)):
            if number is not None:
                add(number)

    def _add_rope(self, writer: Any) -> None:
        rope = getattr(self._config, "rope_parameters", None) or {}
        kind = rope.get("rope_type", "default")
        if kind != "default":
            raise ValueError(
                f'format="gguf" writes rotary embeddings without scaling, and this model has rope_type={kind!r}: '
                'export with format="mxfp4"'
            )
        writer.add_rope_freq_base(rope.get("rope_theta", getattr(self._config, "rope_theta", 10000.0)))

    def _check(self, file: Path, expected: Mapping[str, tuple[int, torch.dtype, torch.Size]]) -> None:
        reader = self._gguf.GGUFReader(file)
        found = {tensor.name: tensor for tensor in reader.tensors}
        for name, (wanted, dtype, shape) in expected.items():
            tensor = found[name]
            decoded = torch.from_numpy(self._gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            if digest(decoded.view(shape).to(dtype), signed_zero=False) != wanted:
                raise ValueError(
                    f"{name}: what was written does not decode to what the compiled model uses. Nothing was exported; "
                    "please report this"
                )


def _blocks(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """uint8 (rows, 17 * columns / 32): ggml's blocks, from codes and exponents as compressed-tensors has them."""
    packed, scale = stored["packed"], stored["scale"]
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).view(len(packed), -1, 32)
    halves = codes[..., :16] | (codes[..., 16:] << 4)
    return torch.cat([scale[..., None], halves], dim=-1).view(len(packed), -1).contiguous()


class _Vocabulary:
    """What llama.cpp needs of a tokenizer of byte-level BPE."""

    def __init__(self, tokenizer: Any) -> None:
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        self.tokens = {number: token for token, number in tokenizer.get_vocab().items()}
        self.special = set(tokenizer.all_special_ids)
        merges = described["model"]["merges"]
        self.merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.pre = described.get("pre_tokenizer") or {}
        self.kind = described["model"]["type"]


def _vocabulary(tokenizer: Any) -> _Vocabulary:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = None if fast is None else _Vocabulary(tokenizer)
    plain = vocabulary is not None and vocabulary.kind == "BPE" and vocabulary.pre.get("type") == "ByteLevel"
    if vocabulary is None or not plain or not vocabulary.pre.get("use_regex", True):
        raise ValueError(
            f'format="gguf" writes the vocabulary of byte-level BPE as GPT-2 has it, and this is a '
            f"{type(tokenizer).__name__} of another kind: leave tokenizer= out, and add the vocabulary with "
            "llama.cpp's convert_hf_to_gguf.py --vocab-only"
        )
    return vocabulary
