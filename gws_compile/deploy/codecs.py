"""How the levels of an element format lie in bytes: packing and unpacking.

Layouts of compressed-tensors 0.20 (Apache-2.0), whose loaders vLLM, SGLang and transformers share. Rows are packed one
by one, so that a part of a weight's rows can be packed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..numerics.formats import FORMATS, FloatFormat


@dataclass(frozen=True)
class Codec:
    """A layout of codes.

    Attributes:
        packed: whether a stored element is no value of its own, so that compressed-tensors calls the tensor
            ``weight_packed``.
        multiple: what the number of columns is a multiple of.
        signed_zero: whether it tells -0 from 0.
        pack: float32 levels (rows, columns) to the stored tensor, whose rows are those of the levels.
        unpack: a stored tensor and the number of columns to float32 levels.
    """

    packed: bool
    multiple: int
    signed_zero: bool
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor, int], torch.Tensor]


def _pack_float8(levels: torch.Tensor) -> torch.Tensor:
    return levels.to(torch.float8_e4m3fn)


def _unpack_float8(stored: torch.Tensor, cols: int) -> torch.Tensor:
    return stored.to(torch.float32)


def _pack_nibbles(levels: torch.Tensor) -> torch.Tensor:
    """Two e2m1 codes a byte, the even column's in the low half."""
    codes = _codes(levels, FORMATS["fp4_e2m1"])
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _unpack_nibbles(stored: torch.Tensor, cols: int) -> torch.Tensor:
    codes = torch.stack([stored & 15, stored >> 4], dim=-1).view(stored.shape[0], cols)
    return _values(codes, FORMATS["fp4_e2m1"])


def _pack_sixes(levels: torch.Tensor) -> torch.Tensor:
    """Four e2m3 codes in three bytes, little-endian, the first in the lowest bits."""
    a, b, c, d = _codes(levels, FORMATS["fp6_e2m3"]).view(levels.shape[0], -1, 4).unbind(-1)
    parts = [a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)]
    return torch.stack(parts, dim=-1).view(levels.shape[0], -1)


def _unpack_sixes(stored: torch.Tensor, cols: int) -> torch.Tensor:
    a, b, c = stored.view(stored.shape[0], -1, 3).unbind(-1)
    codes = [a & 63, (a >> 6) | ((b & 15) << 2), (b >> 4) | ((c & 3) << 4), c >> 2]
    return _values(torch.stack(codes, dim=-1).view(stored.shape[0], cols), FORMATS["fp6_e2m3"])


def _pack_integers(levels: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes ``level + 2**(bits - 1)`` in int32 words, the first column in the lowest bits; a row is filled with 0."""
    in_word = 32 // bits
    codes = levels.to(torch.int32) + 2 ** (bits - 1)
    codes = torch.nn.functional.pad(codes, (0, -levels.shape[1] % in_word)).view(levels.shape[0], -1, in_word)
    word = codes[..., 0].clone()
    for place in range(1, in_word):
        word |= codes[..., place] << (bits * place)
    return word


def _unpack_integers(stored: torch.Tensor, cols: int, bits: int) -> torch.Tensor:
    codes = [(stored >> (bits * place)) & (2**bits - 1) for place in range(32 // bits)]
    levels: torch.Tensor = torch.stack(codes, dim=-1).view(stored.shape[0], -1)[:, :cols] - (1 << (bits - 1))
    return levels.to(torch.float32)


def values_of_codes(fmt: FloatFormat) -> list[float]:
    """The values of a format's codes without the sign bit, in their order, as if none was reserved."""
    fraction = 2**fmt.mantissa_bits
    return [
        (code % fraction) * fmt.min_subnormal
        if code < fraction
        else 2.0 ** (code // fraction - fmt.bias) * (1 + code % fraction / fraction)
        for code in range(2 ** (fmt.storage_bits - 1))
    ]


@lru_cache(maxsize=8)
def _table(fmt: FloatFormat) -> torch.Tensor:
    return torch.tensor(values_of_codes(fmt), dtype=torch.float32, device="cpu")


@lru_cache(maxsize=8)
def _code_of_multiple(fmt: FloatFormat) -> torch.Tensor:
    """uint8: the code of each multiple of the smallest value; 0 where it has none."""
    multiples = (_table(fmt) / fmt.min_subnormal).to(torch.int64)
    codes = torch.zeros(int(multiples[-1]) + 1, dtype=torch.uint8, device="cpu")
    codes[multiples] = torch.arange(len(multiples), dtype=torch.uint8, device="cpu")
    return codes


def _codes(levels: torch.Tensor, fmt: FloatFormat) -> torch.Tensor:
    multiples = (levels.abs() / fmt.min_subnormal).to(torch.int32)
    codes: torch.Tensor = _code_of_multiple(fmt).to(levels.device)[multiples]
    return codes | (levels.signbit().to(torch.uint8) << (fmt.storage_bits - 1))


def _values(codes: torch.Tensor, fmt: FloatFormat) -> torch.Tensor:
    table = _table(fmt).to(codes.device)
    values: torch.Tensor = torch.cat([table, -table])[codes.to(torch.int32)]
    return values


FLOAT8 = Codec(False, 1, True, _pack_float8, _unpack_float8)
NIBBLES = Codec(True, 2, True, _pack_nibbles, _unpack_nibbles)
SIXES = Codec(True, 4, True, _pack_sixes, _unpack_sixes)
INT4 = Codec(True, 1, False, lambda q: _pack_integers(q, 4), lambda stored, cols: _unpack_integers(stored, cols, 4))
INT8 = Codec(True, 1, False, lambda q: _pack_integers(q, 8), lambda stored, cols: _unpack_integers(stored, cols, 8))
