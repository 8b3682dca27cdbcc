"""vLLM's own Python on exported folders: its parser of the configuration, the scheme it picks, how it decodes.

Skipped where vLLM's Python cannot be imported; no GPU is needed. Run with 0.33.
"""

import pytest
import torch
from safetensors.torch import load_file
from support.exports import evaluated, read_json
from support.models import llama
from torch import nn

import gws_compile

ROOM = "vllm.model_executor.layers.quantization"
parser = pytest.importorskip(f"{ROOM}.compressed_tensors.compressed_tensors", exc_type=ImportError)

pytestmark = pytest.mark.usefixtures("reset")

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYERS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


class Linear(nn.Linear):
    """Called as vLLM's are looked up: by a class whose name has Linear in it."""


def exported(tmp_path, **settings):
    backend = gws_compile.backend(inner="eager", **settings)
    model = llama().eval()
    compiled, _ = evaluated(backend, model, torch.tensor([[1, 2, 3]]))
    backend.export(compiled, tmp_path / "out")
    config = parser.CompressedTensorsConfig.from_config(
        read_json(tmp_path / "out" / "config.json")["quantization_config"]
    )
    config.packed_modules_mapping = FUSED
    return model, config, load_file(tmp_path / "out" / "model.safetensors")


def schemes(monkeypatch, config) -> set[str]:
    """What it makes of each layer, as it fuses them; the schemes' kernels are not made."""
    for name in [name for name in dir(parser) if name.startswith("CompressedTensorsW")]:
        monkeypatch.setattr(parser, name, lambda *args, name=name, **kwargs: name)
    monkeypatch.setattr(config, "_check_scheme_supported", lambda *args, **kwargs: True)
    found = set()
    for layer in range(2):
        for name in LAYERS:
            parts = config.get_scheme_dict(Linear(1, 1), f"model.layers.{layer}.{name}")
            found.add(
                config._get_scheme_from_parts(parts["weights"], parts["input_activations"], format=parts.get("format"))
            )
    return found


@pytest.mark.parametrize(
    ("settings", "scheme"),
    [
        ({"fmt": "mxfp8"}, {"CompressedTensorsW8A8Mxfp8"}),
        ({"fmt": "mxfp4"}, {"CompressedTensorsW4A4Mxfp4"}),
        ({"fmt": "nvfp4"}, {"CompressedTensorsW4A4Fp4"}),
        ({"fmt": "fp8_channel"}, {"CompressedTensorsW8A16Fp8"}),
        ({"fmt": "fp8_tensor"}, {"CompressedTensorsW8A16Fp8"}),
        ({"fmt": "fp8_block"}, {"CompressedTensorsW8A16Fp8"}),
        ({"fmt": "int4_group", "block": (1, 32)}, {"CompressedTensorsWNA16"}),
        ({"fmt": "int8_channel"}, {"CompressedTensorsWNA16"}),
        (
            {"fmt": "mxfp8", "rules": [("*.mlp.*", "mxfp4")]},
            {"CompressedTensorsW8A8Mxfp8", "CompressedTensorsW4A4Mxfp4"},
        ),
    ],
)
def test_the_configuration_is_one_that_it_has_a_scheme_for(settings, scheme, tmp_path, monkeypatch):
    _, config, _ = exported(tmp_path, **settings)
    assert schemes(monkeypatch, config) == scheme


def test_layers_that_stay_dense_are_ignored(tmp_path):
    _, config, _ = exported(tmp_path, fmt="mxfp8", rules=[("*.layers.1.mlp.*", None)])
    assert config.get_scheme_dict(Linear(1, 1), "model.layers.1.mlp.gate_up_proj") is None
    assert config.get_scheme_dict(Linear(1, 1), "lm_head") is None
    assert config.get_scheme_dict(Linear(1, 1), "model.layers.0.mlp.gate_up_proj") is not None


def weights(model):
    return {name: w.detach() for name, w in model.named_parameters() if name.endswith("proj.weight")}


def test_its_decoding_of_mxfp8(tmp_path):
    utils = pytest.importorskip(f"{ROOM}.utils.mxfp8_utils", exc_type=ImportError)
    model, _, stored = exported(tmp_path, fmt="mxfp8")
    for name, w in weights(model).items():
        decoded = utils.dequant_mxfp8_to_bf16(stored[name], stored[f"{name}_scale"])
        assert torch.equal(decoded, gws_compile.quantize(w, "mxfp8").bfloat16())


@pytest.mark.parametrize("settings", [{"fmt": "nvfp4"}, {"fmt": "fp4_e2m1", "block": (16, 16)}])
def test_its_decoding_of_nvfp4(settings, tmp_path):
    """With its order of operations: the stored scale times the reciprocal of the divisor."""
    utils = pytest.importorskip(f"{ROOM}.utils.nvfp4_emulation_utils", exc_type=ImportError)
    model, _, stored = exported(tmp_path, **settings)
    for name, w in weights(model).items():
        decoded = utils.dequantize_to_dtype(
            stored[f"{name}_packed"],
            stored[f"{name}_scale"].view(torch.uint8),
            1 / stored[f"{name}_global_scale"],
            torch.float32,
            swizzle=False,
        )
        expected = gws_compile.quantize(w, **settings)
        # A reciprocal, rounded, is one rounding more: none for powers of two.
        exact = settings["fmt"] != "nvfp4"
        torch.testing.assert_close(decoded, expected, rtol=0 if exact else 2**-22, atol=0)
