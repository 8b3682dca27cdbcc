"""What cannot be exported says so, before anything is written, and names weight, setting and remedy."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from support.exports import evaluated, export_layer
from support.models import gpt2, llama
from support.small_models import Net, OneLayer
from torch import nn

import gws_compile

pytestmark = pytest.mark.usefixtures("reset")


def exported(weight: torch.Tensor, folder, format=None, **settings) -> None:
    export_layer(weight, folder / "out", format, **settings)


@pytest.mark.parametrize(
    ("settings", "format", "shape", "message"),
    [
        (
            {"fmt": "fp8_e5m2"}, "mxfp8", (32, 32),
            "fc.weight, trained in fp8_e5m2 32 x 32 with scale='floor': mxfp8 has codes of fp8_e4m3, which do not hold "
            "fp8_e5m2. Train with fmt='mxfp8', leave the weight alone by a rule, or export with format=\"dense\"",
        ),
        (
            {"fmt": "mxfp8"}, "fp8_block", (256, 256),
            "fc.weight, trained in mxfp8 32 x 32 with scale='floor': a group of fp8_block, 128 x 128, does not lie "
            "inside a block of training, 32 x 32. It fits into: mxfp8. Export with one of these, or train with "
            "fmt='fp8_block'",
        ),
        (
            {"fmt": "mxfp8"}, "mxfp8", (32, 80),
            "fc.weight, trained in mxfp8 32 x 32 with scale='floor': mxfp8 needs a multiple of 32 columns, and it has",
        ),
        (
            {"fmt": "fp8_channel"}, "mxfp8", (32, 64),
            "fc.weight, trained in fp8_channel row with scale='amax': mxfp8 has scales that are powers of two, and "
            "these are of scale='amax'. It fits into: fp8_channel. Export",
        ),
        (
            {"fmt": "int4_group"}, "int4", (32, 200),
            "int4 needs a number of columns that its groups of 128 divide, and it has 200",
        ),
        ({"fmt": "mxfp8"}, "fp8", (32, 32), "format must be one of None, 'mxfp4', 'nvfp4', 'int4', 'mxfp6'"),
        ({"fmt": "mxfp8"}, "gguf", (32, 32), "format='gguf' is that of a Hugging Face model, and this is a Layer"),
    ],
)  # fmt: skip
def test_a_weight_that_does_not_fit(settings, format, shape, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        exported(torch.randn(shape), tmp_path, format, **settings)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_torchao_has_no_tensor_for(tmp_path):
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match=r"no weight can be packed, so nothing low-bit comes out: fc.weight:"):
        exported(torch.randn(64, 64), tmp_path, "torchao", fmt="mxfp8")
    assert list(tmp_path.iterdir()) == []


def test_torchao_that_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    for name in [name for name in sys.modules if name.startswith("torchao.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r'format="torchao" needs torchao: pip install torchao'):
        exported(torch.randn(64, 64), tmp_path, "torchao", fmt="fp8_tensor")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    "settings",
    [
        {"fmt": "mxfp8"},
        {"fmt": "nvfp4"},
        {"fmt": "int4_group"},
        {"fmt": "fp8_e4m3", "scale": None},
        {"fmt": "fp4_e2m1", "block": (16, 16)},
    ],
)
def test_values_that_are_no_numbers(settings, value, tmp_path):
    w = torch.randn(32, 32)
    w[3, 4] = value
    with pytest.raises(ValueError, match=r"fc.weight has 1 element that is NaN or Inf: no engine can use it"):
        exported(w, tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_scales_of_nvfp4_that_are_too_far_apart(tmp_path):
    w = torch.randn(32, 32)
    w[:16, :16] *= 2.0**-20
    with pytest.raises(ValueError) as caught:
        exported(w, tmp_path, "nvfp4", fmt="fp4_e2m1", block=(16, 16))
    assert "the scales of nvfp4 blocks span 19 binades in fc.weight, from 2**" in str(caught.value)
    assert "can span 17. Train with fmt='nvfp4', whose scales have two levels" in str(caught.value)


def test_widths_that_are_still_learned(tmp_path):
    backend = gws_compile.backend(bits=gws_compile.LearnedBits(), inner="eager")
    model = OneLayer(32, 32)
    backend.prepare(model, torch.ones(1, 32))
    compiled, _ = evaluated(backend, model, torch.ones(1, 32))
    with pytest.raises(ValueError, match=r"the bit widths of fc.weight are still learned .* freeze_bits"):
        backend.export(compiled, tmp_path / "out")


def test_a_model_that_the_backend_has_not_seen(tmp_path):
    backend = gws_compile.backend("mxfp8", inner="eager")
    with pytest.raises(ValueError, match=r"no weight of this OneLayer has been rewritten by this backend.*prepare"):
        backend.export(OneLayer(), tmp_path / "out")


def test_a_model_of_which_nothing_is_rewritten(tmp_path):
    backend = gws_compile.backend("mxfp8", inner="eager", exclude="*")
    with pytest.warns(gws_compile.GwsWarning, match="no weight has been rewritten"):
        compiled, _ = evaluated(backend, OneLayer(), torch.ones(1, 40))
    with pytest.raises(ValueError, match="no weight of this OneLayer has been rewritten"):
        backend.export(compiled, tmp_path / "out")


def test_a_place_that_is_taken(tmp_path):
    w = torch.randn(32, 32)
    (tmp_path / "out").mkdir()
    exported(w, tmp_path, fmt="mxfp8")  # an empty folder is none
    with pytest.raises(
        FileExistsError, match="out is there and is not empty: give export\\(\\) a folder that does not"
    ):
        exported(w, tmp_path, fmt="mxfp8")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file is a file"):
        export_layer(w, tmp_path / "file", fmt="mxfp8")
    with pytest.raises(FileNotFoundError, match="there is no such folder to write x into"):
        export_layer(w, tmp_path / "none" / "x", fmt="mxfp8")


def test_nothing_can_be_packed_and_no_format_was_asked_for(tmp_path):
    with pytest.warns(gws_compile.GwsWarning, match="no weight can be packed, so nothing low-bit comes out: fc.weight"):
        exported(torch.randn(32, 32), tmp_path, fmt="bf16")
    loaded = gws_compile.load_export(tmp_path / "out")["fc.weight"]
    assert loaded.dtype == torch.float32


def test_a_table_that_is_looked_up_and_multiplied_by(tmp_path):
    class OneTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(32, 32)

        def forward(self, x):
            return nn.functional.linear(self.table(x), self.table.weight)

    backend = gws_compile.backend("mxfp8", inner="eager", include="*")
    compiled, _ = evaluated(backend, OneTable(), torch.tensor([3]))
    with pytest.raises(ValueError, match=r"table.weight is an embedding table, which is looked up as it is, and mul"):
        backend.export(compiled, tmp_path / "out")


def test_a_weight_that_two_graphs_treat_in_two_ways(tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x, *, plain: bool):
            return self.fc(x) if plain else nn.functional.linear(x, self.fc.weight.tanh())

    backend = gws_compile.backend("mxfp8", inner="eager")
    compiled = torch.compile(Two(), backend=backend)
    with torch.no_grad():
        compiled(torch.ones(1, 32), plain=True)
        compiled(torch.ones(1, 32), plain=False)
    with pytest.raises(ValueError, match=r"fc.weight is cast in one graph and left alone in another \(computed with"):
        backend.export(compiled, tmp_path / "out")


def test_siblings_that_engines_fuse(tmp_path):
    backend = gws_compile.backend("mxfp8", inner="eager", rules=[("*k_proj*", "mxfp4")])
    model = llama()
    compiled, _ = evaluated(backend, model, torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError) as caught:
        backend.export(compiled, tmp_path / "out")
    assert str(caught.value) == (
        "engines fuse these weights into one matrix, which has one format, and they are stored as: "
        "model.layers.0.self_attn.k_proj.weight mxfp4, model.layers.0.self_attn.q_proj.weight mxfp8, "
        "model.layers.0.self_attn.v_proj.weight mxfp8. Give them one rule, or export with a format that holds them "
        'all, or with format="dense"'
    )
    backend.export(compiled, tmp_path / "out", "mxfp8")


def test_a_tokenizer_beside_a_plain_module(tmp_path):
    backend = gws_compile.backend("mxfp8", inner="eager")
    compiled, _ = evaluated(backend, OneLayer(32, 32), torch.ones(1, 32))
    with pytest.raises(ValueError, match="tokenizer= goes into the folder of a Hugging Face model, and this is a OneL"):
        backend.export(compiled, tmp_path / "out", tokenizer=object())


def test_gguf_of_another_architecture(tmp_path):
    backend = gws_compile.backend("mxfp4", inner="eager")
    compiled, _ = evaluated(backend, gpt2().eval(), torch.tensor([[1, 2, 3]]))
    with pytest.raises(
        ValueError, match=r"takes models shaped like Llama \(llama, mistral, qwen2, qwen3\), and this is"
    ):
        backend.export(compiled, tmp_path / "x.gguf", "gguf")


def test_what_is_written_wrong_is_found_out(tmp_path, monkeypatch):
    """The check that reads the file again fails where the file is wrong, and nothing is left behind."""
    from gws_compile.deploy import folder

    write = folder.save_file

    def broken(tensors, path, metadata):
        tensors["fc.weight_scale"][0, 0] += 1
        write(tensors, path, metadata)

    monkeypatch.setattr(folder, "save_file", broken)
    with pytest.raises(ValueError, match=r"fc.weight: what was written as mxfp8 does not decode to what the compiled"):
        exported(torch.randn(32, 32), tmp_path, fmt="mxfp8")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time, torch
import gws_compile
from gws_compile.deploy import folder
write = folder.save_file
def slow(*args, **kwargs):
    write(*args, **kwargs)
    print("written", flush=True)
    time.sleep(60)
folder.save_file = slow
model = torch.nn.Sequential(torch.nn.Linear(32, 32))
backend = gws_compile.backend("mxfp8", inner="eager")
backend.prepare(model, torch.ones(1, 32))
backend.export(model, sys.argv[1])
"""


def test_a_killed_export_leaves_no_half_checkpoint(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert [path.name.startswith(".out.partial-") for path in tmp_path.iterdir()] == [True]


def test_a_folder_that_is_none_of_an_export(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"gws_export.json: there is none, so .* is no folder of Backend.export"
    ):
        gws_compile.load_export(tmp_path)
    exported(torch.randn(32, 32), tmp_path, fmt="mxfp8")
    manifest = tmp_path / "out" / "gws_export.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="has version 2, and this gws_compile reads 1"):
        gws_compile.load_export(tmp_path / "out")


def test_a_net_of_odd_sizes_is_dense_with_reasons(tmp_path):
    backend = gws_compile.backend("mxfp8", inner="eager")
    compiled, _ = evaluated(backend, Net(), torch.ones(1, 40))
    with pytest.warns(gws_compile.GwsWarning, match="up.weight: mxfp8 needs a multiple of 32 columns, and it has 40"):
        report = backend.export(compiled, tmp_path / "out")
    assert report.format == "dense"
    assert [weight.reason for weight in report.weights] == [
        "mxfp8 needs a multiple of 32 columns, and it has 40",
        "mxfp8 needs a multiple of 32 columns, and it has 72",
    ]
