"""The ``quantization_config`` of compressed-tensors, and that of SGLang's MXFP8.

Source: ``compressed_tensors/quantization/{quant_scheme,quant_args,quant_config}.py`` of version 0.20 (Apache-2.0).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .containers import Container
from .plan import PlannedEntry, way_of

_EXPERT = re.compile(r"(?P<layer>.*\.experts)\.\d+\.")


def quantization_config(planned: Sequence[PlannedEntry], ignore: Iterable[str]) -> dict[str, Any]:
    """What ``config.json`` says of the packed weights.

    Args:
        planned: the entries of the checkpoint; their names end in ``.weight``.
        ignore: names of the linear layers that stay dense.
    """
    ways: dict[tuple[object, ...], list[PlannedEntry]] = {}
    for one in planned:
        if one.container is not None:
            ways.setdefault(way_of(one), []).append(one)
    groups = {}
    for number, members in enumerate(ways.values()):
        container = members[0].container
        assert container is not None
        # One way: by the class of the layers, as most engines look for it. Several: by name.
        targets = ["Linear"] if len(ways) == 1 else targets_of(one.entry.name for one in members)
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": _weights(container, members[0]),
            "input_activations": None,
            "output_activations": None,
            "format": container.format,
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted(set(ignore)),
        "config_groups": groups,
    }


def targets_of(names: Iterable[str]) -> list[str]:
    """Names of layers, the experts of a layer as one expression."""
    found: dict[str, None] = {}
    for name in names:
        expert = _EXPERT.match(name)
        layer = name.removesuffix(".weight")
        found[layer if expert is None else f"re:^{re.escape(expert['layer'])}\\..*"] = None
    return list(found)


def _weights(container: Container, planned: PlannedEntry) -> dict[str, Any]:
    group = planned.group
    strategy = {
        (None, None): "tensor",
        (1, None): "channel",
        (128, 128): "block",
    }.get(group, "tensor_group" if container.scale == "e4m3" else "group")
    settings: dict[str, Any] = {
        "num_bits": container.element.storage_bits,
        "type": "int" if container.format == "pack-quantized" else "float",
        "symmetric": True,
        "dynamic": False,
        "strategy": strategy,
    }
    if strategy in ("group", "tensor_group"):
        settings["group_size"] = group[1]
    if strategy == "block":
        settings["block_structure"] = [128, 128]
    stored = {"e8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}.get(container.scale)
    if stored is not None:
        settings |= {"scale_dtype": stored, "zp_dtype": stored}
    return settings


def sglang_mxfp8(ignore: Iterable[str]) -> dict[str, Any]:
    """What SGLang asks of MXFP8, whose scales are then called ``weight_scale_inv``."""
    return {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "modules_to_not_convert": sorted(set(ignore)),
    }
