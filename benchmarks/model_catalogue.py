"""The catalogue of `model_coverage.py`: real model code in tiny sizes, as data. Nothing is downloaded.

Hugging Face models come from their configurations, with random weights and without dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils import parametrizations


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue.

    Attributes:
        name: of the architecture.
        family: what kind of model it is.
        build: makes the model, in training mode.
        inputs: makes the keyword arguments of its call.
        recurrent: whether it runs under ``torch._dynamo.config.allow_rnn``.
        untraced: whether it is there to show what is said of weights that Dynamo does not get to see.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    recurrent: bool = False
    untraced: bool = False


def _config(name: str, settings: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{name}Config")(**settings)
    _without_dropout(config)
    return config


def _without_dropout(config: Any) -> None:
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            _without_dropout(value)
        elif "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)


def _hugging_face(config: str, model: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(_config(config, settings)).train()


TEXT = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


def _tokens() -> dict[str, Any]:
    return {"input_ids": 3 + torch.arange(16).view(2, 8) % 90}


def _pixels(size: int = 32) -> dict[str, Any]:
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * size * size).view(2, 3, size, size).sin()}


def _both_sides() -> dict[str, Any]:
    return {**_tokens(), "decoder_input_ids": 3 + torch.arange(12).view(2, 6) % 90}


def _decoder(name: str, *, family: str = "decoder", **settings: Any) -> Entry:
    settings = {**TEXT, **SIZE, "use_cache": False, **settings}
    return Entry(name, family, _hugging_face(name, f"{name}ForCausalLM", settings), _tokens)


def _encoder(name: str, *, head: str = "ForMaskedLM", **settings: Any) -> Entry:
    return Entry(name, "encoder", _hugging_face(name, f"{name}{head}", {**TEXT, **SIZE, **settings}), _tokens)


def _encoder_decoder(name: str, **settings: Any) -> Entry:
    build = _hugging_face(name, f"{name}ForConditionalGeneration", {**TEXT, "use_cache": False, **settings})
    return Entry(name, "encoder-decoder", build, _both_sides)


def _vision(name: str, *, head: str = "ForImageClassification", size: int = 32, **settings: Any) -> Entry:
    return Entry(name, "vision", _hugging_face(name, f"{name}{head}", settings), lambda: _pixels(size))


_BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}  # fmt: skip
_PATCHES = {**SIZE, "image_size": 32, "patch_size": 8}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
_WAVES = {
    **SIZE, "vocab_size": 32, "conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 4),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False, "feat_extract_norm": "layer", "do_stable_layer_norm": True,
}  # fmt: skip


def _waves() -> dict[str, Any]:
    return {"input_values": torch.linspace(0, 90, 512).sin().view(2, 256)}


def _spectrogram(key: str, *shape: int) -> dict[str, Any]:
    return {key: torch.linspace(0, 200, 2 * shape[0] * shape[1]).sin().view(2, *shape)}


def _whisper() -> dict[str, Any]:
    return {**_spectrogram("input_features", 16, 32), "decoder_input_ids": 3 + torch.arange(12).view(2, 6)}


def _image_and_text() -> dict[str, Any]:
    return {**_tokens(), **_pixels()}


def _two_towers(name: str, model: str) -> Callable[[], nn.Module]:
    return _hugging_face(
        name, model, {"text_config": {**TEXT, **SIZE}, "vision_config": dict(_PATCHES), "projection_dim": 32}
    )


def _llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config={**TEXT, **SIZE, "model_type": "llama", "num_key_value_heads": 2, "use_cache": False},
        vision_config={**_PATCHES, "model_type": "clip_vision_model", "num_hidden_layers": 2},
        image_token_index=95,
    )
    _without_dropout(config)
    return transformers.LlavaForConditionalGeneration(config).train()


def _llava_inputs() -> dict[str, Any]:
    text = _tokens()["input_ids"]
    return {"input_ids": torch.cat([torch.full((2, 16), 95), text], 1), **_pixels()}


# --- Plain torch -----------------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """Convolutions, batch norm, a depthwise one, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 32, 1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images (batch, 3, height, width)."""
        x = F.relu(self.norm(self.stem(x)))
        return self.fc(F.relu(self.pointwise(self.depthwise(x))).mean((2, 3)))


class UNet(nn.Module):
    """One level down and up again, by a transposed convolution, with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """An image of the same size."""
        skip = self.first(x)
        x = self.up(F.silu(self.middle(F.silu(self.down(skip)))))
        return self.last(torch.cat([skip, x], 1))


