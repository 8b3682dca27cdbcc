"""What of a tensor or a model lies on this rank, and with which others: DTensors, process groups, pipeline stages.

torch's distributed modules are asked only where a program has imported them: without them there is no such tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .lookup import find

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def shard_range(value: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], bool] | None:
    """What this rank holds of a DTensor; None for a plain tensor.

    Relies on ``torch.distributed.tensor._utils.compute_local_shape_and_global_offset``.
    Checked on torch 2.11 to 2.15.

    Returns:
        The local shape, its offset in the whole tensor, and whether some rank holds nothing while several hold parts.

    Raises:
        ValueError: a placement other than Shard and Replicate.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(value, DTensor):
        return None
    if not all(type(placement) in (Shard, Replicate) for placement in value.placements):
        raise ValueError(f"placements {value.placements}")
    compute = find("torch.distributed.tensor._utils", "compute_local_shape_and_global_offset")
    shape, offset = compute(value.shape, value.device_mesh, value.placements)
    return tuple(shape), tuple(offset), _empty_beside_parts(value)


def _empty_beside_parts(value: DTensor) -> bool:
    from torch.distributed.tensor import Shard

    sizes = list(value.shape)
    for ranks, placement in zip(value.device_mesh.shape, value.placements, strict=True):
        if isinstance(placement, Shard):
            size = sizes[placement.dim]
            chunk = -(-size // ranks)  # all have as much, but for the last ones
            last = max(size - chunk * (ranks - 1), 0)
            if chunk < size and last == 0:
                return True
            sizes[placement.dim] = last
    return False


def local_example(value: Any) -> torch.Tensor:
    """The fake local tensor of a fake DTensor.

    Relies on ``DTensor._local_tensor``. Checked on torch 2.11 to 2.15.
    """
    local: torch.Tensor = value._local_tensor
    return local


def maximum_over_ranks(local: torch.Tensor, weight: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """The largest of what the ranks have that hold parts of a weight; a function for graphs.

    Relies on nothing private. Checked on torch 2.11 to 2.15.

    Args:
        local: int32, this rank's values.
        weight: the DTensor.
        dims: of the weight; ranks that differ in these alone have values of the same blocks.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    assert isinstance(weight, DTensor)
    ranks = [
        Partial("max") if isinstance(placement, Shard) and placement.dim in dims else Replicate()
        for placement in weight.placements
    ]
    held = DTensor.from_local(local, weight.device_mesh, ranks, run_check=False)
    return held.redistribute(placements=[Replicate()] * len(ranks)).to_local()


def whole_tensor(value: torch.Tensor) -> torch.Tensor:
    """The whole of a DTensor, gathered by all of its ranks together; a plain tensor as it is.

    Relies on nothing private. Checked on torch 2.11 to 2.15.
    """
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor

        if isinstance(value, DTensor):
            return value.full_tensor()
    return value


def shard_groups(value: torch.Tensor) -> tuple[ProcessGroup, ...]:
    """The process groups of the mesh dims along which a DTensor is sharded; () for a plain tensor.

    Relies on what `shard_range` relies on. Checked on torch 2.11 to 2.15.
    """
    if shard_range(value) is None:
        return ()
    from torch.distributed.tensor import DTensor

    assert isinstance(value, DTensor)
    mesh = value.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(value.placements) if placement.is_shard())


def data_parallel_groups(module: object) -> tuple[ProcessGroup, ...]:
    """The process groups over which a DistributedDataParallel or FSDP2 module averages gradients; () for any other.

    Relies on ``DistributedDataParallel.process_group`` and, for FSDP2, on
    ``_get_fsdp_state()._fsdp_param_group.mesh_info``. Checked on torch 2.11 to 2.15.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return ()
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        return (module.process_group,)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        params = module._get_fsdp_state()._fsdp_param_group
        info = None if params is None else params.mesh_info
        groups = (getattr(info, name, None) for name in ("shard_process_group", "replicate_process_group"))
        return tuple(group for group in groups if group is not None)
    return ()


def pipeline_stage_index(value: object) -> int | None:
    """The stage number of a ``torch.distributed.pipelining`` stage; None for everything else.

    Relies on ``_PipelineStageBase.stage_index``, the base of ``PipelineStage`` and of the stages of a traced pipeline.
    Checked on torch 2.11 to 2.15.
    """
    if "torch.distributed.pipelining.stage" not in sys.modules:
        return None
    base = find("torch.distributed.pipelining.stage", "_PipelineStageBase")
    return int(value.stage_index) if isinstance(value, base) else None


def is_sharded(value: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, whose whole is made by all of its ranks together.

    Relies on nothing private. Checked on torch 2.11 to 2.15.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)
