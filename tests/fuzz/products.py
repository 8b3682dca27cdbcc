"""Spellings of a product with a weight: operands by position and by keyword, functions, methods and operators.

The same function is called in the model, with the parameter, and in the oracle, with what the read is to multiply by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BATCH, TOKENS, FEATURES = 2, 4, 12
"""Shape of every activation between two parts."""


@dataclass(frozen=True)
class Product:
    """A product.

    Attributes:
        compute: of the activation, (2, 4, 12), the weight, and a bias of 12; the result has 12 features.
        shape: the weight's.
    """

    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    shape: tuple[int, ...] = (FEATURES, FEATURES)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, FEATURES)


def _batched(w: torch.Tensor) -> torch.Tensor:
    return w[None].expand(BATCH, -1, -1)


def _grouped(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Torch traces it for bfloat16 alone, and for rows of 16 bytes."""
    rows = F.pad(_rows(x), (0, 4)).bfloat16()
    y = F.grouped_mm(rows, w.bfloat16(), offs=torch.tensor([3, BATCH * TOKENS], dtype=torch.int32))
    return y[:, :FEATURES].to(x.dtype)


def _vector(x: torch.Tensor) -> torch.Tensor:
    return x[0, 0]


BY_POSITION = {
    "linear": Product(lambda x, w, b: F.linear(x, w)),
    "linear, bias": Product(lambda x, w, b: F.linear(x, w, b)),
    "matmul": Product(lambda x, w, b: torch.matmul(x, w)),
    "operator": Product(lambda x, w, b: x @ w.T),
    "operator, weight first": Product(lambda x, w, b: (w @ x.mT).mT),
    "mm": Product(lambda x, w, b: torch.mm(_rows(x), w.t())),
    "mm, weight first": Product(lambda x, w, b: torch.mm(w, _rows(x).t()).t()),
    "method": Product(lambda x, w, b: _rows(x).mm(w)),
    "bmm": Product(lambda x, w, b: torch.bmm(x, _batched(w))),
    "addmm": Product(lambda x, w, b: torch.addmm(b, _rows(x), w)),
    "addmm method": Product(lambda x, w, b: b.addmm(_rows(x), w, beta=0.5)),
    "baddbmm": Product(lambda x, w, b: torch.baddbmm(b, x, _batched(w))),
    "addbmm": Product(lambda x, w, b: x + torch.addbmm(b, x, _batched(w))),
    "mv": Product(lambda x, w, b: torch.mv(w, _vector(x))),
    "addmv": Product(lambda x, w, b: torch.addmv(b, w, _vector(x))),
    "inner": Product(lambda x, w, b: torch.inner(x, w)),
    "tensordot": Product(lambda x, w, b: torch.tensordot(x, w, dims=([2], [1]))),
    "bilinear": Product(lambda x, w, b: F.bilinear(x, x, w, b), (FEATURES, FEATURES, FEATURES)),
    "einsum": Product(lambda x, w, b: torch.einsum("bti,oi->bto", x, w)),
    "einsum, weight first": Product(lambda x, w, b: torch.einsum("oi,bti->bto", w, x)),
    "multi_dot": Product(lambda x, w, b: torch.linalg.multi_dot([_rows(x), w, w.t()])),
    "twice": Product(lambda x, w, b: (x @ w).tanh() @ w.t()),
    "grouped_mm, bfloat16": Product(lambda x, w, b: _grouped(x, w), (2, 16, 16)),
    "vmap": Product(lambda x, w, b: torch.vmap(lambda rows: rows @ w)(x)),
    "vmap over rows": Product(lambda x, w, b: torch.vmap(lambda row: torch.mv(w, row))(_rows(x))),
}

BY_KEYWORD = {
    "linear, weight=": Product(lambda x, w, b: F.linear(x, weight=w)),
    "linear, all keywords": Product(lambda x, w, b: F.linear(weight=w, bias=b, input=x)),
    "matmul, other=": Product(lambda x, w, b: torch.matmul(x, other=w)),
    "matmul, input=": Product(lambda x, w, b: torch.matmul(other=x.mT, input=w).mT),
    "matmul method, other=": Product(lambda x, w, b: x.matmul(other=w)),
    "linalg.matmul": Product(lambda x, w, b: torch.linalg.matmul(x, w)),
    "linalg.matmul, other=": Product(lambda x, w, b: torch.linalg.matmul(input=x, other=w)),
    "mm, mat2=": Product(lambda x, w, b: torch.mm(_rows(x), mat2=w)),
    "mm, input=": Product(lambda x, w, b: torch.mm(input=w, mat2=_rows(x).t()).t()),
    "bmm, mat2=": Product(lambda x, w, b: torch.bmm(x, mat2=_batched(w))),
    "addmm, mat2=": Product(lambda x, w, b: torch.addmm(b, mat1=_rows(x), mat2=w)),
    "addmm, input=": Product(lambda x, w, b: torch.addmm(input=b, mat1=_rows(x), mat2=w, alpha=0.5)),
    "baddbmm, batch2=": Product(lambda x, w, b: torch.baddbmm(b, batch1=x, batch2=_batched(w))),
    "mv, input=": Product(lambda x, w, b: torch.mv(input=w, vec=_vector(x))),
    "addmv, mat=": Product(lambda x, w, b: torch.addmv(b, mat=w, vec=_vector(x))),
    "inner, other=": Product(lambda x, w, b: torch.inner(x, other=w)),
    "tensordot, b=": Product(lambda x, w, b: torch.tensordot(a=x, b=w, dims=([2], [1]))),
    "bilinear, weight=": Product(lambda x, w, b: F.bilinear(x, x, weight=w), (FEATURES, FEATURES, FEATURES)),
    "einsum, sublists": Product(lambda x, w, b: torch.einsum(x, [0, 1, 2], w, [3, 2], [0, 1, 3])),
    "einsum, sublists, weight first": Product(lambda x, w, b: torch.einsum(w, [3, 2], x, [0, 1, 2], [0, 1, 3])),
}

