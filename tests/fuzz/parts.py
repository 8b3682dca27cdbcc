"""The blocks that models are made of.

Each kind is a module written as people write them, and an oracle of its forward, which takes every parameter from
`Reads`: the sample for a read that gradients flow through, the cast, or the parameter itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from . import products
from .case import Part
from .products import BATCH, FEATURES, TOKENS
from .reads import Reads

VOCABULARY = 10


class Block(nn.Module):
    """One part of a model.

    Attributes:
        forms: the kind's forms.
        main: the path to the weight that another part of this kind and form may be tied to; empty for none.
        computes_buffers: forward changes buffers, so that it must not run twice.
        draws: forward draws from torch's generator.
    """

    forms: ClassVar[tuple[str, ...]] = ("",)
    main: ClassVar[str] = ""
    computes_buffers: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    broken = False

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Activations (2, 4, 12) and token numbers (2, 4) to activations."""
        if self.broken:
            torch._dynamo.graph_break()
        return self.compute(x, ids)

    def compute(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def oracle(self, x: torch.Tensor, ids: torch.Tensor, reads: Reads) -> torch.Tensor:
        """`compute` in eager torch."""
        raise NotImplementedError


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * FEATURES**-0.5)


class Linear(Block):
    """A linear layer; the form is the child's name. Output heads are left alone by default."""

    forms = ("fc", "fc, no bias", "lm_head", "module", "it's", 'a "b" [0]', "gate")

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.child = form.split(",")[0]
        self.add_module(self.child, nn.Linear(FEATURES, FEATURES, bias="no bias" not in form))

    def compute(self, x, ids):
        return getattr(self, self.child)(x)

    def oracle(self, x, ids, reads):
        fc = getattr(self, self.child)
        return F.linear(x, reads.hat(fc.weight), fc.bias)


class Mlp(Block):
    """Two linear layers."""

    forms = ("relu", "gelu", "split")
    main = "up.weight"

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.up = nn.Linear(FEATURES, 2 * FEATURES)
        self.down = nn.Linear(FEATURES if form == "split" else 2 * FEATURES, FEATURES, bias=False)

    def compute(self, x, ids):
        return self.down(self._inner(self.up(x)))

    def _inner(self, h):
        if self.form == "split":
            a, b = h.chunk(2, dim=-1)
            return a * b.sigmoid()
        return h.relu() if self.form == "relu" else F.gelu(h)

    def oracle(self, x, ids, reads):
        h = F.linear(x, reads.hat(self.up.weight), self.up.bias)
        return F.linear(self._inner(h), reads.hat(self.down.weight))


class Product(Block):
    """A parameter of the module itself in one of the spellings by position."""

    table: ClassVar[dict[str, products.Product]] = products.BY_POSITION
    forms = tuple(table)
    main = "weight"

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.weight = _parameter(*self.table[form].shape)
        self.bias = nn.Parameter(torch.randn(FEATURES))

    def compute(self, x, ids):
        return self._shaped(self.table[self.form].compute(x, self.weight, self.bias), x)

    def _shaped(self, y, x):
        return y.expand_as(x) if y.ndim == 1 else y.reshape(x.shape)

    def oracle(self, x, ids, reads):
        return self._shaped(self.table[self.form].compute(x, reads.hat(self.weight), self.bias), x)


class Keywords(Product):
    """One of the spellings by keyword."""

    table = products.BY_KEYWORD
    forms = tuple(table)


class Experts(Block):
    """A weight of three dims, a matrix for each expert."""

    forms = tuple(products.EXPERTS)
    main = "experts"

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.experts = _parameter(BATCH, FEATURES, FEATURES)

    def compute(self, x, ids):
        return products.EXPERTS[self.form](x, self.experts)

    def oracle(self, x, ids, reads):
        return products.EXPERTS[self.form](x, reads.hat(self.experts))


class Convolution(Block):
    """Convolutions over tokens, or over tokens as channels, with features as a picture or a body."""

    forms = ("1d", "1d grouped", "1d transposed", "2d", "2d grouped", "2d transposed", "3d", "1d keyword", "2d keyword")

    def __init__(self, form: str) -> None:
        super().__init__(form)
        channels = FEATURES if form.startswith("1d") else TOKENS
        groups = 2 if "grouped" in form else 1
        name = ("ConvTranspose" if "transposed" in form else "Conv") + form[:2]
        self.conv = getattr(nn, name)(channels, channels, 3, padding=1, groups=groups, bias="keyword" not in form)

    def compute(self, x, ids):
        return self._around(x, self._keyword if "keyword" in self.form else self.conv)

    def _around(self, x, convolve):
        if self.form.startswith("1d"):
            return convolve(x.transpose(1, 2)).transpose(1, 2)
        sides = (3, 2, 2) if self.form == "3d" else (3, 4)
        return convolve(x.view(BATCH, TOKENS, *sides)).view(x.shape)

    def _keyword(self, x):
        convolve = F.conv1d if self.form.startswith("1d") else F.conv2d
        return convolve(weight=self.conv.weight, input=x, padding=1)

    def oracle(self, x, ids, reads):
        conv, flat = self.conv, self.form.startswith("1d")
        kind = "conv_transpose" if "transposed" in self.form else "conv"
        function = getattr(F, kind + self.form[:2])
        weight = reads.hat(conv.weight, flat=flat)
        return self._around(x, lambda x: function(x, weight, conv.bias, padding=1, groups=conv.groups))


