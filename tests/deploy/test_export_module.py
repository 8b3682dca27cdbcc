"""Exports of plain modules: the folder, the table, `load_export`, and what stays dense."""

import copy
import json
import math

import pytest
import torch
from support.exports import evaluated, hard_weight, read_json, same_bits
from support.small_models import Net, OneLayer, TwoBlocks
from torch import nn

import gws_compile

pytestmark = pytest.mark.usefixtures("reset")


class Zoo(nn.Module):
    """A table, a convolution, experts in one tensor, linear layers, a norm, a buffer, and a tied output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(24, 64)
        self.norm = nn.LayerNorm(64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.experts = nn.Parameter(torch.randn(3, 40, 64))
        self.fc = nn.Linear(40, 64)
        self.wide = nn.Linear(64, 96, bias=False)
        self.out = nn.Linear(64, 24, bias=False)
        self.out.weight = self.table.weight
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.table(tokens))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = torch.matmul(x[:, None], self.experts.transpose(1, 2)[None]).mean(1)
        return self.out(self.fc(x)) + self.wide(self.fc(x)).sum()


def zoo(**settings) -> tuple[gws_compile.Backend, nn.Module, nn.Module]:
    model = Zoo().eval()
    backend = gws_compile.backend(inner="eager", **settings)
    compiled, _ = evaluated(backend, model, torch.arange(8).view(2, 4))
    return backend, model, compiled


def test_the_table_says_what_became_of_each_weight(tmp_path):
    backend, _, compiled = zoo(fmt="mxfp8", rules=[("wide*", "fp8_e5m2")])
    report = backend.export(compiled, tmp_path / "out")
    rows = {weight.name: weight for weight in report.weights}
    assert {name: row.container for name, row in rows.items()} == {
        "table.weight": "dense", "conv.weight": "dense", "experts": "mxfp8", "fc.weight": "dense",
        "wide.weight": "dense",
    }  # fmt: skip
    assert rows["conv.weight"].reason == "a convolution's weight: no container holds it"
    assert rows["fc.weight"].reason == "mxfp8 needs a multiple of 32 columns, and it has 40"
    assert rows["wide.weight"].reason == "no container holds fp8_e5m2 with scale='floor'"
    assert "also an embedding table (tied)" in rows["table.weight"].reason
    assert rows["experts"].bits == 8.25
    assert rows["experts"].stored_bytes == 3 * 40 * 64 * 33 // 32
    assert report.files == ("gws_export.json", "model.safetensors")
    total = sum(row.stored_bytes for row in rows.values()) + report.rest_bytes
    assert report.stored_bytes == total < (tmp_path / "out" / "model.safetensors").stat().st_size < total + 2000
    assert report.compression == pytest.approx(report.model_bytes / total)
    assert report.average_bits == 8.25
    text = str(report)
    assert "1 of 5 weights packed, 8.25 bits an element" in text
    assert f"load: gws_compile.load_export('{tmp_path / 'out'}')" in text
    assert json.loads(report.to_json())["weights"][0]["name"] == "experts"
    assert read_json(tmp_path / "out" / "gws_export.json")["report"]["stored_bytes"] == total


def test_a_state_dict_comes_back_in_any_dtype(tmp_path):
    backend, model, compiled = zoo(fmt="mxfp8")
    backend.export(compiled, tmp_path / "out")
    tokens = torch.arange(8).view(2, 4)
    with torch.no_grad():
        expected = compiled(tokens)
    fresh = Zoo().eval()
    fresh.load_state_dict(gws_compile.load_export(tmp_path / "out"))
    assert torch.equal(fresh(tokens), expected)
    half = gws_compile.load_export(tmp_path / "out", torch.bfloat16)
    assert {value.dtype for name, value in half.items() if name != "steps"} == {torch.bfloat16}
    assert half["steps"].dtype == torch.int64
    assert same_bits(half["experts"], gws_compile.quantize(model.experts.detach(), "mxfp8").bfloat16())


@pytest.mark.parametrize("fmt", ["fp8_tensor", "fp8_block", "nvfp4", "int8_channel"])
def test_experts_in_one_tensor_have_scales_of_their_own(fmt, tmp_path):
    backend, model, compiled = zoo(fmt=fmt)
    with torch.no_grad():
        model.experts *= torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    backend.export(compiled, tmp_path / "out")
    loaded = gws_compile.load_export(tmp_path / "out")["experts"]
    assert torch.equal(loaded, gws_compile.quantize(model.experts.detach(), fmt))


def test_a_tied_head_that_is_cast_is_stored_beside_its_table(tmp_path):
    backend, model, compiled = zoo(fmt="mxfp8", include="*")
    backend.export(compiled, tmp_path / "out")
    loaded = gws_compile.load_export(tmp_path / "out")
    assert torch.equal(loaded["table.weight"], model.table.weight)
    assert torch.equal(loaded["out.weight"], gws_compile.quantize(model.table.weight.detach(), "mxfp8"))


def test_blocks_that_are_compiled_one_by_one(tmp_path):
    model = TwoBlocks(72)
    model.first, model.second = Wide(), Wide()
    backend = gws_compile.backend("mxfp8", inner="eager")
    model.first.compile(backend=backend)
    model.second = torch.compile(model.second, backend=backend)  # its names have a wrapper's component
    with torch.no_grad():
        model(torch.randn(2, 64))
    report = backend.export(model, tmp_path / "out")
    assert [weight.name for weight in report.packed] == [
        "first.up.weight", "first.down.weight", "second.up.weight", "second.down.weight",
    ]  # fmt: skip
    assert "second.up.weight" in gws_compile.load_export(tmp_path / "out")


class Wide(Net):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)


def test_a_model_that_was_prepared_and_never_called(tmp_path):
    backend = gws_compile.backend("mxfp8", inner="eager")
    model = Wide()
    backend.prepare(model, torch.randn(2, 64))
    report = backend.export(model, tmp_path / "out")
    assert len(report.packed) == 2
    assert len(backend.report()) == 0  # nothing was compiled


def test_the_trained_weights_of_now_are_written(tmp_path):
    model = Wide()
    backend = gws_compile.backend("mxfp8", inner="eager")
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    backend.export(compiled, tmp_path / "out")
    with torch.no_grad():
        expected = compiled(x)
    fresh = Wide()
    fresh.load_state_dict(gws_compile.load_export(tmp_path / "out"))
    assert torch.equal(fresh(x), expected)


def test_an_exported_model_trains_on_from_where_it_was(tmp_path):
    model = Wide()
    backend = gws_compile.backend("mxfp4", inner="eager")
    compiled, expected = evaluated(backend, model, torch.ones(2, 64))
    backend.export(compiled, tmp_path / "out")
    torch._dynamo.reset()
    fresh = Wide()
    fresh.load_state_dict(gws_compile.load_export(tmp_path / "out"))
    again = gws_compile.backend("mxfp4", inner="eager")
    _, first = evaluated(again, fresh, torch.ones(2, 64))
    assert torch.equal(first, expected)
    metrics = again.metrics()
    assert all(weight.exact == 1 for weight in metrics.values())


@pytest.mark.parametrize("per_weight", [True, False])
def test_frozen_widths_go_into_what_holds_all_of_them(per_weight, tmp_path):
    settings = gws_compile.LearnedBits(init=5.0, target=3.0, min=2.0, formats=("fp4_e2m1", "fp8_e4m3"))
    backend = gws_compile.backend("fp8_e4m3", bits=settings, inner="eager")
    model = Wide()
    backend.prepare(model, torch.randn(2, 64))
    for name, parameter in backend.named_parameters():
        parameter.data.fill_(0.0 if name.startswith("up") else 1.0)
        if name.startswith("down") and not per_weight:
            parameter.data[0, 0] = 0.0
    backend.freeze_bits(per_weight=per_weight)
    compiled, expected = evaluated(backend, model, torch.ones(2, 64))
    report = backend.export(compiled, tmp_path / "out")
    up, down = report.weights
    assert up.container == "mxfp4"
    assert up.trained == "fp4_e2m1 32 x 32"
    assert down.container == "mxfp8"
    if not per_weight:
        assert down.trained == "fp4_e2m1+fp8_e4m3 32 x 32"
        widths = (3 * 1 + 5 * 5) / 6
        stored = 64 * 96 + 6 - 32 * 32 // 2
        assert down.note == f"at the widths of its blocks, {widths:.2f} bits on average, it would be {stored:,} bytes"
    fresh = Wide()
    fresh.load_state_dict(gws_compile.load_export(tmp_path / "out"))
    assert torch.equal(fresh(torch.ones(2, 64)), expected)


def test_one_scale_for_all_nvfp4_weights_of_powers_of_two(tmp_path):
    """The model's largest exponent is at 2**8; where they span too much, each weight has its own."""
    model = Wide()
    with torch.no_grad():
        model.up.weight.copy_(hard_weight(96, 64) * 2.0**-3)
        model.down.weight.copy_(hard_weight(64, 96, seed=1))
    backend = gws_compile.backend("fp4_e2m1", block=(16, 16), inner="eager")
    compiled, _ = evaluated(backend, model, torch.ones(2, 64))
    backend.export(compiled, tmp_path / "out", "nvfp4")
    stored = safe(tmp_path / "out")
    divisors = {name: value.item() for name, value in stored.items() if name.endswith("global_scale")}
    largest = max(math.frexp(w.detach().abs().max().item())[1] - 1 - 2 for w in (model.up.weight, model.down.weight))
    assert divisors == dict.fromkeys(divisors, 2.0 ** (8 - largest))
    assert stored["down.weight_scale"].float().max() == 256
    with torch.no_grad():
        model.up.weight *= 2.0**-16
    backend.export(compiled, tmp_path / "apart", "nvfp4")
    stored = safe(tmp_path / "apart")
    assert stored["up.weight_scale"].float().max() == stored["down.weight_scale"].float().max() == 256