class Volumes(nn.Module):
    """Convolutions of one and three dims, with their transposed forms."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.up1 = nn.Conv1d(4, 8, 3, stride=2), nn.ConvTranspose1d(8, 4, 3, stride=2)
        self.down3, self.up3 = nn.Conv3d(1, 4, 3), nn.ConvTranspose3d(4, 1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (batch, 4, 17) to the same."""
        y = self.up1(self.down1(x))
        return y + self.up3(self.down3(y[:, None, :, :, None].expand(-1, -1, -1, -1, 4))).mean((1, 4))


class Recurrent(nn.Module):
    """Embedding, recurrent layers, head."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.rnn = kind(16, 24, num_layers=2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(48, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of each token."""
        return self.fc(self.rnn(self.embed(tokens))[0])


class Cells(nn.Module):
    """The loop over time written out."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(8, 16), nn.GRUCell(16, 16), nn.RNNCell(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The last state of a sequence (batch, time, 8)."""
        state, gated, plain = None, None, None
        for t in range(x.shape[1]):
            state = self.lstm(x[:, t], state)
            gated = self.gru(state[0], gated)
            plain = self.rnn(gated, plain)
        return plain


class Transformer(nn.Module):
    """Torch's own encoder and decoder layers, and attention by itself."""

    def __init__(self) -> None:
        super().__init__()
        common = {"dim_feedforward": 48, "dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, **common), 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(32, 4, **common)
        self.mha = nn.MultiheadAttention(32, 4, kdim=16, vdim=16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (batch, time, 32) to the same."""
        y = self.decoder(x, self.encoder(x))
        return self.mha(y, x[..., :16], x[..., 16:])[0]


class FusedProjections(nn.Module):
    """Query, key and value weights that are joined before use; experts that are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, n, bias=False) for n in (32, 16, 16))
        self.experts = nn.ModuleList(nn.Linear(32, 16, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (batch, time, 32) to (2, batch * time, 16)."""
        q, k, v = F.linear(x, torch.cat([self.q.weight, self.k.weight, self.v.weight])).split([32, 16, 16], -1)
        x = (q + torch.cat([k, v], -1)).flatten(0, 1)
        return torch.bmm(x.expand(2, -1, -1), torch.stack([e.weight for e in self.experts]).mT)


class Parametrized(nn.Module):
    """Weight norm, spectral norm and a low-rank update merged into its base, beside a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.weight_norm = parametrizations.weight_norm(nn.Conv1d(16, 16, 3, padding=1))
        self.spectral_norm = parametrizations.spectral_norm(nn.Linear(16, 16))
        self.base = nn.Parameter(torch.randn(16, 16))
        self.left, self.right = nn.Parameter(torch.randn(16, 2)), nn.Parameter(torch.randn(2, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (batch, time, 16) to the same."""
        x = self.spectral_norm(self.weight_norm(self.plain(x).mT).mT)
        return F.linear(x, self.base + self.left @ self.right)


class Functional(nn.Module):
    """A module called by functional_call, mapped over by vmap, differentiated by grad; an ensemble."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.ensemble = nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (batch, 16) to (3, batch, 16)."""
        parameters = dict(self.inner.named_parameters())
        x = torch.func.functional_call(self.inner, parameters, (x,)) + torch.vmap(self.inner)(x)
        x = x + torch.func.grad(lambda x: self.inner(x).pow(3).sum())(x)
        return torch.vmap(F.linear, in_dims=(None, 0))(x, self.ensemble)


class BreaksInALoop(nn.Module):
    """A graph break inside a loop: torch leaves the whole frame, and compiles the blocks alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvNetBlock() for _ in range(2))
        self.bare = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (batch, 16) to the same."""
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x @ self.bare


class ConvNetBlock(nn.Module):
    """A block with two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (batch, 16) to the same."""
        return x + self.down(F.gelu(self.up(x)))


def _lora() -> nn.Module:
    import peft

    base = transformers.LlamaForCausalLM(_config("Llama", {**TEXT, **SIZE, "num_key_value_heads": 2}))
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
    return peft.get_peft_model(base, settings).train()


def _float_input(*shape: int, name: str = "x") -> Callable[[], dict[str, Any]]:
    numel = torch.Size(shape).numel()
    return lambda: {name: torch.linspace(0, numel / 3, numel).sin().view(shape)}


def _plain(name: str, family: str, build: Callable[[], nn.Module], *shape: int, **settings: Any) -> Entry:
    return Entry(name, family, build, _float_input(*shape), **settings)


def _recurrent(name: str, kind: type[nn.RNNBase], *, traced: bool) -> Entry:
    return Entry(
        name,
        "recurrent",
        lambda: Recurrent(kind),
        lambda: {"tokens": torch.arange(12).view(2, 6)},
        recurrent=traced,
        untraced=not traced,
    )


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "GPT2", "decoder",
        _hugging_face(
            "GPT2", "GPT2LMHeadModel",
            {**TEXT, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "use_cache": False},
        ),
        _tokens,
    ),
    _decoder("Llama", num_key_value_heads=2),
    _decoder("Mistral", **GROUPED),
    _decoder("Qwen2", num_key_value_heads=2),
    _decoder("Qwen3", **GROUPED),
    _decoder("Gemma2", **GROUPED),
    _decoder("Phi3", num_key_value_heads=2),
    _decoder("GPTNeoX"),
    _decoder("Falcon", n_head=4, num_kv_heads=2, new_decoder_architecture=True),
    _decoder("OPT", ffn_dim=48, word_embed_proj_dim=32),
    _decoder("Bloom", n_head=4, n_layer=1),
    _decoder("Cohere", num_key_value_heads=2),
    _decoder("Olmo2", num_key_value_heads=2),
    _decoder("Mixtral", family="mixture of experts", num_key_value_heads=2, num_local_experts=4),
    _decoder(
        "Qwen3Moe", family="mixture of experts", num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24, **GROUPED,
    ),
    _decoder("GptOss", family="mixture of experts", num_local_experts=4, num_experts_per_tok=2, **GROUPED),
    _decoder("Olmoe", family="mixture of experts", num_experts=4, num_experts_per_tok=2, num_key_value_heads=2),
    _decoder(
        "DeepseekV3", family="mixture of experts", num_hidden_layers=2, num_key_value_heads=4, n_routed_experts=4,
        n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, moe_intermediate_size=24,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
    _decoder("Mamba", family="state space", state_size=4),
    _decoder(
        "Mamba2", family="state space", state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=4,
    ),
    _decoder(
        "Jamba", family="state space", num_key_value_heads=2, num_hidden_layers=2, attn_layer_period=2,
        attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2, mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    _decoder(
        "RecurrentGemma", family="state space", num_key_value_heads=1, lru_width=32, num_hidden_layers=3,
        attention_window_size=8,
    ),
    _encoder("Bert"),
    _encoder("Roberta"),
    _encoder("DistilBert", dim=32, n_layers=1, n_heads=4, hidden_dim=48),
    _encoder("Electra", embedding_size=16),
    _encoder("Albert", embedding_size=16, inner_group_num=1),
    _encoder("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8),
    _encoder("ModernBert", cls_token_id=1, sep_token_id=2),
    _encoder_decoder("T5", **_T5),
    _encoder_decoder("MT5", **_T5, feed_forward_proj="gated-gelu"),
    _encoder_decoder("Bart", **_BART),
    _encoder_decoder("Pegasus", **_BART),
    _encoder_decoder("M2M100", **_BART),
    _vision("ViT", **_PATCHES),
    _vision("DeiT", **_PATCHES),
    _vision("Dinov2", **_PATCHES, mlp_ratio=2),
    _vision("ConvNext", depths=[1, 1], hidden_sizes=[16, 32], num_stages=2),
    _vision(
        "Swin", image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4,
    ),
    _vision("ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"),
    _vision("Bit", embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_groups=2),
    _vision("MobileNetV2", size=64, image_size=64, depth_multiplier=0.25),
    _vision(
        "Segformer", size=64, depths=[1, 1], num_encoder_blocks=2, hidden_sizes=[16, 32], num_attention_heads=[2, 4],
        sr_ratios=[4, 2], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
        head="ForSemanticSegmentation",
    ),
    Entry(
        "Whisper", "audio",
        _hugging_face(
            "Whisper", "WhisperForConditionalGeneration",
            {**TEXT, **_BART, "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 16,
             "use_cache": False},
        ),
        _whisper,
    ),
    Entry("Wav2Vec2", "audio", _hugging_face("Wav2Vec2", "Wav2Vec2ForCTC", _WAVES), _waves),
    Entry("Hubert", "audio", _hugging_face("Hubert", "HubertForCTC", _WAVES), _waves),
    Entry(
        "AST", "audio",
        _hugging_face(
            "AST", "ASTForAudioClassification",
            {**SIZE, "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16},
        ),
        lambda: _spectrogram("input_values", 32, 16),
    ),
    Entry("CLIP", "multimodal", _two_towers("CLIP", "CLIPModel"), _image_and_text),
    Entry("Siglip", "multimodal", _two_towers("Siglip", "SiglipModel"), _image_and_text),
    Entry("Llava", "multimodal", _llava, _llava_inputs),
    Entry(
        "Perceiver", "multimodal",
        _hugging_face(
            "Perceiver", "PerceiverForMaskedLM",
            {"vocab_size": 96, "num_latents": 8, "d_latents": 32, "d_model": 24, "num_blocks": 1,
             "num_self_attends_per_block": 1, "num_self_attention_heads": 4, "num_cross_attention_heads": 4,
             "max_position_embeddings": 8, "qk_channels": 32, "v_channels": 32},
        ),
        lambda: {"inputs": _tokens()["input_ids"]},
    ),
    _plain("convolutions, 2d", "plain torch", ConvNet, 2, 3, 16, 16),
    _plain("convolutions, 1d and 3d", "plain torch", Volumes, 2, 4, 17),
    _plain("U-Net", "plain torch", UNet, 2, 3, 16, 16),
    _plain("Transformer layers", "plain torch", Transformer, 2, 6, 32),
    _plain("recurrent cells", "recurrent", Cells, 2, 4, 8),
    _recurrent("LSTM", nn.LSTM, traced=False),
    _recurrent("LSTM, allow_rnn", nn.LSTM, traced=True),
    _recurrent("GRU, allow_rnn", nn.GRU, traced=True),
    _recurrent("RNN, allow_rnn", nn.RNN, traced=True),
    Entry("Llama with LoRA", "adapters", _lora, _tokens),
    _plain("fused projections", "plain torch", FusedProjections, 2, 6, 32),
    _plain("computed weights", "plain torch", Parametrized, 2, 6, 16),
    _plain("functional_call, vmap, grad", "plain torch", Functional, 4, 16),
    _plain("graph break in a loop", "plain torch", BreaksInALoop, 4, 16, untraced=True),
)  # fmt: skip
