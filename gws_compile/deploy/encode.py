"""A weight as its container stores it: codes, and the scales of training, copied and never computed again."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..levels.nearest import cast_to_levels
from ..numerics.blocks import Block, block_counts, block_maximum, clamped
from ..ops.eager import levels_eager, sample_eager
from ..ops.parts import weight_parts
from .collect import DeployedWeight
from .containers import Container

PART_ELEMENTS = 2**18
"""Elements that are cast together: their intermediate values stay in a core's cache."""

SMALLEST_E4M3, LARGEST_E4M3 = 2.0**-9, 448.0


@dataclass(frozen=True, eq=False)
class EncodedWeight:
    """A whole weight, encoded.

    Attributes:
        codes: as the codec packs them, (matrices * rows, packed columns).
        scales: float32, X of each block of training over 2**shift, (matrices, block rows, block columns); S_b for
            NVFP4's two levels.
        encode: float32 (matrices,), S_enc of NVFP4's two levels; None for other scales.
        cast: what the compiled model uses, (matrices * rows, columns), in the dtype in which it is read; None where it
            was not to be kept.
        digest: of the cast.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    encode: torch.Tensor | None
    cast: torch.Tensor | None
    digest: int


def cast_weight(w: torch.Tensor, weight: DeployedWeight) -> torch.Tensor:
    """What the compiled model uses of a weight under ``no_grad``: shape of ``w``, in the dtype in which it is read.

    Args:
        w: the whole weight, as the model holds it.
        weight: how it is cast.
    """
    w = weight.as_read(w)
    levels, settings = weight.settings.levels, weight.settings
    if levels is not None:
        assert weight.parameter is not None
        return cast_to_levels(
            w, weight.parameter, levels.largest, weight.batch_dims, settings.block, scaled=settings.scale is not None
        )
    parts = [
        sample_eager(part.w, weight.spec, 1, part.block, learned=part.learned, maxima=part.maxima).view(-1)
        for part in weight_parts(
            w, weight.spec, weight.batch_dims, weight.settings.block, weight.parameter, PART_ELEMENTS
        )
    ]
    return torch.cat(parts).view(w.shape) if parts else w.clone()


def block_scales(w: torch.Tensor, weight: DeployedWeight) -> torch.Tensor:
    """float32: X of each block that is not all zero."""
    found = []
    w = weight.as_read(w)
    for part in weight_parts(w, weight.spec, weight.batch_dims, weight.settings.block, weight.parameter, PART_ELEMENTS):
        _, levels, x, _ = levels_eager(part.w, weight.spec, part.block, part.learned, maxima=part.maxima)
        largest = block_maximum(levels, part.block)
        found.append(x.expand(largest.shape)[largest > 0])
    return torch.cat(found)


def encode_weight(
    w: torch.Tensor, weight: DeployedWeight, container: Container, shift: int, *, keep_cast: bool = False
) -> EncodedWeight:
    """Encode a weight.

    Args:
        w: the whole weight, as the model holds it.
        weight: how it is cast.
        container: which holds it.
        shift: of `Container.shift`.
        keep_cast: keep the cast weight too, of which some rows are stored apart.
    """
    w = weight.as_read(w)
    matrices, rows, cols = weight.shape
    block = weight.settings.block
    scales = torch.empty(matrices, *block_counts(block, rows, cols), dtype=torch.float32)
    encode = torch.empty(matrices, dtype=torch.float32) if weight.spec.needs_matrix_maximum else None
    digest = Digest(w.dtype, signed_zero=container.codec.signed_zero)
    codes: list[torch.Tensor] = []
    casts: list[torch.Tensor] = []
    for part in weight_parts(w, weight.spec, weight.batch_dims, block, weight.parameter, PART_ELEMENTS):
        cast, levels, x, of_matrix = levels_eager(part.w, weight.spec, part.block, part.learned, maxima=part.maxima)
        codes.append(container.codec.pack((levels if shift == 0 else levels * 2.0**shift).view(-1, cols)))
        digest.update(cast)
        if keep_cast:
            casts.append(cast.reshape(-1, cols))
        count, height = part.w.shape[:2]
        first_block = part.start // part.block[0]
        here = scales[part.first : part.first + count, first_block : first_block - (-height // part.block[0])]
        here.copy_(x.expand(here.shape) * 2.0**-shift)
        if encode is not None and of_matrix is not None:
            encode[part.first : part.first + count] = of_matrix.view(-1)
    return EncodedWeight(torch.cat(codes), scales, encode, torch.cat(casts) if keep_cast else None, digest.value())


def stored_tensors(
    encoded: EncodedWeight,
    weight: DeployedWeight,
    container: Container,
    rows: torch.Tensor | None,
    divisor: float | None,
) -> dict[str, torch.Tensor]:
    """What is stored of some rows of a weight, by the keys of `gws_compile.deploy.layouts.SUFFIXES`.

    Args:
        encoded: the whole weight.
        weight: how it is cast.
        container: which holds it.
        rows: int64, numbers of rows among those of all matrices; all of them when None.
        divisor: what NVFP4's stored scales are divided by, for power-of-two scales; None for others.
    """
    matrices, height, cols = weight.shape
    group = container.group_of(weight.settings.block, height, cols)
    codes = encoded.codes if rows is None else encoded.codes[rows]
    whole = rows is None
    if rows is None:
        rows, matrix = torch.arange(height), torch.arange(matrices)[:, None, None]
    else:
        matrix = (rows // height)[:1] if group[0] != 1 else (rows // height)[:, None]
        rows = rows % height
    scales = _of_groups(encoded.scales, matrix, rows, weight, group).contiguous()
    stored = {"packed" if container.codec.packed else "codes": codes.contiguous()}
    if container.scale == "e8m0":
        # A block of zeros may have any scale: one of them lies below what a byte can say.
        exponent = ((scales.view(torch.int32) >> 23) & 255).clamp(1, 254)
        stored["scale"] = exponent.to(torch.uint8)
    elif container.scale == "e4m3":
        if divisor is None:
            assert encoded.encode is not None
            stored["scale"] = scales.to(torch.float8_e4m3fn)
            stored["global_scale"] = encoded.encode if whole else encoded.encode[matrix.flatten()[:1]]
        else:
            stored["scale"] = (scales * divisor).clamp(SMALLEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
            stored["global_scale"] = torch.full((matrices if whole else 1,), divisor, dtype=torch.float32)
    else:
        stored["scale"] = scales.view(-1) if group == (None, None) else scales
    if container.format == "pack-quantized":
        stored["shape"] = torch.tensor([len(codes), cols], dtype=torch.int64)
    return stored


def _of_groups(
    scales: torch.Tensor, matrix: torch.Tensor, rows: torch.Tensor, weight: DeployedWeight, group: Block
) -> torch.Tensor:
    """The scales of a file's groups, (group rows, group columns), from those of the blocks of training.

    Args:
        scales: (matrices, block rows, block columns).
        matrix: which of the matrices, of such a shape that it goes with (rows, 1).
        rows: of a matrix.
        weight: how it was trained.
        group: rows and columns that share a stored scale.
    """
    _, height, cols = weight.shape
    block, sides = clamped(weight.settings.block, height, cols), clamped(group, height, cols)
    row = rows[:: len(rows) if group[0] is None else sides[0]] // block[0]
    columns = torch.arange(0, cols, sides[1]) // block[1]
    found = scales[matrix, row[:, None], columns]
    return found.flatten(0, 1) if found.ndim == 3 else found


def decode_rows(
    stored: Mapping[str, torch.Tensor], container: Container, group: Block, shape: Sequence[int]
) -> Iterator[torch.Tensor]:
    """What a file says of a weight, some rows at a time: float32, each product of a level and its scale rounded once.

    Args:
        stored: by the keys of `gws_compile.deploy.layouts.SUFFIXES`.
        container: which holds it.
        group: rows and columns that share a stored scale, see `Container.group_of`.
        shape: (rows, columns), or with matrices in front.

    Yields:
        (rows of one matrix, columns), in their order.
    """
    *_, rows, cols = shape
    codes = stored["packed" if container.codec.packed else "codes"]
    codes = codes.view(-1, rows, codes.shape[-1])
    sides = clamped(group, rows, cols)
    scales = stored["scale"].view(len(codes), -(-rows // sides[0]), -(-cols // sides[1]))
    if container.scale == "e8m0":
        scales = (scales.to(torch.int32) << 23).view(torch.float32)  # a code of 0 would be 2**-127: none is written
    elif container.scale == "e4m3":
        scales = scales.to(torch.float32) / stored["global_scale"].view(-1, 1, 1)
    height = max(PART_ELEMENTS // max(cols, 1) // sides[0], 1) * sides[0]
    whole = cols // sides[1] * sides[1]
    for matrix, of_matrix in zip(codes, scales, strict=True):
        for start in range(0, rows, height):
            levels = container.codec.unpack(matrix[start : start + height], cols)
            scale = of_matrix[start // sides[0] : -(-(start + len(levels)) // sides[0])]
            if sides[0] > 1:
                scale = scale.repeat_interleave(sides[0], 0)[: len(levels)]
            if whole:
                head = levels[:, :whole].view(len(levels), -1, sides[1])
                head.mul_(scale[:, : whole // sides[1], None])
            if whole < cols:
                levels[:, whole:].mul_(scale[:, -1:])
            yield levels


def decode(
    stored: Mapping[str, torch.Tensor], container: Container, group: Block, shape: Sequence[int]
) -> torch.Tensor:
    """The whole of `decode_rows`, of this shape."""
    parts = list(decode_rows(stored, container, group, shape))
    return torch.cat(parts).view(tuple(shape)) if parts else torch.empty(tuple(shape), dtype=torch.float32)


class Digest:
    """A CRC-32 of a tensor's bytes, value by value in their order: several times as fast as a cryptographic hash.

    Args:
        dtype: of the values.
        signed_zero: whether -0 is told from 0.
    """

    def __init__(self, dtype: torch.dtype, *, signed_zero: bool = True) -> None:
        self._dtype, self._signed_zero = dtype, signed_zero
        self._state = 0

    def update(self, values: torch.Tensor) -> None:
        """Take in the next values."""
        values = values.detach().to(device="cpu", dtype=self._dtype)
        if not self._signed_zero and values.is_floating_point():
            values = values + 0.0  # -0 + 0 is 0
        if values.numel():
            self._state = zlib.crc32(values.reshape(-1).view(torch.uint8).numpy().data, self._state)

    def value(self) -> int:
        """The digest of what has been taken in."""
        return self._state


def digest(values: torch.Tensor, *, signed_zero: bool = True) -> int:
    """The `Digest` of one tensor."""
    made = Digest(values.dtype, signed_zero=signed_zero)
    made.update(values)
    return made.value()
