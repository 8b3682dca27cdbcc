"""Exports of sharded models: the files are those of one process; all ranks learn of it, or of what went wrong."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.distributed import run_ranks
from support.small_models import Net, TwoBlocks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gws_compile

SETTINGS = {
    "mxfp8": {"fmt": "mxfp8", "block": (1, 32)},
    "nvfp4": {"fmt": "nvfp4", "block": (16, 16)},
    "powers": {"fmt": "fp4_e2m1", "block": (16, 16)},
    "channel": {"fmt": "fp8_channel"},
}


class Wide(Net):
    """A `Net` with sizes that containers divide."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)


class WideBlocks(TwoBlocks):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Wide(), Wide()


def made(settings: str) -> tuple[gws_compile.Backend, nn.Module, torch.Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    backend = gws_compile.backend(inner="aot_eager", **SETTINGS[settings])
    return backend, WideBlocks(), torch.randn(4, 64)


def one_process(folder: str, settings: str) -> str:
    backend, model, x = made(settings)
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    return str(backend.export(model, Path(folder) / "one"))


def sharded(rank: int, folder: str, settings: str, way: str) -> tuple[str, list[str]]:
    backend, model, x = made(settings)
    mesh = init_device_mesh("cpu", (2,))
    if way == "tensor":
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for block in (model.first, model.second):
            parallelize_module(block, mesh, plan)
    else:
        for module in (model.first, model.second, model):
            fully_shard(module, mesh=mesh)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(x)
    if way == "nan":
        with torch.no_grad():
            model.second.down.weight.to_local().fill_(float("nan"))
    if way == "taken":
        (Path(folder) / "ranks").write_text("")
    try:
        report = str(backend.export(compiled, Path(folder) / "ranks", shard_bytes=10_000))
    except (RuntimeError, ValueError, FileExistsError) as error:
        report = f"{type(error).__name__}: {error}"
    return report, sorted(path.name for path in Path(folder).iterdir())


def without_files(report: str) -> str:
    return report.replace("ranks", "one")


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ("powers", "fsdp"),
        ("channel", "tensor"),
        pytest.param("mxfp8", "fsdp", marks=pytest.mark.slow),
        pytest.param("nvfp4", "tensor", marks=pytest.mark.slow),
    ],
)
def test_the_files_are_those_of_one_process(settings, way, tmp_path):
    alone = one_process(str(tmp_path), settings)
    reports = run_ranks(sharded, args=(str(tmp_path), settings, way))
    assert [without_files(report) for report, _ in reports] == [alone, alone]
    wanted = load_file(tmp_path / "one" / "model.safetensors")
    files = sorted((tmp_path / "ranks").glob("*.safetensors"))
    assert len(files) > 1
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


def test_an_error_of_the_writing_rank_reaches_all(tmp_path):
    (first, left), (second, _) = run_ranks(sharded, args=(str(tmp_path), "mxfp8", "nan"))
    assert first.startswith("ValueError: second.down.weight has 8192 elements that are NaN or Inf")
    assert second.startswith("RuntimeError: the export failed on rank 0: ValueError: second.down.weight has")
    assert left == []


@pytest.mark.slow
def test_a_place_that_is_taken_is_said_on_all_ranks(tmp_path):
    (first, _), (second, _) = run_ranks(sharded, args=(str(tmp_path), "mxfp8", "taken"))
    assert first.startswith("FileExistsError:")
    assert second.startswith("RuntimeError: the export failed on rank 0: FileExistsError:")


def data_parallel(rank: int, folder: str) -> tuple[list[str], int]:
    backend, model, x = made("mxfp8")
    wrapped = nn.parallel.DistributedDataParallel(model)
    compiled = torch.compile(wrapped, backend=backend)
    with torch.no_grad():
        compiled(x)
    if rank == 1:
        torch.distributed.barrier()  # it does not wait for rank 0, nor rank 0 for it
    report = backend.export(compiled, Path(folder) / "ranks")
    if rank == 0:
        torch.distributed.barrier()
    return [weight.name for weight in report.packed], len(list(Path(folder).iterdir()))


@pytest.mark.slow
def test_rank_0_writes_what_is_not_sharded(tmp_path):
    (first, there), (second, _) = run_ranks(data_parallel, args=(str(tmp_path),))
    assert first == second == ["first.up.weight", "first.down.weight", "second.up.weight", "second.down.weight"]
    assert there == 1
    assert set(gws_compile.load_export(tmp_path / "ranks")) == set(WideBlocks().state_dict())
