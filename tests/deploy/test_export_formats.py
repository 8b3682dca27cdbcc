"""Every container, byte for byte: against the cast, and against compressed-tensors' own compressors."""

import importlib.metadata

import pytest
import torch
from support.exports import export_layer, hard_weight, read_json, same_bits, without_minus_zero

import gws_compile

pytestmark = pytest.mark.usefixtures("reset")

CASES = [
    ("mxfp8", {"fmt": "mxfp8"}),
    ("mxfp8", {"fmt": "fp6_e3m2"}),
    ("mxfp8", {"fmt": "mxfp8", "scale": "ceil"}),
    ("mxfp8", {"fmt": "e4m3b8x224"}),
    ("mxfp8", {"fmt": "int5", "scale": "floor"}),
    ("mxfp8", {"fmt": "fp8_e4m3", "scale": None}),
    ("mxfp8", {"fmt": "fp8_e4m3", "block": (None, None), "scale": "floor"}),
    ("mxfp4", {"fmt": "mxfp4"}),
    ("mxfp4", {"fmt": "e1m1"}),
    ("mxfp4", {"fmt": "int3", "scale": "floor", "block": (1, 32)}),
    ("mxfp6", {"fmt": "mxfp6"}),
    ("mxfp6", {"fmt": "int4", "scale": "ceil", "block": (7, 96)}),
    ("nvfp4", {"fmt": "nvfp4"}),
    ("nvfp4", {"fmt": "fp4_e2m1", "block": (16, 16)}),
    ("nvfp4", {"fmt": "fp4_e2m1"}),
    ("fp8_channel", {"fmt": "fp8_channel"}),
    ("fp8_channel", {"fmt": "fp8_tensor"}),
    ("fp8_channel", {"fmt": "e3m2", "block": (4, None), "scale": "amax"}),
    ("fp8_tensor", {"fmt": "fp8_tensor"}),
    ("fp8_block", {"fmt": "fp8_block"}),
    ("fp8_block", {"fmt": "fp8_e4m3", "block": (256, 128), "scale": "floor"}),
    ("int4", {"fmt": "int4_group"}),
    ("int4", {"fmt": "int4_group", "block": (1, 32)}),
    ("int4", {"fmt": "int2", "block": (3, 64)}),
    ("int8", {"fmt": "int8_channel"}),
    ("int8", {"fmt": "int6", "block": (1, 64)}),
    ("int8", {"fmt": "fp4_e2m1", "scale": "amax", "block": (1, 32)}),
]
IDS = [f"{container}-{'-'.join(map(str, settings.values()))}" for container, settings in CASES]


def quantized(w: torch.Tensor, settings: dict) -> torch.Tensor:
    """What the compiled model uses."""
    return gws_compile.quantize(w, settings["fmt"], settings.get("block"), settings.get("scale", "auto"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("container", "settings"), CASES, ids=IDS)
def test_what_is_loaded_is_what_the_model_uses(container, settings, dtype, tmp_path):
    w = hard_weight(131, 256, dtype)
    export_layer(w, tmp_path / "out", container, **settings)
    loaded = gws_compile.load_export(tmp_path / "out")["fc.weight"]
    expected = quantized(w, settings)
    assert loaded.dtype == dtype
    assert same_bits(loaded, without_minus_zero(expected) if container in ("int4", "int8") else expected)


def scheme_of(container: str, settings: dict):
    """The scheme of compressed-tensors that a Hugging Face export names, and its compressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    from gws_compile.deploy.collect import DeployedTensor, DeployedWeight
    from gws_compile.deploy.compressed_tensors import quantization_config
    from gws_compile.deploy.plan import Entry, plan

    backend = gws_compile.backend(**settings)
    weights = backend.config.weights
    weight = DeployedWeight(
        "fc.weight", weights, weights.sample_spec(torch.float32), 0, (weights.fmt,), None, False, (1, 131, 256)
    )
    tensor = DeployedTensor("fc.weight", torch.empty(131, 256), None, "weight", weight, True)
    written = quantization_config(plan([Entry("fc.weight", tensor, None, (131, 256), True)], container), ["lm_head"])
    config = QuantizationConfig.model_validate(written)
    scheme = config.config_groups["group_0"]
    return scheme, BaseCompressor.get_value_from_registry(written["format"])


def scale_of(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """The stored scale as a number."""
    scale = stored["fc.weight_scale"]
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


@pytest.mark.parametrize(("container", "settings"), CASES, ids=IDS)
def test_compressed_tensors_reads_it(container, settings, tmp_path):
    """Its own decompressor gives the cast weight; NVFP4's it computes in bfloat16."""
    w = hard_weight(131, 256)
    stored = export_layer(w, tmp_path / "out", container, **settings)
    scheme, compressor = scheme_of(container, settings)
    local = {name.removeprefix("fc."): value for name, value in stored.items()}
    loaded = compressor.decompress(local, scheme)["weight"]
    expected = quantized(w, settings)
    if settings["fmt"] == "nvfp4":
        expected = expected.bfloat16()
    expected = without_minus_zero(expected) if container in ("int4", "int8") else expected
    assert same_bits(loaded.to(expected.dtype), expected)


@pytest.mark.parametrize(("container", "settings"), CASES, ids=IDS)
def test_compressed_tensors_writes_the_same_bytes(container, settings, tmp_path):
    """Given the cast weight and the scales of training; of FP4 it drops the sign of zero."""
    w = hard_weight(131, 256)
    stored = export_layer(w, tmp_path / "out", container, **settings)
    scheme, compressor = scheme_of(container, settings)
    local = {"weight": quantized(w, settings), "weight_scale": scale_of(stored)}
    if container == "nvfp4":
        local["weight_global_scale"] = stored["fc.weight_global_scale"]
    written = compressor.compress(local, scheme)
    for name, value in written.items():
        own = stored[f"fc.{name}"]
        if name == "weight_packed" and container in ("mxfp4", "nvfp4"):
            low, high = ((own & 15), (own >> 4))
            own = torch.where(low == 8, 0, low) | (torch.where(high == 8, 0, high) << 4)
        assert same_bits(value.to(own.dtype), own), name
    assert {f"fc.{name}" for name in written} >= set(stored) - {"fc.weight_shape"}


def test_the_oracles_are_the_versions_that_were_read():
    assert importlib.metadata.version("compressed-tensors") >= "0.20"


def test_a_fresh_scale_would_not_do(tmp_path):
    """The row with 240 X: its own scale, computed anew for 1 x 32, is half of the block's, and e4m3 saturates."""
    w = hard_weight(131, 256)
    stored = export_layer(w, tmp_path / "out", "mxfp8", fmt="mxfp8")
    expected = quantized(w, {"fmt": "mxfp8"})
    assert expected[1, 0] == 240 * 2.0**-8
    anew = gws_compile.quantize(expected, "mxfp8", block=(1, 32))
    assert not torch.equal(anew, expected)
    assert stored["fc.weight_scale"][0, 0] == stored["fc.weight_scale"][1, 0] == 127 - 8


def test_the_manifest_says_how_each_is_stored(tmp_path):
    export_layer(hard_weight(131, 256), tmp_path / "out", fmt="nvfp4")
    manifest = read_json(tmp_path / "out" / "gws_export.json")
    assert manifest["packed"] == {
        "fc.weight": {
            "container": "nvfp4",
            "shape": [131, 256],
            "dtype": "float32",
            "group": [1, 16],
            "tensors": {
                "packed": "fc.weight_packed",
                "scale": "fc.weight_scale",
                "global_scale": "fc.weight_global_scale",
            },
        }
    }
    assert manifest["report"]["format"] == "nvfp4"