class Tied(Block):
    """An embedding table; with the head tied to it, and only looked up."""

    forms = ("head", "linear", "lookup")

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.table = nn.Embedding(VOCABULARY, FEATURES)
        self.back = nn.Linear(VOCABULARY, FEATURES, bias=False)
        if form == "head":
            self.decode = nn.Linear(FEATURES, VOCABULARY, bias=False)
            self.decode.weight = self.table.weight

    def compute(self, x, ids):
        x = x + self.table(ids)
        if self.form == "lookup":
            return x
        return self.back(self.decode(x) if self.form == "head" else F.linear(x, self.table.weight))

    def oracle(self, x, ids, reads):
        x = x + F.embedding(ids, self.table.weight)
        if self.form == "lookup":
            return x
        return F.linear(F.linear(x, reads.hat(self.table.weight, table=True)), reads.hat(self.back.weight))


class Attention(Block):
    """Attention of two heads over a fused projection."""

    forms = ("fused", "chunked weight", "causal", "masked")
    main = "qkv.weight"

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.qkv = nn.Linear(FEATURES, 3 * FEATURES, bias=form == "fused")
        self.proj = nn.Linear(FEATURES, FEATURES)
        self.register_buffer("mask", torch.eye(TOKENS).bool().roll(1, 0) | torch.eye(TOKENS).bool())

    def compute(self, x, ids):
        if self.form == "chunked weight":
            q, k, v = (F.linear(x, w) for w in self.qkv.weight.chunk(3))
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(self._attend(q, k, v))

    def _attend(self, q, k, v):
        q, k, v = (t.view(BATCH, TOKENS, 2, FEATURES // 2).transpose(1, 2) for t in (q, k, v))
        mask = self.mask if self.form == "masked" else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.form == "causal")
        return y.transpose(1, 2).reshape(BATCH, TOKENS, FEATURES)

    def oracle(self, x, ids, reads):
        weight = reads.hat(self.qkv.weight)
        if self.form == "chunked weight":
            q, k, v = (F.linear(x, w) for w in weight.chunk(3))
        else:
            q, k, v = F.linear(x, weight, self.qkv.bias).chunk(3, dim=-1)
        return F.linear(self._attend(q, k, v), reads.hat(self.proj.weight), self.proj.bias)


class TorchModule(Block):
    """A module of torch's own that reads several weights."""

    forms = ("attention", "attention with weights", "encoder layer", "gru cell", "lstm cell", "bilinear")

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.layer: nn.Module
        if form.startswith("attention"):
            self.layer = nn.MultiheadAttention(FEATURES, 2, batch_first=True)
        elif form == "encoder layer":
            self.layer = nn.TransformerEncoderLayer(FEATURES, 2, 20, dropout=0.0, batch_first=True)
        elif form == "bilinear":
            self.layer = nn.Bilinear(FEATURES, FEATURES, FEATURES)
        else:
            self.layer = (nn.GRUCell if form == "gru cell" else nn.LSTMCell)(FEATURES, FEATURES)

    def compute(self, x, ids):
        return self._call(x, self.layer)

    def _call(self, x, layer):
        if self.form.startswith("attention"):
            return layer(x, x, x, need_weights="weights" in self.form)[0]
        if self.form == "encoder layer":
            return layer(x)
        if self.form == "bilinear":
            return layer(x, x.tanh())
        rows = x.reshape(-1, FEATURES)
        y = layer(rows)
        return (y if self.form == "gru cell" else y[0]).view(x.shape)

    def oracle(self, x, ids, reads):
        values = {name: reads.hat(p) if p.ndim > 1 else p for name, p in self.layer.named_parameters()}
        return self._call(x, lambda *args, **kwargs: functional_call(self.layer, values, args, kwargs))


class Sliced(Block):
    """A part of a weight."""

    forms = tuple(products.SLICES)
    main = "qkv"

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.qkv = _parameter(3 * FEATURES, FEATURES)

    def compute(self, x, ids):
        return F.linear(x, products.SLICES[self.form](self.qkv))

    def oracle(self, x, ids, reads):
        return F.linear(x, products.SLICES[self.form](reads.hat(self.qkv)))


class Joined(Block):
    """Two weights that are joined before the product: each is sampled by itself."""

    forms = tuple(products.JOINS)
    main = "left"

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.left, self.right = _parameter(FEATURES, FEATURES), _parameter(FEATURES, FEATURES)

    def compute(self, x, ids):
        return products.JOINS[self.form](x, self.left, self.right)

    def oracle(self, x, ids, reads):
        return products.JOINS[self.form](x, reads.hat(self.left), reads.hat(self.right))


class Scaled(Block):
    """A weight times a number or a gain of one element: its sample is scaled."""

    forms = (
        "number, unused",
        "number first, unused",
        *(f"{how}, {what}" for how in products.GAINS for what in ("parameter", "(1,) parameter", "buffer")),
    )
    main = "weight"

    def __init__(self, form: str) -> None:
        super().__init__(form)
        how, what = form.split(", ")
        self.scale = (products.NUMBERS | products.GAINS)[how]
        self.weight = _parameter(FEATURES, FEATURES)
        gain = torch.full((1,) if "(1,)" in what else (), 1.25)
        if what == "buffer":
            self.register_buffer("gain", gain)
        else:
            self.gain = nn.Parameter(gain)

    def compute(self, x, ids):
        return F.linear(x, self.scale(self.weight, self.gain))

    def oracle(self, x, ids, reads):
        return F.linear(x, self.scale(reads.hat(self.weight), self.gain))


class Computed(Block):
    """A weight that is computed of parameters, masked ones too: left alone."""

    forms = tuple(products.COMPUTED)

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.weight, self.other = _parameter(FEATURES, FEATURES), _parameter(FEATURES, FEATURES)
        self.register_buffer("mask", (torch.rand(FEATURES, FEATURES) > 0.3).to(torch.float32))

    def compute(self, x, ids):
        return F.linear(x, products.COMPUTED[self.form](self.weight, self.other, self.mask))

    oracle = lambda self, x, ids, reads: self.compute(x, ids)  # noqa: E731


class Lora(Block):
    """A frozen base with adapters beside it, or merged into it, and then left alone."""

    forms = ("beside", "merged", "beside, matmul")

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.base = nn.Linear(FEATURES, FEATURES)
        self.base.weight.requires_grad_(False)
        self.lora_a, self.lora_b = _parameter(3, FEATURES), _parameter(FEATURES, 3)

    def compute(self, x, ids):
        if self.form == "merged":
            return F.linear(x, self.base.weight + 2 * (self.lora_b @ self.lora_a), self.base.bias)
        if self.form == "beside":
            return self.base(x) + 2 * F.linear(F.linear(x, self.lora_a), self.lora_b)
        return self.base(x) + x @ self.lora_a.T @ self.lora_b.T

    def oracle(self, x, ids, reads):
        if self.form == "merged":
            return self.compute(x, ids)
        y = F.linear(x, reads.hat(self.base.weight), self.base.bias)
        a, b = reads.hat(self.lora_a), reads.hat(self.lora_b)
        return y + 2 * F.linear(F.linear(x, a), b) if self.form == "beside" else y + x @ a.T @ b.T


class BatchNorm(Block):
    """A linear layer and a batch norm, whose statistics are buffers."""

    computes_buffers = True

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.fc, self.norm = nn.Linear(FEATURES, FEATURES, bias=False), nn.BatchNorm1d(FEATURES)

    def compute(self, x, ids):
        return self.norm(self.fc(x).reshape(-1, FEATURES)).view(x.shape)

    def oracle(self, x, ids, reads):
        y, norm = F.linear(x, reads.hat(self.fc.weight)).reshape(-1, FEATURES), self.norm
        mean, variance = reads.buffer(norm.running_mean), reads.buffer(norm.running_var)
        return F.batch_norm(y, mean, variance, norm.weight, norm.bias, norm.training, 0.1, 1e-5).view(x.shape)


class Dropout(Block):
    """A linear layer between two masks of torch's generator, which is left to the model."""

    forms = ("module", "function")
    main = "fc.weight"
    draws = True

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.fc, self.drop = nn.Linear(FEATURES, FEATURES), nn.Dropout(0.3)

    def compute(self, x, ids):
        return self._dropped(self.fc(self.drop(x)))

    def _dropped(self, y):
        return F.dropout(y, 0.5, self.training) if self.form == "function" else y

    def oracle(self, x, ids, reads):
        return self._dropped(F.linear(self.drop(x), reads.hat(self.fc.weight), self.fc.bias))


class Detached(Block):
    """Reads of a detached weight, alone and beside one that trains it: the cast."""

    forms = ("detach", "data", "both", "detach of a view", "view of a detached", "joined")

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.weight = _parameter(FEATURES, FEATURES)

    def compute(self, x, ids):
        w = self.weight
        if self.form == "data":
            return F.linear(x, w.data)
        if self.form == "both":
            return F.linear(x, w) - 0.5 * F.linear(x, w.detach()).tanh()
        if self.form == "detach of a view":
            return x @ w.t().detach()
        if self.form == "view of a detached":
            return x @ w.detach().t()
        if self.form == "joined":
            return F.linear(x, torch.cat([w[:6], w[6:].detach()]))
        return F.linear(x, w.detach())

    def oracle(self, x, ids, reads):
        cast = reads.cast(self.weight)
        if self.form == "both":
            return F.linear(x, reads.hat(self.weight)) - 0.5 * F.linear(x, cast).tanh()
        if self.form in ("detach of a view", "view of a detached"):
            return x @ cast.t()
        if self.form == "joined":
            return F.linear(x, torch.cat([reads.hat(self.weight)[:6], cast[6:]]))
        return F.linear(x, cast)


class Region(Block):
    """A region without gradients inside the part: a teacher of the same weights, or of others."""

    forms = ("same weight", "other weight", "set_grad_enabled", "decorator", "enabled inside", "break inside")

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.student, self.teacher = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)

    def compute(self, x, ids):
        if self.form == "decorator":
            return self.student(x) - self._target(x)
        if self.form == "set_grad_enabled":
            with torch.set_grad_enabled(False):
                target = self.teacher(x)
            return self.student(x) - target
        with torch.no_grad():
            if self.form == "break inside":
                torch._dynamo.graph_break()
            target = (self.student if self.form == "same weight" else self.teacher)(x)
            if self.form == "enabled inside":
                with torch.enable_grad():
                    target = target * self.student(x)
        return target if self.form == "enabled inside" else self.student(x) - target

    @torch.no_grad()
    def _target(self, x):
        return self.teacher(x)

    def oracle(self, x, ids, reads):
        student, teacher = self.student, self.teacher
        with torch.no_grad():
            layer = student if self.form == "same weight" else teacher
            target = F.linear(x, reads.hat(layer.weight), layer.bias)
            if self.form == "enabled inside":
                with torch.enable_grad():
                    return target * F.linear(x, reads.hat(student.weight), student.bias)
        return F.linear(x, reads.hat(student.weight), student.bias) - target