def test_weights_of_zeros_alone(tmp_path):
    model = Wide()
    with torch.no_grad():
        model.up.weight.zero_()
        model.down.weight.copy_(hard_weight(64, 96) * torch.tensor([1.0, 2.0**-18])[torch.arange(96) // 48])
    backend = gws_compile.backend("fp4_e2m1", block=(16, 16), inner="eager")
    compiled, _ = evaluated(backend, model, torch.ones(2, 64))
    with pytest.raises(ValueError, match="the scales of nvfp4 blocks span"):
        backend.export(compiled, tmp_path / "out", "nvfp4")
    with torch.no_grad():
        model.down.weight.zero_()
    backend.export(compiled, tmp_path / "nvfp4", "nvfp4")
    loaded = gws_compile.load_export(tmp_path / "nvfp4")
    assert not loaded["up.weight"].any()
    assert not loaded["down.weight"].any()


def safe(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_several_files_have_an_index(tmp_path):
    backend, _, compiled = zoo(fmt="mxfp8")
    report = backend.export(compiled, tmp_path / "out", shard_bytes=9000)
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert set(report.files) == {*index["weight_map"].values(), "model.safetensors.index.json", "gws_export.json"}
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == report.stored_bytes
    whole = copy.deepcopy(gws_compile.load_export(tmp_path / "out"))
    backend.export(compiled, tmp_path / "one")
    one = gws_compile.load_export(tmp_path / "one")
    assert all(torch.equal(value, one[name]) for name, value in whole.items())


def test_a_layer_of_no_rows_is_written_as_it_is(tmp_path):
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.none = OneLayer(32, 32), nn.Linear(32, 0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).sum() + self.none(x).sum()

    backend = gws_compile.backend("mxfp8", inner="eager")
    compiled, _ = evaluated(backend, Empty(), torch.ones(2, 32))
    report = backend.export(compiled, tmp_path / "out")
    assert [weight.container for weight in report.weights] == ["mxfp8", "dense"]
    assert gws_compile.load_export(tmp_path / "out")["none.weight"].shape == (0, 32)