EXPERTS = {
    "bmm": lambda x, w: torch.bmm(x, w),
    "bmm, transposed": lambda x, w: torch.bmm(x, w.transpose(1, 2)),
    "bmm, mat2=": lambda x, w: torch.bmm(input=x, mat2=w),
    "matmul": lambda x, w: (x[:, None] @ w).mean(1),
    "baddbmm": lambda x, w: torch.baddbmm(x, x, w, beta=0.5),
    "einsum": lambda x, w: torch.einsum("eti,eio->eto", x, w),
    "einsum, all": lambda x, w: torch.einsum("bti,eoi->bto", x, w),
    "unbound": lambda x, w: torch.stack([one @ weight for one, weight in zip(x.unbind(), w.unbind(), strict=True)]),
    "indexed": lambda x, w: x @ w[0] + x @ w[1],
}
"""Of the activation and a weight (2, 12, 12)."""

SLICES = {
    "chunk": lambda w: w.chunk(3)[1],
    "split": lambda w: w.split(FEATURES)[2],
    "split sizes": lambda w: torch.split(w, [6, 12, 18])[1],
    "narrow": lambda w: w.narrow(0, 5, FEATURES),
    "slice": lambda w: w[4:16],
    "strided slice": lambda w: w[::3],
    "transposed": lambda w: w.t()[:, 12:24].t(),
    "unbind": lambda w: w.view(3, FEATURES, FEATURES).unbind()[0],
    "select": lambda w: w.reshape(3, FEATURES, FEATURES)[1],
    "unflatten": lambda w: w.unflatten(0, (3, FEATURES))[2],
    "permute": lambda w: w.view(3, FEATURES, FEATURES).permute(2, 1, 0)[:, :, 0],
    "clone": lambda w: w[:12].clone(),
    "contiguous": lambda w: w.t()[:, :12].contiguous(),
    "flip": lambda w: w[24:].flip(0),
    "tensor_split": lambda w: w.tensor_split(3)[0],
    "repeat": lambda w: w[:6].repeat(2, 1),
}
"""Of a weight (36, 12), a part of it, (12, 12)."""

JOINS = {
    "cat": lambda x, v, w: F.linear(x, torch.cat([v, w])).view(BATCH, TOKENS, 2, FEATURES).sum(2),
    "cat dim": lambda x, v, w: F.linear(torch.cat([x, x.tanh()], -1), torch.cat([v, w], dim=1)),
    "cat keywords": lambda x, v, w: F.linear(torch.cat([x, x], 2), torch.cat(tensors=[v, w], dim=1)),
    "stack": lambda x, v, w: torch.bmm(x, torch.stack([v, w])),
    "vstack": lambda x, v, w: F.linear(x, torch.vstack([v, w])[6:18]),
    "hstack": lambda x, v, w: F.linear(torch.cat([x, x], -1), torch.hstack([v, w])),
    "cat of parts": lambda x, v, w: F.linear(x, torch.cat([v[:4], w[4:]])),
    "cat of three": lambda x, v, w: F.linear(x, torch.cat([v, w, v]))[..., 12:24],
}
"""Of the activation and two weights (12, 12)."""

NUMBERS = {"number": lambda w, gain: w * 0.5, "number first": lambda w, gain: 0.5 * w}

GAINS = {
    "gain": lambda w, gain: w * gain,
    "gain first": lambda w, gain: gain * w,
    "mul": lambda w, gain: torch.mul(w, gain),
    "method": lambda w, gain: w.mul(gain),
    "transposed": lambda w, gain: (w.t() * gain).t(),
    "twice": lambda w, gain: w * gain * 2.0,
}
"""Of a weight and a gain of one element."""

COMPUTED = {
    "masked": lambda w, v, mask: w * mask,
    "where": lambda w, v, mask: torch.where(mask > 0, w, torch.zeros_like(w)),
    "masked_fill": lambda w, v, mask: w.masked_fill(mask == 0, 0.0),
    "tril": lambda w, v, mask: w.tril(),
    "normed": lambda w, v, mask: w / w.norm(dim=1, keepdim=True),
    "added": lambda w, v, mask: w + v,
    "rows scaled": lambda w, v, mask: w * v[:, :1],
    "product": lambda w, v, mask: w + 0.5 * (v[:, :3] @ w[:3]),
}
"""Of a weight, another one and a mask: computed with before it is read, and so left alone."""