class Converted(Block):
    """A weight that the module casts itself, and a position table that no product reads."""

    forms = ("float", "to float32", "type_as", "bfloat16", "position")

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.weight, self.position = _parameter(FEATURES, FEATURES), _parameter(TOKENS, FEATURES)

    def compute(self, x, ids):
        return self._compute(x, self.weight)

    def _compute(self, x, w):
        if self.form == "float":
            return F.linear(x.float(), w.float()).to(x.dtype)
        if self.form == "to float32":
            return F.linear(x.to(torch.float32), w.to(torch.float32)).to(x.dtype)
        if self.form == "bfloat16":
            return F.linear(x.bfloat16(), w.bfloat16()).to(x.dtype)
        return F.linear(x + self.position if self.form == "position" else x, w.type_as(x))

    def oracle(self, x, ids, reads):
        return self._compute(x, reads.hat(self.weight))


KINDS: dict[str, type[Block]] = {
    "linear": Linear,
    "mlp": Mlp,
    "product": Product,
    "keywords": Keywords,
    "experts": Experts,
    "convolution": Convolution,
    "tied": Tied,
    "attention": Attention,
    "torch module": TorchModule,
    "sliced": Sliced,
    "joined": Joined,
    "scaled": Scaled,
    "computed": Computed,
    "lora": Lora,
    "batch norm": BatchNorm,
    "dropout": Dropout,
    "detached": Detached,
    "region": Region,
    "converted": Converted,
}


class _Getattr:
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)  # type: ignore[misc]


class _Sets:
    seen: Any = None

    def forward(self, *args: Any) -> Any:
        if self.seen is None:
            self.seen = 1
        return super().forward(*args)  # type: ignore[misc]


def odd(cls: type[nn.Module], oddity: str) -> type[nn.Module]:
    """A class, or one that is derived of it: see `fuzz.case.ODDITIES`."""
    mixin = {"plain": None, "getattr": _Getattr, "sets": _Sets}[oddity]
    return cls if mixin is None else type(f"{cls.__name__}_{oddity}", (mixin, cls), {})


def build(part: Part) -> Block:
    """The module of a part."""
    block = odd(KINDS[part.kind], part.oddity)(part.form)
    assert isinstance(block, Block)
    block.broken = part.broken
    return block
