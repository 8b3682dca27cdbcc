"""The smallest models that several test files train, on 40 features unless they say otherwise."""

from functools import cache

import torch
from torch import nn


class OneLayer(nn.Module):
    """``fc`` alone. Without a bias, called with the identity, it returns the weight that it uses, transposed."""

    def __init__(self, rows: int = 40, cols: int = 40, *, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(cols, rows, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Product(nn.Module):
    """A linear layer of one's own, of which torch traces a frame: one graph for all of them behind a break."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


class Net(nn.Module):
    """``up`` to the inner features and ``down`` from them, added to the input."""

    def __init__(self, inner: int = 72) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(40, inner), nn.Linear(inner, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class BrokenNet(Net):
    """A `Net` of two graphs for each forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x).relu()
        torch._dynamo.graph_break()
        return x + self.down(y)


class NetWithHead(Net):
    """A `Net`, and behind it a linear layer under the name that is given."""

    def __init__(self, head: str, features: int, *, inner: int = 72) -> None:
        super().__init__(inner)
        self.head = head
        self.add_module(head, nn.Linear(40, features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.head)(super().forward(x))


class TwoBlocks(nn.Module):
    """``first`` and ``second``, each a `Net`; ``out`` behind them is a linear layer to ``features``, if there are."""

    def __init__(self, inner: int = 72, *, features: int | None = None) -> None:
        super().__init__()
        self.first, self.second = Net(inner), Net(inner)
        self.out = nn.Identity() if features is None else nn.Linear(40, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(x)))


@cache
def traces_own_modules() -> bool:
    """Whether this torch traces its own modules after ``module.compile()``: from 2.14 on."""
    graphs = []
    module = nn.Linear(2, 2)
    module.compile(backend=lambda gm, inputs: graphs.append(gm) or gm.forward)
    module(torch.ones(1, 2))
    return bool(graphs)


class HalvableBlock(nn.Module):
    """``up`` from 64 features to 128 and ``down`` from them: halves of both sides have whole blocks of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class HalvableBlocks(nn.Module):
    """``first`` and ``second``, each a `HalvableBlock`; for two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = HalvableBlock(), HalvableBlock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))
